"""What client and daemon say to each other: msgpack frames of fixed schemas, with caps on every length.

    client                                  daemon
    Hello (version, role, token)       ->
                                       <-   Welcome (epoch, what will be shared), or Refused and the end
    Attach + its window and its area   ->
                                       <-   the arena's regions and the generation table
    any request                        ->
                                       <-   its answer, with the same number
    Release, HintAsk                   ->   (no answer)

Payloads never go through the socket. A client's *window* carries what it writes, its *area* what the daemon reads from
the log for it; both are the client's memory, sized and sealed by it. The first frame is a `Hello` in every version: who
speaks another one is told so.
"""

from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta

from isthmus.contracts.blocks import (
    DIGEST_BYTES,
    ID_BYTES,
    MAX_BATCH,
    MAX_CHUNKS,
    MAX_RECORD_BYTES,
    Erasure,
    HintKind,
    Lifetime,
    Reason,
    RecordKind,
    Shape,
    StoreStats,
    Tier,
)
from isthmus.contracts.framing import frame
from isthmus.contracts.keys import KEY_BYTES
from isthmus.state.kv.upkeep import Checked, Kept

VERSION = 1
TOKEN_BYTES = 32
SECRET_BYTES = 32
ENGINE, ADMIN = "engine", "admin"
ROLES = (ENGINE, ADMIN)

HELLO_BYTES = 4096
REQUEST_BYTES = 16 << 20
ANSWER_BYTES = 32 << 20
DETAIL_BYTES = 4 << 20
"""Digests in one frame: requests that would need more are cut, leases name the rest without them."""
MAX_WINDOW_BYTES = 1 << 30
MAX_REGIONS = 65_536
MAX_LISTED = 1024
MAX_SECONDS = 86_400.0
"""Limits of calls, leases and hints in a frame. Within it there is nothing that is no number, and no wait overflows."""

Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
Keys = Annotated[list[Key], Meta(max_length=MAX_BATCH)]
Token = Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
Digests = Annotated[bytes, Meta(max_length=MAX_CHUNKS * DIGEST_BYTES)]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Chunks = Annotated[int, Meta(ge=1, le=MAX_CHUNKS)]
Size = Annotated[int, Meta(ge=1, le=MAX_RECORD_BYTES)]
Offset = Annotated[int, Meta(ge=0, le=MAX_WINDOW_BYTES)]
Seconds = Annotated[float, Meta(ge=-1.0, le=MAX_SECONDS)]
Text = Annotated[str, Meta(max_length=1024)]


def seconds(value: float) -> float:
    """`value` as it may be said in a frame: what is no number is in the past, for ever is a day."""
    return min(max(-1.0, value), MAX_SECONDS)


def derive_token(secret: bytes, role: str) -> bytes:
    """What proves that the bearer may act as `role` (`engine`: blocks; `admin`: everything)."""
    return blake3(frame(b"isthmus/store-token/v1", role.encode()), key=secret).digest()


class Hello(msgspec.Struct, frozen=True):
    """The first frame. `session`: what `Welcome` gave another connection of the same client; they share leases."""

    version: int
    role: Text = ENGINE
    token: bytes = b""
    session: bytes = b""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to `Hello`. Sizes in bytes: of each region of the arena, and of its generation table."""

    version: int
    epoch: bytes
    session: bytes
    regions: Annotated[list[Size], Meta(max_length=MAX_REGIONS)]
    table_bytes: Count
    lease_s: float
    call_s: float


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A request (or the client, in place of a `Welcome`) is not served: a code of the error tree, and words."""

    number: int
    code: Text
    message: Text


class Attach(msgspec.Struct, frozen=True):
    """The client's memory: the descriptors follow."""

    window_bytes: Offset
    area_bytes: Offset


class Form(msgspec.Struct, frozen=True, array_like=True):
    """A `Shape`."""

    kind: RecordKind
    chunks: Chunks
    chunk_bytes: Size

    @staticmethod
    def of(shape: Shape) -> "Form":
        """The form of a shape."""
        return Form(shape.kind, shape.chunks, shape.chunk_bytes)

    def shape(self) -> Shape:
        """The shape. Raises `InvalidInput`."""
        return Shape(self.kind, self.chunks, self.chunk_bytes)


class PutPart(msgspec.Struct, frozen=True, array_like=True):
    """A record at `offset` in the window, with the digests of its chunks there."""

    key: Key
    parent: Key | None
    namespace_id: Id
    session_id: Id
    form: Form
    lifetime: Lifetime
    digests: Digests
    offset: Offset


class WantPart(msgspec.Struct, frozen=True, array_like=True):
    """Chunks of a leased record, to be put at `offset` in the area."""

    key: Key
    form: Form
    first_chunk: Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]
    count: Chunks
    offset: Offset


class HintPart(msgspec.Struct, frozen=True, array_like=True):
    """A `Hint`."""

    kind: HintKind
    keys: Keys
    seconds: Seconds


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """Outcomes of reads that the client did by itself, for the daemon's counts."""

    tier: Tier | None
    reason: Reason
    count: Annotated[int, Meta(ge=1, le=1 << 32)]


class MatchAsk(msgspec.Struct, frozen=True, tag="match"):
    """`BlockStore.match`."""

    number: int
    keys: Keys


class LeaseAsk(msgspec.Struct, frozen=True, tag="lease"):
    """`BlockStore.lease`."""

    number: int
    keys: Keys
    seconds: Seconds


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Leases that are not needed any more, and what was read under them. Without an answer."""

    leases: Annotated[list[int], Meta(max_length=MAX_BATCH)]
    seen: Annotated[list[Seen], Meta(max_length=256)] = []


class ReadAsk(msgspec.Struct, frozen=True, tag="read"):
    """`BlockStore.read`, into the area."""

    number: int
    lease: int
    wants: Annotated[list[WantPart], Meta(max_length=MAX_BATCH)]
    timeout_s: Seconds


class WriteAsk(msgspec.Struct, frozen=True, tag="write"):
    """`BlockStore.write`, from the window."""

    number: int
    puts: Annotated[list[PutPart], Meta(max_length=MAX_BATCH)]
    timeout_s: Seconds


class HintAsk(msgspec.Struct, frozen=True, tag="hint"):
    """`BlockStore.hint`. Without an answer."""

    hints: Annotated[list[HintPart], Meta(max_length=MAX_BATCH)]


class FlushAsk(msgspec.Struct, frozen=True, tag="flush"):
    """`BlockStore.flush`."""

    number: int
    timeout_s: Seconds


class StatsAsk(msgspec.Struct, frozen=True, tag="stats"):
    """`BlockStore.stats`."""

    number: int


class ForgetAsk(msgspec.Struct, frozen=True, tag="forget"):
    """Erase a namespace, or one session of it (`NO_SESSION`: all of it). For the role `admin`, as all that follow."""

    number: int
    namespace_id: Id
    session_id: Id


class EvictAsk(msgspec.Struct, frozen=True, tag="evict"):
    """Evict `size` bytes from a tier."""

    number: int
    tier: Tier
    size: Count
    timeout_s: Seconds


class VerifyAsk(msgspec.Struct, frozen=True, tag="verify"):
    """Verify everything that is kept, for at most `timeout_s`."""

    number: int
    timeout_s: Seconds


class CompactAsk(msgspec.Struct, frozen=True, tag="compact"):
    """Rewrite what is left of segments that hold little."""

    number: int
    timeout_s: Seconds


class ListAsk(msgspec.Struct, frozen=True, tag="list"):
    """Records of a tier, from the `skip`th on."""

    number: int
    tier: Tier
    skip: Count
    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED)]


Asked = (
    MatchAsk | LeaseAsk | ReadAsk | WriteAsk | FlushAsk | StatsAsk
    | ForgetAsk | EvictAsk | VerifyAsk | CompactAsk | ListAsk
)  # fmt: skip
Request = Asked | Release | HintAsk


class Found(msgspec.Struct, frozen=True, array_like=True):
    """A `Match`."""

    tier: Tier | None
    record_bytes: Count


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a leased record lies in the arena: readable there while cell `page` of the table is `generation`."""

    region: Count
    offset: Count
    page: Count
    generation: Count
    form: Form
    digests: Digests


class Given(msgspec.Struct, frozen=True, array_like=True):
    """One key of a lease. Without a `place` it is read through the area."""

    tier: Tier | None
    place: Place | None


class Result(msgspec.Struct, frozen=True, array_like=True):
    """An `Outcome`; of a read that is a hit, the digests of the chunks in the area."""

    reason: Reason
    tier: Tier | None
    sequence: Count
    digests: Digests = b""


class Matches(msgspec.Struct, frozen=True, tag="matches"):
    """To `MatchAsk`."""

    number: int
    found: Annotated[list[Found], Meta(max_length=MAX_BATCH)]


class Leased(msgspec.Struct, frozen=True, tag="leased"):
    """To `LeaseAsk`. `seconds`: what was granted."""

    number: int
    lease: int
    seconds: float
    given: Annotated[list[Given], Meta(max_length=MAX_BATCH)]


class Results(msgspec.Struct, frozen=True, tag="results"):
    """To `ReadAsk` and `WriteAsk`."""

    number: int
    results: Annotated[list[Result], Meta(max_length=MAX_BATCH)]


class Durable(msgspec.Struct, frozen=True, tag="durable"):
    """To `FlushAsk`."""

    number: int
    sequence: Count


class Stats(msgspec.Struct, frozen=True, tag="statistics"):
    """To `StatsAsk`."""

    number: int
    stats: StoreStats


class Forgotten(msgspec.Struct, frozen=True, tag="forgotten"):
    """To `ForgetAsk`."""

    number: int
    erasure: Erasure


class Freed(msgspec.Struct, frozen=True, tag="freed"):
    """To `EvictAsk` (bytes) and `CompactAsk` (segments)."""

    number: int
    count: Count


class Verified(msgspec.Struct, frozen=True, tag="verified"):
    """To `VerifyAsk`."""

    number: int
    checked: Checked


class Listed(msgspec.Struct, frozen=True, tag="listed"):
    """To `ListAsk`."""

    number: int
    entries: Annotated[list[Kept], Meta(max_length=MAX_LISTED)]


Answer = Welcome | Refused | Matches | Leased | Results | Durable | Stats | Forgotten | Freed | Verified | Listed
