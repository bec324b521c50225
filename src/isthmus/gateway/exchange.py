"""One request and its answer: a whole body, or a stream of pieces, written in HTTP/1.1 framing.

A head is written at most once; a stream starts only when its first piece is there, so an error before it is still a
status of its own. Each piece of a stream is one write.
"""

from http import HTTPStatus

from isthmus.gateway.message import HttpRequest
from isthmus.gateway.outgoing import Outgoing

_LAST_CHUNK = b"0\r\n\r\n"
_REASONS = {status.value: status.phrase for status in HTTPStatus}


def head_bytes(status: int, headers: list[tuple[str, str]]) -> bytes:
    """A response's status line and headers. Header values come from this server or were checked to be printable."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}"]
    lines.extend(f"{name}: {value}" for name, value in headers)
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8")


class Exchange:
    """See the module. `headers` are added to whatever answer is given."""

    def __init__(self, request: HttpRequest, out: Outgoing, *, closing: bool) -> None:
        self.request = request
        self.headers: list[tuple[str, str]] = []
        self.status: int | None = None
        self.disconnected = False
        self._out = out
        self._start = out.sent
        self._closing = closing
        self._streaming = False
        self._finished = False
        self._chunked = request.http11

    @property
    def sent(self) -> int:
        """Bytes written for this answer."""
        return self._out.sent - self._start

    @property
    def started(self) -> bool:
        """Whether a head has been written."""
        return self.status is not None

    @property
    def must_close(self) -> bool:
        """Whether the connection ends after this answer."""
        return self._closing or not self._finished

    def close_after(self) -> None:
        """End the connection after this answer."""
        self._closing = True

    def _head(self, status: int, headers: list[tuple[str, str]]) -> bytes:
        self.status = status
        if self._closing:
            headers.append(("connection", "close"))
        elif not self.request.http11:
            headers.append(("connection", "keep-alive"))
        return head_bytes(status, headers + self.headers)

    async def respond(
        self, status: int, body: bytes, content_type: str, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Write the whole answer and wait until the client has room for more. Raises `Disconnected`."""
        self.put(status, body, content_type, headers)
        await self._out.ready()

    def put(self, status: int, body: bytes, content_type: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """Write the whole answer without waiting. Raises `Disconnected`."""
        fields = [("content-type", content_type)] if body else []
        if status != 204:  # RFC 9110, 8.6: a 204 has no Content-Length
            fields.append(("content-length", str(len(body))))
        fields.extend(headers)
        head = self._head(status, fields)
        self._out.write(head if self.request.method == "HEAD" else head + body)
        self._finished = True

    async def send(self, piece: bytes) -> None:
        """Write one piece of an event stream (the head before the first) and wait for room. Raises `Disconnected`."""
        data = b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece
        if not self._streaming:
            self._streaming = True
            fields = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-store")]
            if self._chunked:
                fields.append(("transfer-encoding", "chunked"))
            else:
                self._closing = True
            data = self._head(200, fields) + data
        self._out.write(data)
        await self._out.ready()

    async def end(self, piece: bytes) -> None:
        """Write the last piece and the end of the stream in one write. Raises `Disconnected`."""
        if not self._streaming:
            await self.send(piece)
            piece = b""
        data = piece
        if self._chunked:
            data = (b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"") + _LAST_CHUNK
        if data:
            self._out.write(data)
        self._finished = True
        await self._out.ready()
