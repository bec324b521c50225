"""One HTTP request as it arrives, and the checks on its head.

httptools (llhttp, strict) refuses bad framing: Content-Length with Transfer-Encoding, duplicates, obs-fold, bare LF,
control characters. What it lets through and this edge does not take is refused here: versions other than 1.0 and 1.1,
chunked bodies over HTTP/1.0, a missing or doubled Host, tunnels, header values that are not UTF-8.
"""

from dataclasses import dataclass, field

from isthmus.gateway.errors import HttpError
from isthmus.gateway.settings import GatewaySettings

_SINGLE = frozenset({"host", "content-type", "content-length", "expect", "x-request-id", "x-request-timeout-ms"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def malformed(message: str) -> HttpError:
    """A request that is not HTTP as this edge takes it."""
    return HttpError(400, message, code="malformed_request")


@dataclass(slots=True)
class HttpRequest:
    """A request. Header names are lower case; a header sent twice is joined with a comma, except where that is refused.

    `error` is why it will be refused (first reason wins); its body is then not kept. `last` says that the connection
    ends after its answer.
    """

    received_at: float
    received_wall: float
    method: str = ""
    url: bytearray = field(default_factory=bytearray)
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    http11: bool = True
    body: bytearray = field(default_factory=bytearray)
    body_bytes: int = 0
    head_bytes: int = 0
    header_lines: int = 0
    raw_bytes: int = 0
    expects_continue: bool = False
    head_complete: bool = False
    offers_upgrade: bool = False
    error: HttpError | None = None
    last: bool = False

    @property
    def declared_length(self) -> int | None:
        """Content-Length, if it was sent (llhttp has checked that it is a number)."""
        text = self.headers.get("content-length")
        return None if text is None else int(text)

    @property
    def has_body(self) -> bool:
        """Whether a body follows the head."""
        return "transfer-encoding" in self.headers or bool(self.declared_length)

    def refuse(self, error: HttpError) -> None:
        """Keep `error` as the answer unless there is one already; drop the body."""
        if self.error is None:
            self.error = error
        self.body.clear()

    def add_header(self, raw_name: bytes, raw_value: bytes, settings: GatewaySettings) -> None:
        """Take a header line (or a trailer, which is only counted). Raises `HttpError` over a limit."""
        self.header_lines += 1
        self.head_bytes += len(raw_name) + len(raw_value) + 4
        if self.header_lines > settings.max_headers:
            raise _header_error(f"a request has at most {settings.max_headers} header lines")
        if self.head_bytes > settings.max_header_bytes:
            raise _header_error(f"the headers of a request have at most {settings.max_header_bytes} bytes")
        if self.head_complete:
            return
        name = raw_name.decode("ascii").lower()
        try:
            value = raw_value.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise malformed("a header value is not UTF-8") from error
        before = self.headers.get(name)
        if before is not None:
            if name in _SINGLE:
                raise malformed(f"the header {name} was sent twice")
            value = f"{before}, {value}"
        self.headers[name] = value

    def check_head(self, version: str, settings: GatewaySettings) -> None:
        """The checks that need the whole head. Raises `HttpError`."""
        if version not in {"1.0", "1.1"}:
            raise HttpError(505, "this server speaks HTTP/1.1 and HTTP/1.0", code="http_version")
        self.http11 = version == "1.1"
        if not self.http11 and "transfer-encoding" in self.headers:
            raise malformed("HTTP/1.0 has no Transfer-Encoding")
        if self.headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise malformed("the only transfer encoding taken is chunked")
        if self.http11 and "host" not in self.headers:
            raise malformed("HTTP/1.1 needs a Host header")
        if self.method == "CONNECT":
            raise malformed("this server does not tunnel connections")
        expect = self.headers.get("expect")
        if expect is not None and expect.lower() != "100-continue":
            raise HttpError(417, "the only expectation taken is 100-continue", code="expectation_failed")
        self.expects_continue = expect is not None and self.http11 and self.has_body
        self.path = target_path(bytes(self.url))
        length = self.declared_length
        if length is not None and length > settings.max_body_bytes:
            raise body_too_large(settings)


def target_path(target: bytes) -> str:
    """The path of a request target in origin or absolute form, without its query. Raises `HttpError`.

    Not percent-decoded: no route of this edge needs it, and one form means one meaning.
    """
    if any(byte <= 0x20 or byte >= 0x7F for byte in target):
        raise malformed("the request target has characters that are not printable ASCII")
    text = target.decode("ascii")
    if text == "*":
        return text
    if text.lower().startswith(("http://", "https://")):
        rest = text.partition("://")[2]
        text = "/" + rest.partition("/")[2]
    if not text.startswith("/"):
        raise malformed("the request target is not a path")
    return text.partition("?")[0].partition("#")[0]


def check_host(host: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a Host that is not a loopback name: a page in a browser that rebound its name to loopback sends its own.

    Raises `HttpError` 403 (not 421: the client must not retry elsewhere).
    """
    if host is None:
        return
    name = host.lower()
    name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
    if name not in _LOOPBACK and name not in allowed:
        message = "this server is bound to loopback and takes only the Host names localhost, 127.0.0.1 and [::1]"
        raise HttpError(403, message, code="host_not_allowed")


def body_too_large(settings: GatewaySettings) -> HttpError:
    """The refusal of a body over its limit."""
    return HttpError(413, f"a request body has at most {settings.max_body_bytes} bytes", code="too_large")


def _header_error(message: str) -> HttpError:
    return HttpError(431, message, code="too_large")
