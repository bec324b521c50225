"""What an edge tells the observability plane: one record a request, a few measurements, a few named counts.

Ids, lengths, times and outcomes only; never a prompt, an output, a token id or a header value that a client chose
freely (the client's own request id is checked against the alphabet of `contracts.ids` before it gets here).
"""

import enum
from typing import Protocol

import msgspec

from isthmus.contracts.events import EngineStats, ModelInfo
from isthmus.contracts.journal import LineageFact


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One HTTP request that ended. `route` is the pattern served (never the raw path), times are in seconds.

    `status` 499 means that the client went away before the answer was complete.
    """

    request_id: str
    method: str
    route: str
    status: int
    received_at: float
    total_s: float
    request_bytes: int
    response_bytes: int
    client_request_id: str = ""
    traceparent: str = ""
    stream: bool = False
    sequences: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    finish: str = ""
    error: str = ""


class Count(enum.StrEnum):
    """Things an edge counts besides requests."""

    ABORT_DISCONNECT = "abort_disconnect"
    ABORT_STOP_STRING = "abort_stop_string"
    ABORT_DEADLINE = "abort_deadline"
    ABORT_ERROR = "abort_error"
    REFUSED_CONNECTIONS = "refused_connections"
    REFUSED_IN_FLIGHT = "refused_in_flight"
    REFUSED_MEMORY = "refused_memory"
    REFUSED_MALFORMED = "refused_malformed"
    REFUSED_PIPELINE = "refused_pipeline"
    TIMEOUT_HEADER = "timeout_header"
    TIMEOUT_BODY = "timeout_body"
    TIMEOUT_IDLE = "timeout_idle"
    TIMEOUT_WRITE = "timeout_write"
    IGNORED_FIELD = "ignored_field"
    INTERNAL_ERROR = "internal_error"


class Metrics(Protocol):
    """Takes measurements without ever making the caller wait, and renders them for Prometheus."""

    def request_ended(self, record: RequestRecord) -> None:
        """An HTTP request ended."""
        ...

    def sequence_ended(self, fact: LineageFact) -> None:
        """An engine request ended."""
        ...

    def first_token(self, seconds: float) -> None:
        """Seconds from a received request to the first token of one of its sequences."""
        ...

    def inter_token(self, seconds: float, tokens: int) -> None:
        """Seconds since the output before, and how many tokens (at least 1) this output brought."""
        ...

    def count(self, what: Count) -> None:
        """One more of `what`."""
        ...

    def connections(self, open_now: int, in_flight: int) -> None:
        """How many connections are open and how many requests are being answered."""
        ...

    def render(self, stats: EngineStats, info: ModelInfo) -> bytes:
        """Everything in Prometheus' text format 0.0.4, with the engine's state as of `stats`."""
        ...


class RequestLog(Protocol):
    """Takes one record a request without ever making the caller wait (bounded; an overflow is dropped and counted)."""

    def write(self, record: RequestRecord) -> None:
        """Queue `record` for the log."""
        ...
