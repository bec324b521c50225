"""One paging process, as the engine that starts it sees it."""

import select
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import StoreUnavailable
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.inference.client import to_error
from isthmus.execution.inference.paging.frames import (
    MAX_FRAME_BYTES,
    RECEIVE_BYTES,
    Begin,
    Happened,
    NotOpened,
    Opened,
    ToEngine,
)

START_S = 120.0
CLOSE_S = 15.0
"""Closing a store makes durable what it has taken in."""


class Child:
    """Starts on construction; `command` gets `--fd N` for its end of the socket."""

    def __init__(self, command: Sequence[str]) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with far:
            self._process = subprocess.Popen(
                [*command, "--fd", str(far.fileno())], pass_fds=[far.fileno()], stdin=subprocess.DEVNULL
            )
        near.setblocking(False)
        self._socket = near
        self._frames: FrameReader[ToEngine] = FrameReader(ToEngine, MAX_FRAME_BYTES)

    @property
    def fileno(self) -> int:
        """Readable when the process has said something, or is gone."""
        return self._socket.fileno()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def opened(self, clock: Clock) -> None:
        """Wait until its store is open. Raises the error that the store gave, or `StoreUnavailable`."""
        end = clock.monotonic() + START_S
        while (left := end - clock.monotonic()) > 0:
            if not select.select([self.fileno], [], [], left)[0]:
                break
            messages = self.receive()
            if messages is None:
                raise StoreUnavailable("the paging process ended before its store was open")
            for message in messages:
                if isinstance(message, NotOpened):
                    raise to_error(message.error)
                if isinstance(message, Opened):
                    return
        raise StoreUnavailable(f"the store was not open within {START_S:.0f} s")

    def begin(self, begin: Begin, descriptors: Sequence[int]) -> None:
        """The first frame. Raises `StoreUnavailable` when nobody takes it."""
        frame = encode_frame(begin, MAX_FRAME_BYTES)
        try:
            # The socket is empty and the frame is small: all of it goes at once.
            sent = socket.send_fds(self._socket, [frame], list(descriptors))
        except OSError as error:
            raise StoreUnavailable(f"the paging process is gone: {error}") from error
        if sent != len(frame):
            raise StoreUnavailable("the paging process takes nothing")

    def send(self, data: memoryview) -> int:
        """How much of `data` went without waiting. Nothing goes to a process that is gone: `receive` tells."""
        try:
            return self._socket.send(data)
        except OSError:
            return 0

    def receive(self) -> list[Happened | Opened | NotOpened] | None:
        """What came, without waiting; None when the process is gone. Raises `WireViolation`."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._frames.feed(data) if data else None

    def end(self, *, kill: bool) -> int:
        """Let it close its store and end, or `kill` it; waits, with a limit, until it is gone. The exit status."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if kill:
            self._process.kill()
        try:
            status = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._socket.close()
        return status
