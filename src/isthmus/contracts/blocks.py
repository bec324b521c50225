"""What the block store keeps, and the port through which engines use it.

A *record* is one block or one state snapshot in its canonical layout (layout.py): `chunks` layer chunks of equal size.
Promises of every implementation of `BlockStore`

- bytes become visible only after the whole key, the length, the generation and the digest of every chunk read matched
on the reader's own copy; anything else is an `Outcome` with another reason than `HIT`, and what then lies in the
caller's buffer means nothing;
- a record written is *visible* when `write` returns `STORED`, and *durable* once `flush` gives a watermark at or over
its sequence number, or by itself after the store's commit interval;
- no call waits longer than its own limit; a store that is gone answers `UNAVAILABLE`, never an exception and never
nothing at all.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import msgspec
from blake3 import blake3

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.framing import frame
from isthmus.contracts.ids import Namespace
from isthmus.contracts.keys import KEY_BYTES, BlockKey

ID_BYTES = 16
NO_SESSION = bytes(ID_BYTES)
DIGEST_BYTES = 16
MAX_CHUNKS = 65_536
MAX_RECORD_BYTES = 1 << 30
MAX_BATCH = 4096
MAX_SESSION_CHARS = 256


class RecordKind(enum.IntEnum):
    """What a record holds."""

    BLOCK = 1
    STATE = 2


class Tier(enum.StrEnum):
    """Where state lies, fastest first."""

    DEVICE = "device"
    DRAM = "dram"
    NVME = "nvme"
    REMOTE = "remote"


class Lifetime(enum.IntEnum):
    """How long a record is expected to be wanted: records of one class share segments of the log."""

    SHORT = 0
    """Of a request that said it is done, or of a kind that is rarely wanted again."""
    SESSION = 1
    """Of a conversation: wanted by its next turn."""
    SHARED = 2
    """Of a prefix that several requests have used."""


class Reason(enum.StrEnum):
    """Why a read, a write or a lease came out as it did. Stable names: metrics and `explain` carry them."""

    HIT = "hit"
    STORED = "stored"
    PRESENT = "present"
    """Not written: the store holds the key already."""
    ABSENT = "absent"
    EXPIRED = "expired"
    """The lease ended before the read did."""
    CORRUPT = "corrupt"
    """Key, length, generation or digest did not match: the record is quarantined."""
    IO_ERROR = "io_error"
    FULL = "full"
    """Nothing could be evicted for it, or a bounded queue is full."""
    QUOTA = "quota"
    WEAR = "wear"
    """Visible in DRAM, not worth the wear of NVMe."""
    TOO_LARGE = "too_large"
    FORGOTTEN = "forgotten"
    LATE = "late"
    """Not finished within the call's limit."""
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a record is, by public ids (not the namespace itself): what quotas and erasure go by."""

    namespace_id: bytes
    session_id: bytes = NO_SESSION

    def __post_init__(self) -> None:
        if len(self.namespace_id) != ID_BYTES or len(self.session_id) != ID_BYTES:
            raise InvalidInput(f"an owner's ids have {ID_BYTES} bytes each", "owner")


def namespace_id(namespace: Namespace) -> bytes:
    """The public id of a namespace; its first 8 bytes in hex are `LineageFact.namespace_id`."""
    return blake3(namespace).digest(ID_BYTES)


def session_id(namespace: Namespace, session: str) -> bytes:
    """The public id of a tenant's session called `session`; `NO_SESSION` for the empty name."""
    if not session:
        return NO_SESSION
    if len(session) > MAX_SESSION_CHARS:
        raise InvalidInput(f"a session has at most {MAX_SESSION_CHARS} characters", "session")
    return blake3(frame(b"isthmus/session-id/v1", session.encode()), key=namespace).digest(ID_BYTES)


@dataclass(frozen=True, slots=True)
class Shape:
    """The form of a record: `chunks` layer chunks of `chunk_bytes` each, one after the other."""

    kind: RecordKind
    chunks: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.chunks <= MAX_CHUNKS:
            raise InvalidInput(f"a record has 1 to {MAX_CHUNKS} chunks, not {self.chunks}", "chunks")
        if self.chunk_bytes < 1 or self.chunks * self.chunk_bytes > MAX_RECORD_BYTES:
            raise InvalidInput(f"a record has 1 to {MAX_RECORD_BYTES} bytes", "chunk_bytes")

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record."""
        return self.chunks * self.chunk_bytes


@dataclass(frozen=True, slots=True)
class Put:
    """A record to write. `payload` (contiguous bytes, `shape.record_bytes` long) is copied before `write` returns.

    `parent` is the key of the block before it in its sequence (None: the first): retention takes leaves first.
    """

    key: BlockKey
    parent: BlockKey | None
    owner: Owner
    shape: Shape
    payload: memoryview
    lifetime: Lifetime = Lifetime.SESSION

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES or (self.parent is not None and len(self.parent) != KEY_BYTES):
            raise InvalidInput(f"a key has {KEY_BYTES} bytes", "key")
        if self.payload.nbytes != self.shape.record_bytes:
            size, expected = self.payload.nbytes, self.shape.record_bytes
            raise InvalidInput(f"the payload has {size} bytes, its shape says {expected}", "payload")
        if not self.payload.c_contiguous:
            raise InvalidInput("the bytes of the payload do not lie in a row", "payload")


@dataclass(frozen=True, slots=True)
class Match:
    """Where a key was found; `tier` None: nowhere. A match promises nothing: only a read does."""

    tier: Tier | None
    record_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Want:
    """Chunks of a leased record, to be read into `into` (writable, contiguous, exactly as long as they are)."""

    key: BlockKey
    shape: Shape
    into: memoryview
    first_chunk: int = 0
    chunks: int | None = None
    """None: all from `first_chunk` on."""

    def __post_init__(self) -> None:
        count = self.shape.chunks - self.first_chunk if self.chunks is None else self.chunks
        if self.first_chunk < 0 or count < 1 or self.first_chunk + count > self.shape.chunks:
            raise InvalidInput("the chunks wanted do not exist", "chunks")
        if self.into.readonly or self.into.nbytes != count * self.shape.chunk_bytes:
            raise InvalidInput(f"the buffer has {self.into.nbytes} bytes, or cannot be written to", "into")
        if not self.into.c_contiguous:
            raise InvalidInput("the bytes of the buffer do not lie in a row", "into")

    @property
    def count(self) -> int:
        """How many chunks are wanted."""
        return self.shape.chunks - self.first_chunk if self.chunks is None else self.chunks


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one record of a batch. `tier` is where it was read from or written to, `sequence` (writes) is
    what a watermark is compared with; 0 for what never goes to the log.
    """

    reason: Reason
    tier: Tier | None = None
    sequence: int = 0


class HintKind(enum.StrEnum):
    """What a request's client, or the runtime, says about the future of some state."""

    TURN_ENDED = "turn_ended"
    """The conversation waits for a person."""
    WAITING = "waiting"
    """Back in about `seconds`, when a tool has ended."""
    DONE = "done"
    """Not wanted again."""
    PIN = "pin"
    """Keep for `seconds`."""
    PREFETCH = "prefetch"
    """Wanted soon: bring it to DRAM."""


@dataclass(frozen=True, slots=True)
class Hint:
    """A hint about records, by keys in their order in the sequence. Advice: nothing depends on its being taken."""

    kind: HintKind
    keys: Sequence[BlockKey]
    seconds: float = 0.0


class Erasure(msgspec.Struct, frozen=True):
    """A scope that was forgotten: what is left of it in an engine has to go too. `number` counts from 1 without gaps;
    an empty `session_id` means the whole namespace.
    """

    number: int
    namespace_id: bytes
    session_id: bytes


class TierStats(msgspec.Struct, frozen=True):
    """One tier now: capacity and what is used of it in bytes, and records."""

    tier: str
    capacity: int
    used: int
    records: int


class StoreStats(msgspec.Struct, frozen=True):
    """A snapshot of a store. `counts` by `<operation>_<tier>_<reason>` (e.g. `read_nvme_hit`) since the start; `gauges`
    are other named figures (`durable_lag_s`, `write_amplification`, ...). `erasures`: the newest ones, oldest first.
    `backend` says how the disk is driven, and why not by io_uring when it is not.
    """

    epoch: bytes = b""
    tiers: tuple[TierStats, ...] = ()
    counts: dict[str, int] = {}
    gauges: dict[str, float] = {}
    sequence: int = 0
    durable: int = 0
    erasures: tuple[Erasure, ...] = ()
    backend: str = ""


class Lease(Protocol):
    """The right to read some records until a deadline. Release it; one that is not ends by itself."""

    @property
    def granted(self) -> Sequence[Tier | None]:
        """Where each of the keys asked for lies; None: it is not here (any more), and not leased."""
        ...

    def release(self) -> None:
        """Give it back. May be called twice."""
        ...

    def __enter__(self) -> "Lease":
        """The lease itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it."""
        ...


class BlockStore(Protocol):
    """A tiered store of records by BlockKey, in this process or behind a socket. Safe to call from several threads.

    Batches have at most `MAX_BATCH` entries; results are in the order of what was asked.
    """

    def match(self, keys: Sequence[BlockKey]) -> list[Match]:
        """Where each key is. The store may have holes: the usable prefix ends at the first miss."""
        ...

    def lease(self, keys: Sequence[BlockKey], seconds: float) -> Lease:
        """Hold those of `keys` that are here for at most `seconds` (the store caps it)."""
        ...

    def read(self, lease: Lease, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        """Read leased records, verified, into the caller's buffers."""
        ...

    def write(self, puts: Sequence[Put], timeout_s: float) -> list[Outcome]:
        """Take records in. Each is visible when its outcome is `STORED`."""
        ...

    def hint(self, hints: Sequence[Hint]) -> None:
        """Pass on what is known about the future. Never fails."""
        ...

    def flush(self, timeout_s: float) -> int:
        """Make durable what was written before the call; the watermark reached when it ends or the time is over."""
        ...

    def stats(self) -> StoreStats:
        """A snapshot; the last one known when the store cannot be asked."""
        ...
