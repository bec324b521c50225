"""Records on their way to the disk: extents in aligned memory. No I/O, no locks but the buffers' own.

    FILLING ──full, or lingered──> CLOSED ──submitted──> WRITING ──completed──> WRITTEN ──synced──> DURABLE
                                     ^                                             │
                                     └────── its segment failed: once more ────────┘   (too often: LOST)

An extent keeps its memory until it is durable, so that it can be written again, elsewhere, when the disk turns out
not to have kept it. Memory is bounded: nothing is reserved when there is none, and the caller waits or refuses. A part
of it is for survivors alone, because evicting may need memory to make room.
"""

import enum
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from isthmus.state.kv.arena.copying import PART_BYTES, copy, copy_digest, copy_digests
from isthmus.state.kv.arena.crew import Crew, together
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.log.format import (
    CLASSES,
    ENTRY,
    EXTENT_HEADER,
    RAW,
    ROW,
    SLOT,
    SURVIVORS,
    ExtentHeader,
    RecordHeader,
    Rows,
    align,
    encode_record,
    finish_record,
    payload_offset,
)
from isthmus.state.kv.log.segments import Segment

_SURVIVORS_SHARE = 4


class Stage(enum.IntEnum):
    """See the module's picture."""

    FILLING = 0
    CLOSED = 1
    WRITING = 2
    WRITTEN = 3
    DURABLE = 4
    LOST = 5


@dataclass(slots=True, eq=False)
class Extent:
    """Records of one class, as they will lie on the disk. `used`: bytes of header and records so far."""

    lane: int
    buffers: list[memoryview]
    first_sequence: int
    begun: float
    used: int = EXTENT_HEADER
    last_sequence: int = 0
    stage: Stage = Stage.FILLING
    copying: int = 0
    """Records that are reserved and not filled in yet: until 0 it is not written."""
    rows: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=list)
    segment: Segment | None = None
    at: int = 0
    """Where in its segment it lies."""
    ordinal: int = 0
    attempts: int = 0
    ticket: int = 0
    table: Rows | None = None
    """Its directory, with the slots where it was written."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return align(self.used)

    @property
    def records(self) -> int:
        """How many there are."""
        return len(self.starts)

    def placed(self) -> Rows:
        """Its directory, for where it lies now."""
        table = np.frombuffer(bytes(self.rows), ENTRY).copy()
        table["slot"] += self.at // SLOT
        return table

    def finish(self, seed: int) -> list[memoryview]:
        """Put in what depends on the segment; the memory to write, in order."""
        if self.segment is None:
            return []
        generation, size = self.segment.generation, self.size
        head = ExtentHeader(generation, self.first_sequence, self.ordinal, self.records, size).encode(seed)
        self.buffers[0][:EXTENT_HEADER] = head
        for start in self.starts:
            finish_record(self.buffers[0], start, generation, seed)
        _scatter(self.buffers, self.used, memoryview(bytes(size - self.used)))
        whole = len(self.buffers[0])
        return [view[: min(whole, size - number * whole)] for number, view in enumerate(self.buffers)]


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one record in an extent."""

    extent: Extent
    start: int


class Staging:
    """The extents in memory: one filling per class, and those that wait for the disk. They may take all of `buffers`
    that are free at the start. `crew` helps with large copies.
    """

    def __init__(self, buffers: AlignedBuffers, crew: Crew | None = None) -> None:
        self._buffers = buffers
        self._crew = crew
        self._size = buffers.size
        self._count = buffers.free
        self._reserved = max(1, self._count // _SURVIVORS_SHARE)
        self.filling: list[Extent | None] = [None] * CLASSES
        self.queues: list[deque[Extent]] = [deque() for _ in range(CLASSES)]
        self.starved = False
        """Somebody waits for memory."""

    @property
    def largest_span(self) -> int:
        """The longest record that can ever be taken."""
        return (self._count - self._reserved) * self._size - EXTENT_HEADER

    @property
    def free(self) -> int:
        """Bytes of memory that are not in use."""
        return self._buffers.free * self._size

    def head_fits(self, chunks: int) -> bool:
        """Whether header and digests of a record fit into the first buffer of an extent."""
        return EXTENT_HEADER + payload_offset(chunks) <= self._size

    def reserve(self, lane: int, header: RecordHeader, now: float) -> Slot | None:
        """Room for a record, at the end of its class's extent or in a new one; None when there is no memory for it.

        The caller fills it in with `fill`, then says so with `filled`.
        """
        span = header.span
        extent = self.filling[lane]
        if extent is not None and extent.used + span > self._size:
            self.close(lane)
            extent = None
        if extent is None:
            extent = self._begin(lane, EXTENT_HEADER + span, header.sequence, now)
            if extent is None:
                self.starved = True
                return None
        start = extent.used
        shape, owner = header.shape, header.owner
        extent.rows += ROW.pack(
            header.key,
            owner.namespace_id,
            owner.session_id,
            header.stamp,
            header.sequence,
            start // SLOT,
            shape.chunks,
            shape.chunk_bytes,
            shape.kind,
            RAW,
            header.lifetime,
            0,
        )
        extent.starts.append(start)
        extent.used += span
        extent.last_sequence = header.sequence
        extent.copying += 1
        if extent.used + span > self._size:
            # The next one is probably as long: why let the disk wait until it comes.
            self.close(lane)
        return Slot(extent, start)

    def _begin(self, lane: int, need: int, sequence: int, now: float) -> Extent | None:
        count = -(-align(need) // self._size)
        kept = 0 if lane == SURVIVORS else self._reserved
        if self._buffers.free - count < kept:
            return None
        taken = [view for _ in range(count) if (view := self._buffers.take()) is not None]
        if len(taken) < count:
            self._give(taken)
            return None
        extent = Extent(lane, taken, sequence, now)
        self.filling[lane] = extent
        return extent

    def fill(self, slot: Slot, header: RecordHeader, digests: bytes, payload: memoryview) -> None:
        """Copy a record to its room; digests that are not given are made of the copy. Needs no lock: nobody else writes
        there.
        """
        views, start = slot.extent.buffers, slot.start
        shape = header.shape
        at = start + payload_offset(shape.chunks)
        end = at + shape.record_bytes
        if digests:
            _scatter(views, at, payload, self._crew)
        else:
            digests = _scatter_hashed(views, at, payload, shape.chunk_bytes, self._crew)
        head = encode_record(header, digests) + digests
        views[0][start : start + len(head)] = head
        _scatter(views, start + len(head), memoryview(bytes(at - start - len(head))))
        _scatter(views, end, memoryview(bytes(start + header.span - end)))

    def close(self, lane: int) -> None:
        """The extent of this class takes no more."""
        extent = self.filling[lane]
        if extent is not None:
            self.filling[lane] = None
            extent.stage = Stage.CLOSED
            self.queues[lane].append(extent)

    def close_due(self, now: float, linger_s: float, up_to: int) -> None:
        """Close the extents that have lingered, and those with records up to sequence `up_to`."""
        for lane, extent in enumerate(self.filling):
            if extent is not None and (extent.first_sequence <= up_to or now - extent.begun >= linger_s):
                self.close(lane)

    def again(self, extent: Extent) -> None:
        """An extent has to be written once more, before others."""
        extent.stage = Stage.CLOSED
        extent.segment, extent.table, extent.ticket = None, None, 0
        self.queues[extent.lane].appendleft(extent)

    def recycle(self, extent: Extent) -> None:
        """Its memory is not needed any more."""
        self._give(extent.buffers)
        extent.buffers = []
        self.starved = False

    def _give(self, views: list[memoryview]) -> None:
        for view in views:
            self._buffers.give(view)


def _scatter(views: list[memoryview], at: int, data: memoryview, crew: Crew | None = None) -> None:
    """Copy `data` to the place `at` of several equal views that stand for one."""
    most = PART_BYTES if len(data) >= 2 * PART_BYTES else len(views[0])
    together(crew, lambda piece: copy(*piece), _pieces(views, at, data, most), len(data))


def _scatter_hashed(views: list[memoryview], at: int, data: memoryview, chunk_bytes: int, crew: Crew | None) -> bytes:
    """As `_scatter`; the digests of the chunks as they lie there now, one after the other."""
    if at + len(data) <= len(views[0]):
        return copy_digests(data, views[0][at : at + len(data)], chunk_bytes, crew)

    def chunk(begin: int) -> bytes:
        # Not in pieces for the core's cache: between two of them the interpreter's lock has to be got back.
        return copy_digest(_pieces(views, at + begin, data[begin : begin + chunk_bytes], PART_BYTES))

    return b"".join(together(crew, chunk, range(0, len(data), chunk_bytes), len(data)))


def _pieces(views: list[memoryview], at: int, data: memoryview, most: int) -> list[tuple[memoryview, memoryview]]:
    """Pieces of `data` of at most `most` bytes, each with where it goes from the place `at` of the views on."""
    size = len(views[0])
    pieces: list[tuple[memoryview, memoryview]] = []
    done, total = 0, len(data)
    while done < total:
        number, inside = divmod(at + done, size)
        part = min(size - inside, total - done, most)
        pieces.append((data[done : done + part], views[number][inside : inside + part]))
        done += part
    return pieces
