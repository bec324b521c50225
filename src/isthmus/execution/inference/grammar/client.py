"""The near end of the grammar process: starts it and speaks to it without ever waiting. Never imports llguidance."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from isthmus.contracts.errors import WireViolation
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.inference.grammar.messages import Answer, Question

WORKER = "isthmus.execution.inference.grammar.worker"
RECEIVE_BYTES = 1 << 20
STOP_TIMEOUT_S = 5.0


class Process(Protocol):
    """A grammar process, or a test's stand-in."""

    def send(self, questions: list[Question]) -> None:
        """Hand questions over; what does not fit now is kept and goes with the next `receive` or `send`."""
        ...

    def receive(self) -> list[Answer] | None:
        """The answers that are here; None when the process is gone."""
        ...

    def fileno(self) -> int:
        """The descriptor that is readable when answers are here."""
        ...

    @property
    def sending(self) -> bool:
        """Whether something is still to be sent: wait for the descriptor to be writable, too."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...


class GrammarProcess:
    """A real process. It inherits its socket only: no environment, no signals of the terminal, no other files."""

    def __init__(self, process: "subprocess.Popen[bytes]", sock: socket.socket) -> None:
        self._process = process
        self._socket = sock
        self._answers: FrameReader[Answer] = FrameReader(Answer)
        self._unsent = bytearray()

    @classmethod
    def spawn(cls, memory_bytes: int) -> "GrammarProcess":
        """Start one. Raises `OSError` when the machine does not let us."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            process = subprocess.Popen(
                # -P, -s: neither the working directory nor the user's is searched for modules; -B: writes no bytecode.
                [sys.executable, "-P", "-s", "-B", "-m", WORKER, str(far.fileno()), str(memory_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
                pass_fds=(far.fileno(),),
                start_new_session=True,
            )
        except OSError:
            near.close()
            raise
        finally:
            far.close()
        near.setblocking(False)
        return cls(process, near)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fileno(self) -> int:
        """See `Process`."""
        return self._socket.fileno()

    @property
    def sending(self) -> bool:
        """See `Process`."""
        return bool(self._unsent)

    def send(self, questions: list[Question]) -> None:
        """See `Process`. What is unsent is bounded: each lane has one unanswered question."""
        for question in questions:
            self._unsent += encode_frame(question)
        self._flush()

    def receive(self) -> list[Answer] | None:
        """See `Process`. A process that breaks the protocol counts as gone."""
        self._flush()
        answers: list[Answer] = []
        while True:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return answers
            except OSError:
                return None
            if not data:
                return None
            try:
                answers += self._answers.feed(data)
            except WireViolation:
                return None

    def kill(self) -> None:
        """See `Process`."""
        self._process.kill()
        self._socket.close()
        self._process.wait(STOP_TIMEOUT_S)

    def _flush(self) -> None:
        """Send what fits. A broken socket shows itself at the next `receive`."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except OSError:
                return
            del self._unsent[:sent]


def _environment() -> dict[str, str]:
    """The whole environment. One arena: threads would outgrow the memory limit."""
    package = sys.modules["isthmus"].__file__ or ""
    return {
        "PYTHONPATH": str(Path(package).resolve().parent.parent),
        "PYTHONUTF8": "1",
        "RAYON_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
