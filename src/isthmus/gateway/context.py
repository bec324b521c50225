"""One request on its way through the edge: who, until when, and what is known about it so far.

The facts gathered here become the log line and the metrics when the request ends, however it ends.
"""

import re
from dataclasses import dataclass, field

from isthmus.contracts.clock import Clock, Entropy
from isthmus.contracts.errors import DeadlineExceeded, InvalidInput
from isthmus.contracts.ids import RequestId, new_request_id
from isthmus.contracts.ids import request_id as check_request_id
from isthmus.contracts.telemetry import RequestRecord
from isthmus.gateway.errors import HttpError
from isthmus.gateway.exchange import Exchange
from isthmus.gateway.settings import GatewaySettings

REQUEST_ID_HEADER = "x-request-id"
TIMEOUT_HEADER = "x-request-timeout-ms"

_TIMER_RESOLUTION_S = 0.005
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MILLISECONDS = re.compile(r"[0-9]{1,12}")


@dataclass(slots=True)
class Call:
    """See the module. Times are on the clock's monotonic scale, in seconds; `deadline` None is no deadline."""

    request_id: RequestId
    exchange: Exchange
    client_request_id: str = ""
    traceparent: str = ""
    deadline: float | None = None
    route: str = "unmatched"
    stream: bool = False
    sequences: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    finishes: set[str] = field(default_factory=set)
    error: str = ""

    @property
    def received_at(self) -> float:
        """When the request's first byte came, on the monotonic clock."""
        return self.exchange.request.received_at

    def remaining(self, clock: Clock) -> float | None:
        """Seconds until the deadline; None without one. Raises `DeadlineExceeded` when it has passed."""
        if self.deadline is None:
            return None
        left = self.deadline - clock.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline of this request passed")
        return left

    def expired(self, clock: Clock) -> bool:
        """Whether the deadline passed (within the loop timer's resolution)."""
        return self.deadline is not None and clock.monotonic() >= self.deadline - _TIMER_RESOLUTION_S

    def record(self, status: int, now: float) -> RequestRecord:
        """What the log and the metrics are told."""
        request = self.exchange.request
        return RequestRecord(
            request_id=self.request_id,
            method=request.method,
            route=self.route,
            status=status,
            received_at=request.received_wall,
            total_s=now - self.received_at,
            request_bytes=request.body_bytes,
            response_bytes=self.exchange.sent,
            client_request_id=self.client_request_id,
            traceparent=self.traceparent,
            stream=self.stream,
            sequences=self.sequences,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            first_token_s=self.first_token_s,
            finish=",".join(sorted(self.finishes)),
            error=self.error,
        )


def new_call(exchange: Exchange, prefix: str, entropy: Entropy) -> Call:
    """The call of `exchange`, with a fresh id of its own; the client's own id, if it is valid, is kept beside it.

    The two are apart because a client may send the same id twice, and an engine must never see that.
    """
    request = exchange.request
    call = Call(new_request_id(prefix, entropy), exchange)
    sent = request.headers.get(REQUEST_ID_HEADER)
    if sent is not None:
        try:
            call.client_request_id = check_request_id(sent)
        except InvalidInput as error:
            request.refuse(HttpError(400, str(error), code=error.code, param=REQUEST_ID_HEADER))
    call.traceparent = traceparent(request.headers.get("traceparent"), entropy)
    exchange.headers.append((REQUEST_ID_HEADER, call.client_request_id or call.request_id))
    exchange.headers.append(("traceparent", call.traceparent))
    return call


def set_deadline(call: Call, header: str | None, settings: GatewaySettings) -> None:
    """Take the deadline from the header's milliseconds, or the default. Raises `HttpError` 400 naming the limit."""
    seconds = settings.default_deadline_s
    if header is not None:
        limit = int(settings.max_deadline_s * 1000)
        if not _MILLISECONDS.fullmatch(header) or not 1 <= int(header) <= limit:
            message = f"{TIMEOUT_HEADER} is a number of milliseconds from 1 to {limit}"
            raise HttpError(400, message, code="invalid_input", param=TIMEOUT_HEADER)
        seconds = int(header) / 1000
    if seconds is not None:
        call.deadline = call.received_at + seconds


def traceparent(header: str | None, entropy: Entropy) -> str:
    """The traceparent of this hop (W3C Trace Context): the caller's trace id, or a fresh one; a fresh parent id.

    An invalid header is dropped and a new trace started, as the specification asks.
    """
    parent = entropy.token_bytes(8).hex()
    found = _TRACEPARENT.fullmatch(header or "")
    if found is None or not _valid(found):
        return f"00-{entropy.token_bytes(16).hex()}-{parent}-01"
    return f"00-{found.group(2)}-{parent}-{found.group(4)}"


def _valid(found: re.Match[str]) -> bool:
    version, trace, span, _, rest = found.groups()
    known = version == "00" and rest is None
    return version != "ff" and (known or version != "00") and set(trace) != {"0"} and set(span) != {"0"}
