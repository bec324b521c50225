"""The sending half of a connection, with flow control.

A producer that awaits `ready()` after each write is stalled while its own client does not read: at most
`write_buffer_bytes` plus one write wait in memory. A client that leaves the buffer full for
`write_timeout_s` is cut off.
"""

import asyncio
from collections.abc import Callable

from isthmus.gateway.settings import GatewaySettings


class Disconnected(Exception):
    """The client is gone; there is nobody to answer."""


class Outgoing:
    """Writes of one connection. `expired` is called when the client left the buffer full for too long."""

    def __init__(self, transport: asyncio.Transport, settings: GatewaySettings, expired: Callable[[], None]) -> None:
        self._transport = transport
        self._timeout = settings.write_timeout_s
        self._expired = expired
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._lost = False
        self.sent = 0
        transport.set_write_buffer_limits(high=settings.write_buffer_bytes)

    @property
    def closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._lost or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send `data`, or buffer it. Raises `Disconnected`."""
        if self.closing:
            raise Disconnected
        self.sent += len(data)
        self._transport.write(data)

    async def ready(self) -> None:
        """Wait until the buffer has room. Raises `Disconnected`."""
        if self._waiter is not None:
            await asyncio.shield(self._waiter)
        if self._lost:
            raise Disconnected

    def pause(self) -> None:
        """The buffer is full."""
        if self._waiter is None:
            self._waiter = self._loop.create_future()
            self._timer = self._loop.call_later(self._timeout, self._expired)

    def resume(self) -> None:
        """The buffer has room again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def lost(self) -> None:
        """The connection ended: wake whoever waits."""
        self._lost = True
        self.resume()

    def end(self) -> bool:
        """Send everything and the end of the stream, but keep reading. False when the connection is closing already."""
        if self.closing or not self._transport.can_write_eof():
            return False
        self._transport.write_eof()
        return True

    def close(self) -> None:
        """Send everything, then close."""
        self._transport.close()

    def abort(self) -> None:
        """Drop the connection and what is unsent."""
        self._transport.abort()
