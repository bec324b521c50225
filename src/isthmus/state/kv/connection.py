"""One end of the socket between a client and the daemon: whole frames and descriptors, every wait with a limit.

Frames are read exactly, never ahead, so that descriptors are received where they were sent: what comes with bytes that
nobody asked descriptors for is closed by the kernel.
"""

import array
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import DeadlineExceeded, WireViolation
from isthmus.contracts.wire import HEADER_BYTES, FrameReader, encode_frame

_DESCRIPTORS_A_MESSAGE = 128
_MARK = b"\0"

T = TypeVar("T")


class Closed(Exception):
    """The other end is gone."""


class Connection:
    """A connected Unix stream socket. For one thread at a time, but `shut` may be called from any."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._socket = sock
        self._clock = clock

    @property
    def peer_uid(self) -> int:
        """Whose process the other end was when it connected, by the kernel's word."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", raw)[1])

    def send(self, value: Any, limit: int, timeout_s: float) -> None:
        """Send one frame. Raises `DeadlineExceeded`, `Closed`, or `WireViolation` when it is over the limit."""
        data = encode_frame(value, limit)
        try:
            self._socket.settimeout(max(timeout_s, 0.001))
            self._socket.sendall(data)
        except TimeoutError as error:
            raise DeadlineExceeded("the other end does not take what it is sent") from error
        except OSError as error:
            raise Closed(str(error)) from error

    def arrives(self, timeout_s: float) -> bool:
        """Whether something arrives, or the end does, within `timeout_s`."""
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(timeout_s * 1000))
        except (OSError, ValueError) as error:
            raise Closed(str(error)) from error

    def receive(self, frames: "Frames[T]", timeout_s: float) -> T:
        """The next frame, all of it within `timeout_s`. Raises `DeadlineExceeded`, `Closed`, or `WireViolation`."""
        deadline = self._clock.monotonic() + timeout_s
        header = self._exactly(HEADER_BYTES, timeout_s)
        length = int.from_bytes(header, "little")
        frames.check(length)
        body = self._exactly(length, max(0.0, deadline - self._clock.monotonic()))
        return frames.decode(header + body)

    def send_descriptors(self, descriptors: Sequence[int], timeout_s: float) -> None:
        """Send open descriptors. Raises as `send`."""
        try:
            self._socket.settimeout(max(timeout_s, 0.001))
            for first in range(0, len(descriptors), _DESCRIPTORS_A_MESSAGE):
                socket.send_fds(self._socket, [_MARK], list(descriptors[first : first + _DESCRIPTORS_A_MESSAGE]))
        except TimeoutError as error:
            raise DeadlineExceeded("the other end does not take what it is sent") from error
        except OSError as error:
            raise Closed(str(error)) from error

    def receive_descriptors(self, count: int, timeout_s: float) -> list[int]:
        """Exactly `count` descriptors, which the caller closes. Raises as `receive`; none is open then."""
        found: list[int] = []
        room = socket.CMSG_SPACE(_DESCRIPTORS_A_MESSAGE * array.array("i").itemsize)
        try:
            while len(found) < count:
                self._socket.settimeout(max(timeout_s, 0.001))
                data, ancillary, flags, _ = self._socket.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
                fresh = array.array("i")
                for level, kind, content in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        fresh.frombytes(content[: len(content) - len(content) % fresh.itemsize])
                found += fresh
                if not data:
                    raise Closed("the other end closed the connection")
                if flags & socket.MSG_CTRUNC or not fresh or len(found) > count:
                    raise WireViolation(f"expected {count} descriptors, got {len(found)}")
        except TimeoutError as error:
            close_all(found)
            raise DeadlineExceeded("the other end sends no descriptors") from error
        except (OSError, Closed, WireViolation) as error:
            close_all(found)
            if isinstance(error, OSError):
                raise Closed(str(error)) from error
            raise
        return found

    def shut(self) -> None:
        """End both directions: whoever waits on it is woken."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()

    def _exactly(self, count: int, timeout_s: float) -> bytes:
        parts = bytearray()
        deadline = self._clock.monotonic() + timeout_s
        try:
            while len(parts) < count:
                left = deadline - self._clock.monotonic()
                if parts and left <= 0:
                    raise TimeoutError  # whoever sends a byte now and then is not waited for, either
                self._socket.settimeout(max(left, 0.001))
                data = self._socket.recv(min(count - len(parts), 1 << 20))
                if not data:
                    raise Closed("the other end closed the connection")
                parts += data
        except TimeoutError as error:
            raise DeadlineExceeded("the other end has sent no whole frame") from error
        except OSError as error:
            raise Closed(str(error)) from error
        return bytes(parts)


class Frames(Generic[T]):
    """Frames of one type and a cap on their length."""

    def __init__(self, type_: Any, limit: int) -> None:
        self._type = type_
        self._limit = limit
        self._reader: FrameReader[T] = FrameReader(type_, limit)

    def check(self, length: int) -> None:
        """Raise `WireViolation` for a frame that is too long, before anything of it is read."""
        if length > self._limit:
            raise WireViolation(f"a frame of {length} bytes is over the limit of {self._limit}")

    def decode(self, data: bytes) -> T:
        """The value of one whole frame. Raises `WireViolation`."""
        (value,) = self._reader.feed(data)
        return value


def close_all(descriptors: Sequence[int]) -> None:
    """Close received descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
