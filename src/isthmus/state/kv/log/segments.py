"""The table of segments: what each is for, what is in it, which goes next. Pure: no I/O, no locks, time is an argument.

    FREE ──take──> PREPARED ──header durable──> READY ──start──> OPEN ──close──> CLOSING ──footer durable──> SEALED
      ^               │                           │               │                │                            │
      │               └───────────────┬───────────┴───────────────┴────────────────┘                            │
      │                               v  a write or a sync failed                                               │
      │                            RETIRED                                                                      │
      └──release: its survivors are durable elsewhere, nothing in the index points to it, nothing pins it───────┘

Promises: a generation is given out once (FREE to PREPARED adds one to it); only READABLE segments can be pinned, and a
pinned one is not released; a RETIRED one is written and reused by nobody before a restart has looked at it again.
"""

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from isthmus.contracts.blocks import ID_BYTES, Lifetime
from isthmus.contracts.errors import StoreError
from isthmus.state.kv.log.format import ENTRY_BYTES, SECTOR, SLOT, SURVIVORS, Rows, footer_bytes, spans_of

RESERVED = 1
"""Free segments that only survivors may take: without them nothing could be evicted, so nothing would get free."""
LEAST = RESERVED + 2
"""Segments that a log can work with: one of survivors, the reserved one, and one to write to. With fewer, survivors
would be moved round for ever and nothing else get a segment.
"""
NEVER = 1 << 62
_PAGE = 4096
_HALF_LIFE = {Lifetime.SHORT: 0.25, Lifetime.SESSION: 1.0, Lifetime.SHARED: 2.0, SURVIVORS: 2.0}
_BASE = {Lifetime.SHORT: 0.05, Lifetime.SESSION: 0.3, Lifetime.SHARED: 0.6, SURVIVORS: 0.6}


class SegmentsCorrupt(StoreError):
    """The table of segments contradicts itself: a bug in Isthmus, never caused by what is on the disk."""


class State(enum.IntEnum):
    """See the module's picture."""

    FREE = 0
    PREPARED = 1
    READY = 2
    OPEN = 3
    CLOSING = 4
    SEALED = 5
    RETIRED = 6


READABLE = frozenset({State.OPEN, State.CLOSING, State.SEALED, State.RETIRED})
BUSY = frozenset({State.PREPARED, State.READY, State.OPEN, State.CLOSING})
_BEFORE = {
    State.FREE: {State.SEALED},
    State.PREPARED: {State.FREE},
    State.READY: {State.PREPARED},
    State.OPEN: {State.READY},
    State.CLOSING: {State.OPEN},
    State.SEALED: {State.CLOSING},
    State.RETIRED: {State.PREPARED, State.READY, State.OPEN, State.CLOSING, State.SEALED},
}


@dataclass(slots=True)
class Segment:
    """One segment. `end`: where its next extent goes, an offset in it. `usage`: bytes by namespace of all that was
    written; `live_bytes`: of what still counts. `dirty`: bytes behind `end` may be those of an earlier generation.
    """

    index: int
    size: int
    generation: int = 0
    state: State = State.FREE
    lane: int = 0
    opened: float = 0.0
    """Wall clock, seconds."""
    born: int = 0
    """Bytes that had been written to the log when it was opened."""
    first_sequence: int = 0
    end: int = SECTOR
    records: int = 0
    extents: int = 0
    live_bytes: int = 0
    live_records: int = 0
    hit_bytes: int = 0
    usage: dict[bytes, int] = field(default_factory=dict)
    lowest_stamp: int = NEVER
    pins: int = 0
    dirty: bool = True
    fenced: bool = False
    """No new extents: what lies behind `end` is being zeroed."""
    ticket: int = 0
    """When its header (PREPARED) or footer (CLOSING) was written; 0: not yet."""
    rows: list[Rows] | None = None
    """The directory, extent by extent, until it is sealed."""
    footer: int = 0
    """Where its footer begins; 0: it has none that is durable."""
    unread: bool = False
    """What is in it could not be read at the start: nothing of it is known."""
    _hits: bytearray | None = None

    def hit(self, slot: int, size: int) -> None:
        """A record of `size` bytes at `slot` was read."""
        if self._hits is None:
            self._hits = bytearray(-(-self.size // (8 * _PAGE)))
        page = slot * SLOT // _PAGE
        if not self._hits[page >> 3] & 1 << (page & 7):
            self._hits[page >> 3] |= 1 << (page & 7)
            self.hit_bytes += max(size, _PAGE)

    def was_hit(self, rows: Rows) -> NDArray[np.bool_]:
        """Which records were read since they were written, to the page: small neighbours count as one."""
        if self._hits is None:
            return np.zeros(len(rows), np.bool_)
        pages = rows["slot"].astype(np.int64) * SLOT // _PAGE
        bits = np.frombuffer(self._hits, np.uint8)[pages >> 3] >> (pages & 7).astype(np.uint8)
        was: NDArray[np.bool_] = (bits & 1).astype(np.bool_)
        return was

    @property
    def hit_part(self) -> float:
        """About what part of its bytes was read since they were written."""
        written = self.end - SECTOR
        return min(1.0, self.hit_bytes / written) if written > 0 else 0.0

    def fits(self, size: int, records: int, most_records: int) -> bool:
        """Whether an extent of `size` bytes goes in, with room left for the footer."""
        count = self.records + records
        return count <= most_records and self.end + size + footer_bytes(count) <= self.size

    def note(self, rows: Rows, sign: int = 1) -> None:
        """Records of one extent are in it (or, `sign` -1, are not after all)."""
        for name, total in usage_by_namespace(rows).items():
            left = self.usage.get(name, 0) + sign * total
            if left:
                self.usage[name] = left
            else:
                self.usage.pop(name, None)
        if sign > 0:
            self.lowest_stamp = min(self.lowest_stamp, int(rows["stamp"].min()))

    def alive(self, records: int, size: int) -> None:
        """So many more (or, negative, fewer) of its records count."""
        self.live_records += records
        self.live_bytes += size


def usage_by_namespace(rows: Rows) -> dict[bytes, int]:
    """Bytes of whole records by namespace."""
    spans = spans_of(rows)
    if not len(rows):
        return {}
    first = rows["namespace"][0]
    if (rows["namespace"] == first).all():
        return {first.tobytes(): int(spans.sum())}
    flat = np.ascontiguousarray(rows["namespace"]).view(f"S{ID_BYTES}").ravel()
    names, where = np.unique(flat, return_inverse=True)
    sums = np.bincount(where, weights=spans)
    return {bytes(name).ljust(ID_BYTES, b"\0"): int(size) for name, size in zip(names, sums, strict=True)}


def worth(segment: Segment, written: int, capacity: int) -> float:
    """What keeping a segment promises: least goes first. `written`: bytes written to the log so far.

    Reuse expected of its class, raised by the part of it that was read, for the part of it that still counts; halved
    with every half-life. Age is counted in turnovers of the whole log, so that a busy log and a quiet one behave alike:
    what is hot in an old segment is carried on by survivors (as in CLOCK), not by keeping all of it.
    """
    reuse = _BASE[segment.lane] + segment.hit_part
    age = max(0, written - segment.born) / capacity
    return float(reuse * segment.live_bytes / segment.size * 0.5 ** min(60.0, age / _HALF_LIFE[segment.lane]))


class SegmentTable:
    """All segments of a log. `most_records`: of one segment, so that its footer is one write."""

    def __init__(self, count: int, size: int, most_records: int) -> None:
        self.all = [Segment(index, size) for index in range(count)]
        self.size = size
        self.most_records = most_records
        self._free: deque[int] = deque()
        self._states: dict[State, set[int]] = {state: set() for state in State}
        for index in range(count):
            self._states[State.FREE].add(index)
            self._free.append(index)

    def __getitem__(self, index: int) -> Segment:
        return self.all[index]

    def __len__(self) -> int:
        return len(self.all)

    def count(self, state: State) -> int:
        """How many are in a state."""
        return len(self._states[state])

    def having(self, *states: State) -> list[Segment]:
        """Those in one of these states, by index."""
        return [self.all[index] for index in sorted(set[int]().union(*(self._states[state] for state in states)))]

    def move(self, segment: Segment, state: State) -> None:
        """To the next state. Raises `SegmentsCorrupt` when the picture has no such arrow."""
        if segment.state not in _BEFORE[state]:
            raise SegmentsCorrupt(f"segment {segment.index} goes from {segment.state.name} to {state.name}")
        self._place(segment, state)

    def _place(self, segment: Segment, state: State) -> None:
        self._states[segment.state].discard(segment.index)
        segment.state = state
        self._states[state].add(segment.index)
        if state is State.FREE:
            self._free.append(segment.index)

    def recovered(self, segment: Segment, state: State) -> None:
        """What a segment turned out to be when the log was opened."""
        if segment.state is State.FREE:
            self._free.remove(segment.index)
        self._place(segment, state)

    def take(self, lane: int) -> Segment | None:
        """The segment that was free for the longest, for a new generation; None when there is none for this lane."""
        if len(self._free) <= (0 if lane == SURVIVORS else RESERVED):
            return None
        segment = self.all[self._free.popleft()]
        segment.lane = lane
        segment.generation += 1
        segment.ticket = 0
        self.move(segment, State.PREPARED)
        return segment

    def allocate(self, segment: Segment, size: int, records: int) -> tuple[int, int]:
        """Room for an extent that `fits`: its offset in the segment, and its ordinal."""
        if segment.state is not State.OPEN or not segment.fits(size, records, self.most_records):
            raise SegmentsCorrupt(f"segment {segment.index} has no room for an extent of {size} bytes")
        place = segment.end, segment.extents
        segment.end += size
        segment.records += records
        segment.extents += 1
        return place

    def release(self, segment: Segment) -> None:
        """A sealed segment is free. Raises `SegmentsCorrupt` when it is pinned."""
        if segment.pins:
            raise SegmentsCorrupt(f"segment {segment.index} is released with {segment.pins} pins")
        self.move(segment, State.FREE)
        clean = Segment(segment.index, segment.size, segment.generation)
        for name in ("lane", "opened", "born", "end", "records", "extents", "live_bytes", "live_records"):
            setattr(segment, name, getattr(clean, name))
        segment.hit_bytes, segment._hits = 0, None  # noqa: SLF001 - its own kind
        segment.usage, segment.lowest_stamp, segment.dirty, segment.rows = {}, NEVER, True, None
        segment.ticket = segment.footer = 0

    def pin(self, index: int, generation: int) -> bool:
        """Keep a segment from being reused; whether it still is what it was."""
        if not 0 <= index < len(self.all):
            return False
        segment = self.all[index]
        if segment.generation != generation or segment.state not in READABLE:
            return False
        segment.pins += 1
        return True

    def unpin(self, index: int) -> None:
        """Undo one `pin`."""
        if self.all[index].pins < 1:
            raise SegmentsCorrupt(f"segment {index} is unpinned more often than pinned")
        self.all[index].pins -= 1

    def victims(self, written: int) -> Iterator[Segment]:
        """Sealed segments that nothing pins, the least worth first (see `worth`)."""
        sealed = [segment for segment in self.having(State.SEALED) if not segment.pins]
        capacity = len(self.all) * self.size
        yield from sorted(sealed, key=lambda one: (worth(one, written, capacity), one.opened, one.index))

    def check(self) -> None:
        """Raise `SegmentsCorrupt` unless every segment is in exactly one state, counted anew, and within its size."""
        if sorted(self._free) != sorted(self._states[State.FREE]):
            raise SegmentsCorrupt("the free list does not hold the free segments")
        if sum(len(indexes) for indexes in self._states.values()) != len(self.all):
            raise SegmentsCorrupt("a segment is in no state, or in two")
        for segment in self.all:
            if segment.index not in self._states[segment.state]:
                raise SegmentsCorrupt(f"segment {segment.index} is not where its state says")
            if segment.pins < 0 or (segment.pins and segment.state not in READABLE):
                raise SegmentsCorrupt(f"segment {segment.index} has {segment.pins} pins as {segment.state.name}")
            if segment.end > segment.size or min(segment.live_bytes, segment.live_records) < 0:
                raise SegmentsCorrupt(f"segment {segment.index} holds more or less than it can")


def most_records(footer_room: int) -> int:
    """How many records a segment may have when its footer is to fit into `footer_room` bytes."""
    return (footer_room - SECTOR) // ENTRY_BYTES


def usage_of(segments: SegmentTable) -> dict[bytes, int]:
    """Bytes by namespace over all segments."""
    total: dict[bytes, int] = {}
    for segment in segments.all:
        for name, size in segment.usage.items():
            total[name] = total.get(name, 0) + size
    return total


def class_name(lane: int) -> str:
    """What people call a class of segments."""
    return "survivors" if lane == SURVIVORS else Lifetime(lane).name.lower()
