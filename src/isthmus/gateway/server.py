"""The edge as a whole: it accepts, bounds, answers and drains.

Promises kept here: a request that was accepted is answered, also while the process drains; a request whose client went
away is cancelled at once; every request, however it ends, is logged and measured once; nothing unexpected leaves a
client waiting.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate

from isthmus.contracts.address import is_loopback
from isthmus.contracts.errors import DeadlineExceeded, Draining, IsthmusError, Overloaded
from isthmus.contracts.telemetry import Count
from isthmus.gateway.connection import Connection
from isthmus.gateway.context import TIMEOUT_HEADER, Call, new_call, set_deadline
from isthmus.gateway.decode import check_content_type
from isthmus.gateway.errors import CLIENT_CLOSED_STATUS, HttpError, to_http
from isthmus.gateway.exchange import Exchange
from isthmus.gateway.message import HttpRequest, check_host
from isthmus.gateway.outgoing import Disconnected
from isthmus.gateway.render import OPENAI_ERRORS
from isthmus.gateway.routes import Route, check_method, find_route
from isthmus.gateway.service import GatewayDeps, Service, build_service
from isthmus.gateway.settings import GatewaySettings

_MAX_REFUSED = 64
"""Connections over the limit that may be told so at a time; more are cut off without a word."""


class Gateway:
    """The HTTP edge of one engine. `start`, then `drain` and `close`, once each, on one event loop."""

    def __init__(self, deps: GatewayDeps, settings: GatewaySettings) -> None:
        self.settings = settings
        self.clock = deps.clock
        self.draining = False
        self._deps = deps
        self._service: Service | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._refused: set[Connection] = set()
        self._active = 0
        self._in_flight = 0
        self._buffered = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._loopback = is_loopback(settings.host)

    async def start(self) -> tuple[str, int]:
        """Bind and serve; the address bound. Raises `EngineFailed` before the engine is ready, `OSError` from bind."""
        self._service = build_service(self._deps, self.settings, lambda: self.draining)
        loop = asyncio.get_running_loop()
        settings = self.settings
        self._server = await loop.create_server(
            lambda: Connection(self), settings.host, settings.port, backlog=settings.backlog
        )
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def drain(self, deadline_s: float) -> bool:
        """Accept no connection, refuse new work with 503, let what was accepted finish; then cut off what is left.

        True when everything finished within `deadline_s` seconds. Returns at the latest shortly after them.
        """
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.last_answer()
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
            finished = True
        except TimeoutError:
            finished = False
        for connection in list(self._connections):
            connection.shut(now=not finished)
        await self._idle.wait()
        return finished

    async def close(self) -> None:
        """Stop at once: cut off whatever is still running."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in [*self._connections, *self._refused]:
            connection.shut(now=True)
        await self._idle.wait()

    @property
    def active(self) -> int:
        """Requests being answered."""
        return self._active

    # -- what a connection asks (see `connection.Site`)

    def opened(self, connection: Connection) -> bool:
        """See `Site`."""
        if len(self._connections) >= self.settings.max_connections:
            self._refused.add(connection)
            if len(self._refused) > _MAX_REFUSED:
                connection.drop()
            return False
        self._connections.add(connection)
        self._gauge()
        return True

    def closed(self, connection: Connection) -> None:
        """See `Site`."""
        self._connections.discard(connection)
        self._refused.discard(connection)
        self._gauge()

    def reserve(self, count: int) -> bool:
        """See `Site`."""
        if count > 0 and self._buffered + count > self.settings.max_buffered_bytes:
            return False
        self._buffered += count
        return True

    def count(self, what: Count) -> None:
        """See `Site`."""
        self._deps.metrics.count(what)

    def check_route(self, request: HttpRequest) -> None:
        """See `Site`: host, path, method and content type, all known before the body."""
        if self._loopback:
            check_host(request.headers.get("host"), self.settings.allowed_hosts)
        route = find_route(request.path)
        if request.method == "OPTIONS" and (route is not None or request.path == "*"):
            return
        check_method(route, request.method)
        if request.method == "POST":
            check_content_type(request.headers.get("content-type"))

    async def answer(self, exchange: Exchange) -> None:
        """See `Site`."""
        request = exchange.request
        route = find_route(request.path)
        call = new_call(exchange, route.id_prefix if route is not None else "req", self._deps.entropy)
        exchange.headers.append(("date", formatdate(self.clock.wall(), usegmt=True)))
        call.route = route.pattern if route is not None else "unmatched"
        self._busy(1)
        finished = False
        try:
            await self._answer(call, route)
            finished = True
        except Disconnected:
            exchange.disconnected = True
        except asyncio.CancelledError:
            # Either the client went away, or this server ended before it could answer.
            call.error = "disconnected" if exchange.disconnected else Draining.code
            finished = True
            raise
        finally:
            self._busy(-1)
            self._end(call, finished)

    def _end(self, call: Call, finished: bool) -> None:
        """Tell the log and the metrics how a request ended."""
        exchange = call.exchange
        status = exchange.status or (503 if call.error == Draining.code else 500)
        if exchange.disconnected:
            status = CLIENT_CLOSED_STATUS
        elif not finished:
            self.count(Count.INTERNAL_ERROR)
            call.error = call.error or "internal"
        record = call.record(status, self.clock.monotonic())
        self._deps.metrics.request_ended(record)
        self._deps.log.write(record)

    # -- answering

    async def _answer(self, call: Call, route: Route | None) -> None:
        """Answer, or say what went wrong."""
        try:
            await self._dispatch(call, route)
        except HttpError as error:
            await self._fail(call, route, error)
        except IsthmusError as error:
            await self._fail(call, route, to_http(error))

    async def _dispatch(self, call: Call, route: Route | None) -> None:
        """Run the route's handler within the request's deadline and the in-flight limit."""
        exchange, request, service = call.exchange, call.exchange.request, self._service
        if request.error is not None:
            raise request.error
        if service is None:
            raise Draining("this server is not serving")
        if request.method == "OPTIONS":
            allow = ", ".join(route.methods) if route is not None else "GET, HEAD, POST, OPTIONS"
            await exchange.respond(204, b"", "", (("allow", allow),))
            return
        found = check_method(route, request.method)
        if not found.gated:
            await found.handler(service, call)
            return
        if self.draining:
            exchange.close_after()
            raise Draining("this server is draining: it finishes what it accepted and takes nothing new")
        set_deadline(call, request.headers.get(TIMEOUT_HEADER), self.settings)
        async with self._admitted(), self._deadline(call):
            await found.handler(service, call)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """Hold one of the in-flight places. Raises `Overloaded` when there is none."""
        if self._in_flight >= self.settings.max_in_flight:
            self.count(Count.REFUSED_IN_FLIGHT)
            raise Overloaded(f"this server answers at most {self.settings.max_in_flight} requests at a time")
        self._in_flight += 1
        self._gauge()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._gauge()

    @asynccontextmanager
    async def _deadline(self, call: Call) -> AsyncIterator[None]:
        """Cut the handler off at the deadline, whether it tokenises, queues or streams. Raises `DeadlineExceeded`."""
        try:
            async with asyncio.timeout(call.remaining(self.clock)):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline of this request passed") from error

    async def _fail(self, call: Call, route: Route | None, error: HttpError) -> None:
        """Answer with an error in the route's dialect; in a stream that has begun, as its last event."""
        exchange = call.exchange
        call.error = error.code
        errors = route.errors if route is not None else OPENAI_ERRORS
        if exchange.started:
            await exchange.end(errors.events(error, call.request_id))
        else:
            body = errors.body(error, call.request_id)
            await exchange.respond(error.status, body, "application/json", error.headers)

    # -- bookkeeping

    def _busy(self, change: int) -> None:
        """Count requests being answered, so that a drain knows when the last one is done."""
        self._active += change
        if self._active:
            self._idle.clear()
        else:
            self._idle.set()

    def _gauge(self) -> None:
        self._deps.metrics.connections(len(self._connections), self._in_flight)
