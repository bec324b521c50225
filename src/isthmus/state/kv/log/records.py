"""What goes into the log and what is asked of it."""

from dataclasses import dataclass

import msgspec

from isthmus.contracts.blocks import DIGEST_BYTES, Lifetime, Owner, Shape, Want
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.keys import KEY_BYTES


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record may be: a candidate of the index. `slot` counts 64 bytes from the segment's start."""

    segment: int
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A record to append. `digests`: of each chunk of `payload`, one after the other (hashing.py); none: the log makes
    them of its own copy, while it copies. `hits`: how often it was read so far, for admission.
    """

    key: bytes
    parent: bytes | None
    owner: Owner
    shape: Shape
    lifetime: Lifetime
    digests: bytes
    payload: memoryview
    hits: int = 0

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES or (self.parent is not None and len(self.parent) != KEY_BYTES):
            raise InvalidInput(f"a key has {KEY_BYTES} bytes", "key")
        if self.digests and len(self.digests) != DIGEST_BYTES * self.shape.chunks:
            raise InvalidInput(f"a record has {DIGEST_BYTES} bytes of digest for each chunk, or none", "digests")
        if self.payload.nbytes != self.shape.record_bytes or not self.payload.contiguous:
            raise InvalidInput(f"the payload is {self.shape.record_bytes} bytes in a row", "payload")


@dataclass(frozen=True, slots=True)
class LogRead:
    """Chunks wanted of the record that `location` says, or of another candidate with the same key."""

    location: Location
    want: Want


class LogEntry(msgspec.Struct, frozen=True):
    """A record that the log holds, for people and for audits."""

    key: bytes
    owner: Owner
    shape: Shape
    lifetime: Lifetime
    sequence: int
    segment: int
    parent: bytes | None = None


class Verified(msgspec.Struct, frozen=True):
    """How a verification of everything went: records that are what they should be, that are not (nobody finds them any
    more), and that could not be read.
    """

    good: int = 0
    corrupt: int = 0
    unreadable: int = 0


class LogStats(msgspec.Struct, frozen=True):
    """A snapshot of the log. `counts` since it was opened; bytes and seconds. `used`: bytes of records that can be
    found; `segments` by state; `classes`: segments that hold something, by class.
    """

    capacity: int = 0
    used: int = 0
    records: int = 0
    sequence: int = 0
    durable: int = 0
    lag_bytes: int = 0
    lag_s: float = 0.0
    taken_bytes: int = 0
    written_bytes: int = 0
    write_amplification: float = 0.0
    segments: dict[str, int] = {}
    classes: dict[str, int] = {}
    counts: dict[str, int] = {}
    index_bytes: int = 0
    pins: int = 0
    erasure_epoch: int = 0
    erasures_pending: int = 0
    read_only: str = ""
