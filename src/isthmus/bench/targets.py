"""What is measured: servers that speak OpenAI's protocol, and libraries driven by a script in their own environment.

A target is a tree of processes. While another is measured it is stopped (SIGSTOP), so that engines which poll when
idle take nothing from their neighbours.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from isthmus.bench.client import ANSWER_TIMEOUT_S, BadAnswer, Trace, ask_server
from isthmus.bench.meters import stopped, tree
from isthmus.bench.workloads import Ask
from isthmus.config import inherited_environment

START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 20.0
PAUSE_TIMEOUT_S = 5.0
MAX_PAGE_BYTES = 1 << 22
_POLL_S = 0.02
_PART = re.compile(r'^isthmus_step_seconds_total\{[^}]*part="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)


class Target(Protocol):
    """An engine that can be asked. `start` gives the seconds until it took requests."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def start(self) -> float:
        """Start, and wait until it takes requests. Raises `BadAnswer`."""
        ...

    def run(self, asks: Sequence[Ask]) -> list[Trace]:
        """Ask everything, each at its time. Raises `BadAnswer`."""
        ...

    def processes(self) -> list[int]:
        """The processes that it consists of."""
        ...

    def profile(self) -> dict[str, float]:
        """Seconds that steps took since the start, by part; empty when the engine does not tell."""
        ...

    def pause(self) -> None:
        """Stop computing until `resume`."""
        ...

    def resume(self) -> None:
        """Go on."""
        ...

    def stop(self) -> None:
        """End it."""
        ...


def end_when_told() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does, with whatever it has started, paused or not."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class TreeTarget:
    """What both kinds of target share: a child with its descendants, its errors in a log. `_pipe` is its other two."""

    _pipe = subprocess.DEVNULL

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._name, self._command, self._environment, self._log = name, command, environment, log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """See `Target`."""
        return self._name

    @property
    def child(self) -> "subprocess.Popen[bytes]":
        """The running child. Raises `BadAnswer` before `start`."""
        if self._process is None:
            raise BadAnswer(f"{self._name} was not started")
        return self._process

    def failure(self, what: str) -> BadAnswer:
        """An error with the end of the log."""
        tail = self._log.read_bytes()[-1500:].decode(errors="replace")
        return BadAnswer(f"{self._name} {what}; the end of its log:\n{tail}")

    def _launch(self) -> float:
        started = time.monotonic()
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                self._command,
                env={**inherited_environment(), **self._environment},
                stdin=self._pipe,
                stdout=self._pipe,
                stderr=errors,
            )
        return started

    def processes(self) -> list[int]:
        """See `Target`."""
        return tree(self.child.pid)

    def profile(self) -> dict[str, float]:
        """See `Target`."""
        return {}

    def _signal(self, number: int) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def pause(self) -> None:
        """See `Target`. Returns when every process has stopped, or after a while."""
        self._signal(signal.SIGSTOP)
        until = time.monotonic() + PAUSE_TIMEOUT_S
        while not stopped(self.processes()) and time.monotonic() < until:
            time.sleep(_POLL_S)

    def resume(self) -> None:
        """See `Target`."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """See `Target`. Asks the child to end, and makes the whole tree after a while."""
        if self._process is None:
            return
        self.resume()
        known = self.processes()
        with self._process as child:
            child.terminate()
            try:
                child.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                for pid in known:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


class ServerTarget(TreeTarget):
    """A server: `command` with `{port}` replaced. It takes requests once GET /health is answered with 200."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, model: str
    ) -> None:
        self._port, self._model = free_port(), model
        super().__init__(name, [part.replace("{port}", str(self._port)) for part in command], environment, log)

    def start(self) -> float:
        """See `Target`."""
        started = self._launch()
        while not self._healthy():
            if self.child.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                raise self.failure("did not start")
            time.sleep(_POLL_S)
        return time.monotonic() - started

    def _healthy(self) -> bool:
        return self.page("/health") is not None

    def page(self, path: str) -> str | None:
        """The body of a page; None unless it is answered with 200."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as answer:
                return str(answer.read(MAX_PAGE_BYTES).decode(errors="replace"))
        except (OSError, urllib.error.URLError):
            return None

    def profile(self) -> dict[str, float]:
        """See `Target`. From our own metrics."""
        return {part: float(seconds) for part, seconds in _PART.findall(self.page("/metrics") or "")}

    def run(self, asks: Sequence[Ask]) -> list[Trace]:
        """See `Target`. A server that has ended says why by the end of its log."""
        try:
            return asyncio.run(ask_server(self._port, self._model, asks))
        except BadAnswer as error:
            if self.child.poll() is not None:
                raise self.failure(f"ended with status {self.child.returncode}") from error
            raise


class LinesTarget(TreeTarget):
    """A script that writes `{"ready": true}`, then answers each line with a line; it ends when its input does."""

    _pipe = subprocess.PIPE

    def start(self) -> float:
        """See `Target`."""
        started = self._launch()
        if "ready" not in self._line():
            raise self.failure("did not start")
        return time.monotonic() - started

    def ask(self, question: object) -> dict[str, Any]:
        """The answer to one question. Raises `BadAnswer`."""
        pipe: IO[bytes] | None = self.child.stdin
        if pipe is None:
            raise BadAnswer(f"{self._name} has no input")
        try:
            pipe.write(json.dumps(question).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError as error:
            raise self.failure("has ended") from error
        answer = self._line()
        if not answer:
            raise self.failure("did not answer")
        return answer

    def stop(self) -> None:
        """See `Target`. What it started ends with it, if it is given the time for that."""
        if self._process is not None and self._process.stdin is not None:
            self.resume()
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
        super().stop()

    def _line(self) -> dict[str, Any]:
        """The next line of output that is an object; empty at the end, or when none comes in time."""
        pipe = self.child.stdout
        # A script that says nothing for so long is ended, which ends its output too.
        watch = threading.Timer(ANSWER_TIMEOUT_S, self.child.kill)
        watch.start()
        try:
            while pipe is not None and (line := pipe.readline()):
                if line.startswith(b"{"):
                    found: dict[str, Any] = json.loads(line)
                    return found
        finally:
            watch.cancel()
        return {}


class ScriptTarget(LinesTarget):
    """An engine behind a script: a line of asks is answered with a line of traces."""

    def run(self, asks: Sequence[Ask]) -> list[Trace]:
        """See `Target`."""
        answer = self.ask([{"prompt": ask.prompt, "output": ask.output, "at_s": ask.at_s} for ask in asks])
        if "traces" not in answer:
            raise self.failure("gave no traces")
        traces = [Trace(t["sent_s"], [(when, count) for when, count in t["arrivals"]]) for t in answer["traces"]]
        for trace, ask in zip(traces, asks, strict=True):
            if trace.tokens != ask.output:
                raise BadAnswer(f"{self._name}: {trace.tokens} tokens came, {ask.output} were asked for")
        return traces


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
