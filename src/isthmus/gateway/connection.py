"""One client connection: bytes in, requests in order, answers out. An `asyncio.Protocol` over httptools.

Promises kept here: requests of a connection are answered one after the other, in order; every phase has a deadline
(head, body, idle, write, linger); what is buffered is bounded in both directions; and input is read all the time, also
while a request is being answered, so that a client that goes away is seen at once and its work cancelled.

    phases   HEAD -> BODY -> BUSY -> IDLE -> HEAD ...      LINGER: input is discarded until the client closes
"""

import asyncio
import enum
from collections import deque
from typing import Any, Protocol, cast

import httptools
import msgspec

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import Draining
from isthmus.contracts.telemetry import Count
from isthmus.gateway.errors import UNAVAILABLE, HttpError, internal_error, retry_after, to_http
from isthmus.gateway.exchange import Exchange
from isthmus.gateway.message import HttpRequest, body_too_large, malformed
from isthmus.gateway.outgoing import Outgoing
from isthmus.gateway.settings import KIB, GatewaySettings

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_DISCARD_BYTES = 64 * KIB
"""A refused request's body up to this is read to its end and the connection kept; over it the connection closes."""
_OVERHEAD_FACTOR = 8
"""Bytes on the wire for each body byte: chunks of one byte take six."""


class Phase(enum.Enum):
    """What a connection waits for; each has its own deadline."""

    HEAD = "head"
    BODY = "body"
    IDLE = "idle"
    BUSY = "busy"
    LINGER = "linger"
    CLOSED = "closed"


class Site(Protocol):
    """What a connection needs of the server it belongs to."""

    settings: GatewaySettings
    clock: Clock
    draining: bool

    def opened(self, connection: "Connection") -> bool:
        """Take note of a new connection; False refuses it."""
        ...

    def closed(self, connection: "Connection") -> None:
        """Take note of its end."""
        ...

    def reserve(self, count: int) -> bool:
        """Reserve (or, negative, give back) bytes of the budget for bodies; False is over it."""
        ...

    def check_route(self, request: HttpRequest) -> None:
        """Refuse by the head alone. Raises `HttpError`."""
        ...

    def count(self, what: Count) -> None:
        """Count something."""
        ...

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request."""
        ...


class Connection(asyncio.Protocol):
    """See the module. Created by the server for each accepted socket."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._settings = site.settings
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._incoming: HttpRequest | None = None
        self._queue: deque[HttpRequest] = deque()
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._out: Outgoing
        self._phase = Phase.BUSY
        self._timer: asyncio.TimerHandle | None = None
        self._reserved = 0
        self._resuming = False
        self._begun = 0

    # -- the transport's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # uvloop's transports keep asyncio.Transport's contract without inheriting from it.
        self._out = Outgoing(cast("asyncio.Transport", transport), self._settings, self._write_expired)
        if self._site.opened(self):
            self._enter(Phase.HEAD)
            return
        self._site.count(Count.REFUSED_CONNECTIONS)
        message = f"this server takes at most {self._settings.max_connections} connections"
        error = HttpError(503, message, code="overloaded", kind=UNAVAILABLE, headers=retry_after(1.0))
        request = HttpRequest(self._site.clock.monotonic(), self._site.clock.wall())
        self._refuse_and_stop(request, error)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._parser is None:
            return
        before, self._begun = self._incoming, 0
        try:
            self._feed(data)
        except HttpError as error:
            self._broken(error)
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            if cause is not None and not isinstance(cause, HttpError):
                raise cause from None
            self._broken(cause or malformed("this is not a valid HTTP/1.1 request"))
            return
        incoming = self._incoming
        if incoming is not None and (incoming is before or (before is None and self._begun == 1)):
            # A request that began behind another is counted from the next read on: where it began is not known.
            incoming.raw_bytes += len(data)
            self._check_flood(incoming)
        self._rephase()

    def eof_received(self) -> bool:
        """See `asyncio.Protocol`. A client that stops sending has gone: its work is cancelled at once."""
        self._gone()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        del exc
        self._gone()
        self._out.lost()
        if self._timer is not None:
            self._timer.cancel()
        self._site.closed(self)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._out.pause()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._out.resume()

    def _feed(self, data: bytes) -> None:
        """Parse `data`. An offer to upgrade is ignored, as RFC 9110 (7.8) lets a server do.

        Clients that prefer HTTP/2 offer h2c with their first request. llhttp stops after the head of such a request, so
        its body is read by a fresh parser that is told the same framing.
        """
        while data:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
                self._decline_upgrade()

    def _decline_upgrade(self) -> None:
        """Go on after a head that offered an upgrade, as if it had not. Raises `HttpError`."""
        incoming = self._current()
        incoming.offers_upgrade = False
        self._parser = httptools.HttpRequestParser(self)
        if not incoming.has_body:
            self.on_message_complete()
            return
        length = incoming.declared_length
        framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
        self._resuming = True
        self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
        self._resuming = False

    # -- httptools' callbacks

    def on_message_begin(self) -> None:
        """A request line started."""
        if self._resuming:
            return
        self._begun += 1
        self._incoming = HttpRequest(self._site.clock.monotonic(), self._site.clock.wall())

    def on_url(self, part: bytes) -> None:
        """A piece of the request target."""
        if self._resuming:
            return
        incoming = self._current()
        incoming.url += part
        incoming.head_bytes += len(part)
        if len(incoming.url) > self._settings.max_url_bytes:
            message = f"a request target has at most {self._settings.max_url_bytes} bytes"
            raise HttpError(414, message, code="too_large")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line, or a trailer."""
        if not self._resuming:
            self._current().add_header(name, value, self._settings)

    def on_headers_complete(self) -> None:
        """The head is complete: refuse what can be refused without the body, or ask for the body."""
        if self._resuming:
            return
        incoming = self._current()
        incoming.head_complete = True
        incoming.offers_upgrade = self._parser.should_upgrade()
        incoming.method = self._parser.get_method().decode("ascii")
        incoming.check_head(self._parser.get_http_version(), self._settings)
        incoming.last = not self._parser.should_keep_alive()
        try:
            self._site.check_route(incoming)
        except HttpError as error:
            incoming.refuse(error)
        if incoming.error is not None:
            length = incoming.declared_length
            unbounded = incoming.has_body and (length is None or length > _DISCARD_BYTES)
            if unbounded or incoming.expects_continue:
                raise incoming.error
        self._say_continue()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        incoming = self._current()
        incoming.body_bytes += len(data)
        if incoming.body_bytes > self._settings.max_body_bytes:
            raise body_too_large(self._settings)
        if incoming.error is not None:
            return
        if not self._site.reserve(len(data)):
            self._site.count(Count.REFUSED_MEMORY)
            message = f"bodies being received have at most {self._settings.max_buffered_bytes} bytes together"
            raise HttpError(503, message, code="overloaded", kind=UNAVAILABLE, headers=retry_after(1.0))
        self._reserved += len(data)
        incoming.body += data

    def on_message_complete(self) -> None:
        """The request is complete: answer it when its turn comes."""
        incoming = self._current()
        if incoming.offers_upgrade:
            return
        self._incoming = None
        if len(self._queue) > self._settings.max_pipelined:
            self._site.count(Count.REFUSED_PIPELINE)
            raise malformed(f"at most {self._settings.max_pipelined} requests may wait on a connection")
        self._queue.append(incoming)
        self._next()

    # -- requests in order

    def _current(self) -> HttpRequest:
        """The request being parsed (llhttp calls back only within one)."""
        if self._incoming is None:
            raise malformed("input outside a request")
        return self._incoming

    def _next(self) -> None:
        """Start to answer the next request, if none is being answered."""
        if self._exchange is not None or not self._queue or self._phase in {Phase.LINGER, Phase.CLOSED}:
            return
        request = self._queue.popleft()
        self._exchange = Exchange(request, self._out, closing=request.last or (self._site.draining and not self._queue))
        self._task = self._loop.create_task(self._site.answer(self._exchange))
        self._task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        """An answer ended: go on with the next request, or close."""
        exchange, self._exchange, self._task = self._exchange, None, None
        size = min(exchange.request.body_bytes if exchange is not None else 0, self._reserved)
        self._site.reserve(-size)
        self._reserved -= size
        if not task.cancelled() and task.exception() is not None:
            # A defect of ours: the loop's exception handler reports it, the client gets an end rather than a wait.
            self._loop.call_exception_handler({"message": "answer failed", "exception": task.exception(), "task": task})
            if exchange is not None and not exchange.started and not self._out.closing:
                self._last_words(exchange, internal_error())
            self._finish()
            return
        if self._phase is Phase.CLOSED:
            return
        if exchange is None or task.cancelled() or exchange.must_close or (self._site.draining and not self._queue):
            self._finish()
            return
        self._next()
        self._say_continue()
        self._rephase()

    def _say_continue(self) -> None:
        """Ask for the body of a request that waits to be asked, once nothing is before it."""
        incoming = self._incoming
        if incoming is None or not incoming.head_complete or self._exchange is not None or self._queue:
            return
        if incoming.expects_continue and not self._out.closing:
            incoming.expects_continue = False
            self._out.write(_CONTINUE)

    def _broken(self, error: HttpError) -> None:
        """The input cannot be followed any further: answer what came before, then `error`, then close."""
        self._site.count(Count.REFUSED_MALFORMED)
        incoming = self._incoming or HttpRequest(self._site.clock.monotonic(), self._site.clock.wall())
        self._refuse_and_stop(incoming, error)

    def _refuse_and_stop(self, request: HttpRequest, error: HttpError) -> None:
        """Queue `error` as the last answer of this connection and read no further request."""
        self._parser = None
        self._incoming = None
        request.refuse(error)
        request.last = True
        self._queue.append(request)
        self._next()
        self._rephase()

    def _check_flood(self, incoming: HttpRequest) -> None:
        """Refuse a head that never ends and chunk framing without a body: httptools buffers both."""
        framing = incoming.raw_bytes - _OVERHEAD_FACTOR * incoming.body_bytes
        if framing > 2 * self._settings.max_header_bytes + self._settings.max_url_bytes:
            message = f"the headers of a request have at most {self._settings.max_header_bytes} bytes"
            self._broken(HttpError(431, message, code="too_large"))

    # -- phases and their deadlines

    def _rephase(self) -> None:
        """Enter the phase that the state calls for; staying in one does not move its deadline."""
        if self._phase in {Phase.LINGER, Phase.CLOSED}:
            return
        if self._exchange is not None:
            phase = Phase.BUSY
        elif self._incoming is not None:
            phase = Phase.BODY if self._incoming.head_complete else Phase.HEAD
        else:
            phase = Phase.HEAD if self._phase is Phase.HEAD else Phase.IDLE
        if phase is not self._phase:
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        """Enter `phase` and start its deadline."""
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        limits = {
            Phase.HEAD: self._settings.header_timeout_s,
            Phase.BODY: self._settings.body_timeout_s,
            Phase.IDLE: self._settings.idle_timeout_s,
            Phase.LINGER: self._settings.linger_timeout_s,
            Phase.CLOSED: self._settings.write_timeout_s,
        }
        if phase in limits:
            self._timer = self._loop.call_later(limits[phase], self._expired, phase)

    def _expired(self, phase: Phase) -> None:
        """A phase took too long."""
        if phase in {Phase.LINGER, Phase.CLOSED} or (self._incoming is None and phase is Phase.HEAD):
            self._out.abort()
            return
        if phase is Phase.IDLE:
            self._site.count(Count.TIMEOUT_IDLE)
            self._finish()
            return
        head = phase is Phase.HEAD
        self._site.count(Count.TIMEOUT_HEADER if head else Count.TIMEOUT_BODY)
        limit = self._settings.header_timeout_s if head else self._settings.body_timeout_s
        what = "head" if head else "body"
        self._broken(HttpError(408, f"the {what} of the request took over {limit} s", code="request_timeout"))

    def _write_expired(self) -> None:
        """The client left its answer unread for too long."""
        self._site.count(Count.TIMEOUT_WRITE)
        self._out.abort()

    # -- the end

    def _finish(self) -> None:
        """Close once everything written is sent; after a refusal in mid-input, let the client read it first."""
        unread = self._parser is None or self._incoming is not None
        self._parser = None
        if unread and self._out.end():
            self._enter(Phase.LINGER)
            return
        self._enter(Phase.CLOSED)
        self._out.close()

    @staticmethod
    def _last_words(exchange: Exchange, error: HttpError) -> None:
        """Answer with `error` at once, outside the task that should have answered."""
        exchange.close_after()
        exchange.put(error.status, msgspec.json.encode(error.body), "application/json", error.headers)

    def _gone(self) -> None:
        """The client went away: cancel its work, forget its input."""
        if self._exchange is not None:
            self._exchange.disconnected = True
        self._leave()

    def _leave(self) -> None:
        """Cancel what runs, forget the input."""
        self._enter(Phase.CLOSED)
        self._parser = None
        self._incoming = None
        self._queue.clear()
        self._site.reserve(-self._reserved)
        self._reserved = 0
        if self._task is not None:
            self._task.cancel()

    def drop(self) -> None:
        """Cut the connection off without an answer."""
        self._out.abort()

    @property
    def busy(self) -> bool:
        """Whether a request is being received, answered or waiting."""
        return self._exchange is not None or bool(self._queue) or self._incoming is not None

    def last_answer(self) -> None:
        """Tell the client, in the answer under way if its head is not written yet, that this connection ends."""
        if self._exchange is not None and not self._queue:
            self._exchange.close_after()

    def shut(self, *, now: bool) -> None:
        """Close: `now` cuts off what is running, else only a connection that is not busy is closed."""
        if now:
            exchange = self._exchange
            self._leave()
            if exchange is not None and not exchange.started and not self._out.closing:
                self._last_words(exchange, to_http(Draining("this server ended before this request was answered")))
                self._out.close()
            else:
                self._out.abort()
        elif not self.busy and self._phase is not Phase.LINGER:
            self._finish()
