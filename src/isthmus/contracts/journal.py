"""What the journal keeps: events on streams, and the lineage fact of a request."""

import msgspec

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.events import Reuse

MAX_EVENT_BYTES = 1024 * 1024
MAX_STREAM_CHARS = 256
MAX_BATCH_EVENTS = 1024


class NewEvent(msgspec.Struct, frozen=True):
    """An event to append. `event_id` makes the append idempotent: the same id is written once."""

    event_id: str
    kind: str
    body: bytes

    def __post_init__(self) -> None:
        if not 1 <= len(self.event_id) <= MAX_STREAM_CHARS or not 1 <= len(self.kind) <= 64:
            raise InvalidInput(f"an event id has 1 to {MAX_STREAM_CHARS} characters, a kind 1 to 64", "event_id")
        if len(self.body) > MAX_EVENT_BYTES:
            raise InvalidInput(f"an event body has at most {MAX_EVENT_BYTES} bytes", "body")


class Append(msgspec.Struct, frozen=True):
    """Events for one stream, appended only if the stream is at `expected` (None: wherever it is). 0 is the empty
    stream.
    """

    stream: str
    events: tuple[NewEvent, ...]
    expected: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.stream) <= MAX_STREAM_CHARS:
            raise InvalidInput(f"a stream name has 1 to {MAX_STREAM_CHARS} characters", "stream")
        if not 1 <= len(self.events) <= MAX_BATCH_EVENTS:
            raise InvalidInput(f"an append has 1 to {MAX_BATCH_EVENTS} events", "events")


class StoredEvent(msgspec.Struct, frozen=True):
    """An event as it was written. `version` is its place in its stream (from 1), `position` its place in the
    journal.
    """

    position: int
    stream: str
    version: int
    event_id: str
    kind: str
    body: bytes
    recorded_at: float


class LineageFact(msgspec.Struct, frozen=True, omit_defaults=True):
    """What happened to one request: ids, lengths, hashes and times, never content.

    `namespace_id` is a public 16-hex-digit name of the tenant's namespace, not the namespace. `prompt_hash` is BLAKE3
    over the prompt's token ids keyed by the namespace, so equal prompts of one tenant can be matched and nothing else.
    `reuse` says by tier where reused state came from, where there is a block store.
    """

    request_id: str
    api: str
    model: str
    namespace_id: str
    weights: str
    prompt_hash: str
    prompt_tokens: int
    cached_tokens: int
    cached_blocks: int
    output_tokens: int
    outcome: str
    status: int
    received_at: float
    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    preemptions: int
    seed: int
    traceparent: str = ""
    logits_digest: str = ""
    error: str = ""
    reuse: Reuse | None = None
