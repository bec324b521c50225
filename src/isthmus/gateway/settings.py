"""Every limit of the edge, in one frozen value. Nothing in the gateway waits, grows or accepts without one of these."""

from dataclasses import dataclass, fields

from isthmus.contracts.errors import ConfigInvalid
from isthmus.contracts.requests import MAX_DEADLINE_S

KIB = 1024
MIB = 1024 * 1024

_UNCHECKED = frozenset({"host", "port", "allowed_hosts", "default_deadline_s"})


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Limits and addresses of the edge. Bytes, seconds or counts, as the names say. Raises `ConfigInvalid`."""

    host: str = "127.0.0.1"
    """The address to bind."""
    port: int = 8000
    """The port to bind; 0 takes a free one."""
    backlog: int = 512
    """Connections the kernel may hold before they are accepted."""
    allowed_hosts: tuple[str, ...] = ()
    """Names accepted in the Host header besides loopback names. Checked only when bound to loopback."""
    max_connections: int = 1024
    """Open connections; one more is answered 503 and closed."""
    max_in_flight: int = 512
    """Requests being answered that need the engine or the tokenizer; one more is answered 503."""
    max_url_bytes: int = 8 * KIB
    """Length of the request target."""
    max_header_bytes: int = 32 * KIB
    """Names and values of all headers of a request, with the request line."""
    max_headers: int = 100
    """Header lines of a request."""
    max_body_bytes: int = 16 * MIB
    """Body of one request."""
    max_buffered_bytes: int = 256 * MIB
    """Bodies of all requests that are being received; over it a request is answered 503."""
    max_json_depth: int = 64
    """Nesting of arrays and objects in a JSON body. Schemas of tools nest deepest, and have a limit of their own."""
    max_pipelined: int = 8
    """Requests waiting behind the one being answered on a connection; over it the connection closes after them."""
    header_timeout_s: float = 10.0
    """From the first byte of a request (or the connection's start) to the end of its headers."""
    body_timeout_s: float = 60.0
    """From the end of the headers to the end of the body."""
    idle_timeout_s: float = 75.0
    """Between requests on a kept connection."""
    write_timeout_s: float = 30.0
    """How long a client may leave a full write buffer unread before the connection is dropped."""
    linger_timeout_s: float = 2.0
    """How long unread input is discarded after an early refusal, so that the client can read the answer."""
    write_buffer_bytes: int = 64 * KIB
    """Unsent bytes of a connection over which its producer waits."""
    max_sequences: int = 64
    """Sequences of one request: prompts times n."""
    default_max_tokens: int = 4096
    """Output tokens when a request names no limit (never over what is left of the context)."""
    default_deadline_s: float | None = None
    """Deadline of a request that sends no x-request-timeout-ms; None is no deadline."""
    max_deadline_s: float = 3600.0
    """The longest deadline a request may ask for."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in _UNCHECKED and not value > 0:
                raise ConfigInvalid(f"gateway.{item.name} is {value}, accepted: over 0")
        if not 0 <= self.port <= 65535:
            raise ConfigInvalid(f"gateway.port is {self.port}, accepted: 0 to 65535")
        if not self.max_deadline_s <= MAX_DEADLINE_S:
            raise ConfigInvalid(f"gateway.max_deadline_s is {self.max_deadline_s}, accepted: to {MAX_DEADLINE_S}")
        default = self.default_deadline_s
        if default is not None and not 0 < default <= self.max_deadline_s:
            raise ConfigInvalid(f"gateway.default_deadline_s is {default}, accepted: over 0 to max_deadline_s")
