"""Waking a thread that waits for descriptors."""

import socket
from contextlib import suppress


class Bell:
    """Ends a wait from another thread. Rung many times before it is heard, it is heard once."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    @property
    def fileno(self) -> int:
        """Readable once it was rung, until `hush`."""
        return self._reader.fileno()

    def ring(self) -> None:
        """End the wait that is under way, or the next one."""
        # Full means rung often enough.
        with suppress(BlockingIOError):
            self._writer.send(b"!")

    def hush(self) -> None:
        """As if it had never been rung."""
        with suppress(BlockingIOError):
            while self._reader.recv(1 << 12):
                pass

    def close(self) -> None:
        """Nobody rings any more."""
        self._reader.close()
        self._writer.close()
