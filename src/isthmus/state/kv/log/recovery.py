"""Opening a log: making an empty one, or finding out what is on the disk.

Promises

- a disk that holds something else, or a newer format, is not touched;
- of a sealed segment only header and footer are read; one without a valid footer is scanned (scan.py). One damaged bit
in a superblock, an erasure table, a header, a footer or an extent's header loses no record but an extent's own;
- nothing is called durable before a sync at the end of recovery succeeded: what a killed process had written is on the
disk's surface only then;
- what was forgotten is dead from the first moment, whether or not its scrub was finished.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from isthmus.contracts.clock import Clock, Entropy
from isthmus.contracts.errors import DiskFailed, InvalidInput, StoreCorrupt
from isthmus.state.kv.io.disk import Disk
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.erasure import ErasureTable
from isthmus.state.kv.log.format import (
    ENTRY,
    HOLE_HEADER,
    SECTOR,
    SUPERBLOCKS,
    Rows,
    SegmentHeader,
    Superblock,
    Trailer,
    align,
    encode_hole,
)
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.scan import Scan, first_generation, scan_segment
from isthmus.state.kv.log.scrub import zero_bytes
from isthmus.state.kv.log.segments import READABLE, Segment, State
from isthmus.state.kv.log.settings import LogSettings

_ROOM_TO_GO_ON = 4


def open_superblock(disk: Disk, control: Control, settings: LogSettings, clock: Clock, entropy: Entropy) -> Superblock:
    """The log's superblock; a new one on a disk whose first sectors are zeros.

    Raises `StoreCorrupt`, `StoreFormat`, `DiskFailed`, or `InvalidInput` when the settings do not fit the log.
    """
    copies = control.read_many([(offset, SECTOR) for offset in SUPERBLOCKS])
    valid = [found for copy in copies if copy is not None and (found := Superblock.decode(copy)) is not None]
    if not valid:
        for offset, copy in zip(SUPERBLOCKS, copies, strict=True):
            if copy is None:
                control.read(offset, SECTOR)
        if any(copy is not None and any(copy) for copy in copies):
            raise StoreCorrupt("the disk holds something that is no log of Isthmus, or both superblocks are damaged")
        return _format(disk, control, settings, clock, entropy)
    chosen = max(valid, key=lambda one: one.seq)
    if chosen.geometry.end > disk.capacity:
        raise StoreCorrupt(f"the log has {chosen.geometry.end} bytes, the disk only {disk.capacity}")
    if chosen.geometry.segment_bytes < 4 * settings.extent_bytes:
        most = chosen.geometry.segment_bytes // 4
        raise InvalidInput(f"extent_bytes is {settings.extent_bytes}, this log takes up to {most}", "extent_bytes")
    for offset, copy in zip(SUPERBLOCKS, copies, strict=True):
        if copy is None or Superblock.decode(copy) is None:
            control.write(offset, chosen.encode())
    return chosen


def _format(disk: Disk, control: Control, settings: LogSettings, clock: Clock, entropy: Entropy) -> Superblock:
    """Make a log. The superblock comes last: a crash before leaves an empty disk, as it was."""
    geometry = settings.geometry()
    if geometry.end > disk.capacity:
        raise InvalidInput(f"capacity is {settings.capacity}, the disk has {disk.capacity}", "capacity")
    superblock = Superblock(1, entropy.token_bytes(16), geometry, clock.wall())
    for copy in (0, 1):
        write_erasures(control, superblock, copy, ErasureTable(), copy + 1)
    disk.sync()
    for number, offset in enumerate(SUPERBLOCKS):
        control.write(offset, Superblock(number + 1, superblock.uuid, geometry, superblock.created).encode())
        disk.sync()
    return superblock


def write_erasures(control: Control, superblock: Superblock, copy: int, table: ErasureTable, seq: int) -> int:
    """Write one copy of the erasure table; how many bytes. Raises `DiskFailed`."""
    data = table.encode(seq, superblock.seed)
    control.write(superblock.geometry.erasure(copy), data.ljust(align(len(data)), b"\0"))
    return align(len(data))


def read_erasures(control: Control, superblock: Superblock) -> tuple[int, ErasureTable]:
    """The newest erasure table and its seq; the other copy is made the same.

    Raises `StoreCorrupt` when neither is valid: what was forgotten would come back.
    """
    geometry = superblock.geometry
    found: list[tuple[int, ErasureTable] | None] = []
    failure: DiskFailed | None = None
    for copy in (0, 1):
        try:
            data = control.read(geometry.erasure(copy), geometry.erasure_bytes)
        except DiskFailed as error:
            failure = error
            found.append(None)
        else:
            found.append(ErasureTable.decode(bytes(data), superblock.seed))
    valid = [one for one in found if one is not None]
    if not valid:
        raise failure or StoreCorrupt("both copies of the erasure table are damaged: what was forgotten is not known")
    seq, table = max(valid, key=lambda one: one[0])
    for copy, one in enumerate(found):
        if one is None or one[1] != table:
            write_erasures(control, superblock, copy, table, seq)
    return seq, table


def read_directory(control: Control, start: int, trailer: Trailer) -> Rows | None:
    """The directory of the sealed segment that begins at `start`; None when it cannot be had."""
    try:
        data = control.read(start + trailer.directory_at, align(trailer.directory_bytes))
    except DiskFailed:
        return None
    return trailer.directory(bytes(data))


@dataclass(slots=True)
class _Found:
    """A segment that is not sealed: what a scan says, and whether a footer was begun."""

    segment: Segment
    scan: Scan
    footed: bool
    dirty: bool = False
    """What is beside its records could not be removed."""


@dataclass(slots=True)
class Recovery:
    """Fills a ledger from the disk. `adopted`: segments that go on taking extents, by class."""

    ledger: Ledger
    disk: Disk
    control: Control
    superblock: Superblock
    adopted: dict[int, Segment] = field(default_factory=dict)
    highest_stamp: int = 0

    def run(self, wall: float) -> None:
        """Read every segment's header and footer, scan where needed, index everything that is alive."""
        geometry = self.superblock.geometry
        heads = self.control.read_many([(geometry.start(one), SECTOR) for one in range(geometry.segments)])
        tails = self.control.read_many([(geometry.start(one + 1) - SECTOR, SECTOR) for one in range(geometry.segments)])
        unsealed: list[_Found] = []
        for segment, head, tail in zip(self.ledger.segments.all, heads, tails, strict=True):
            try:
                found = self._look(segment, head, tail, wall)
            except DiskFailed:
                self._unread(segment)
                continue
            if found is not None:
                unsealed.append(found)
        unsealed.sort(key=lambda one: (one.segment.opened, one.segment.generation, one.segment.index), reverse=True)
        self._clean(unsealed)
        for found in unsealed:
            self._go_on(found)
        ledger = self.ledger
        ledger.erasures = ledger.erasures.at_least(self.highest_stamp)
        ledger.recount()
        used = sorted(ledger.segments.having(*READABLE), key=lambda one: (one.opened, one.generation), reverse=True)
        for rank, segment in enumerate(used):
            segment.born = -rank * segment.size

    def _look(self, segment: Segment, head: bytes | None, tail: bytes | None, wall: float) -> _Found | None:
        """What one segment is. Raises `DiskFailed` when what counts cannot be read."""
        if head is None:
            self.control.read(self._start(segment), SECTOR)
            return None
        superblock, seed = self.superblock, self.superblock.seed
        header = SegmentHeader.decode(head, superblock.uuid, seed)
        if header is not None and header.index != segment.index:
            header = None
        trailer = Trailer.decode(tail, segment.size, seed) if tail is not None else None
        if trailer is not None and (
            trailer.index != segment.index or (header and trailer.generation != header.generation)
        ):
            trailer = None
        if header is not None:
            segment.generation, segment.lane = header.generation, header.lane
            segment.opened = min(header.opened, wall)
            segment.first_sequence = header.first_sequence
        elif trailer is not None:
            segment.generation = trailer.generation
        elif not any(head):
            segment.dirty = False
            return None
        else:
            segment.generation = first_generation(self._reader(segment), segment.size, seed)
            if not segment.generation:
                self.control.zero(self._start(segment), segment.size)
                return None
        if header is None:
            self.ledger.counts["headers_damaged"] += 1
            segment.opened = wall
        if trailer is not None:
            rows = read_directory(self.control, self._start(segment), trailer)
            if rows is not None:
                self._sealed(segment, trailer, rows)
                return None
        return self._scan(segment, footed=trailer is not None or tail is None or header is None)

    def _sealed(self, segment: Segment, trailer: Trailer, rows: Rows) -> None:
        segment.end, segment.footer = trailer.data_end, trailer.directory_at
        segment.records = trailer.count
        self.ledger.segments.recovered(segment, State.SEALED)
        self._index(segment, rows)
        self.ledger.sequence = max(self.ledger.sequence, trailer.last_sequence)

    def _scan(self, segment: Segment, *, footed: bool) -> _Found | None:
        read, seed = self._reader(segment), self.superblock.seed
        scan = scan_segment(read, segment.size, segment.generation, seed)
        if scan.broken:
            # A second look, before anything is overwritten: the first may have been a bad transfer.
            scan = scan_segment(read, segment.size, segment.generation, seed)
        self.ledger.counts["segments_scanned"] += 1
        self.ledger.counts["records_torn"] += sum(part.records for part in scan.broken)
        return _Found(segment, scan, footed) if scan.extents else None

    def _go_on(self, found: _Found) -> None:
        """An unsealed segment takes more extents if it is the newest of its class and has room, else it is sealed."""
        segment, scan, segments = found.segment, found.scan, self.ledger.segments
        segment.rows = scan.rows
        segment.end, segment.extents = scan.end, scan.extents
        segment.records = sum(len(rows) for rows in scan.rows)
        state = State.CLOSING
        room = segment.fits(segment.size // _ROOM_TO_GO_ON, 1, segments.most_records)
        if segment.lane not in self.adopted and not found.footed and room:
            state = State.OPEN
        if found.dirty:
            state = State.RETIRED
        if segment.records > segments.most_records:
            state = State.RETIRED
        segments.recovered(segment, state)
        if state is State.OPEN:
            self.adopted[segment.lane] = segment
        self._index(segment, np.concatenate(scan.rows) if scan.rows else np.empty(0, ENTRY))

    def _clean(self, unsealed: list[_Found]) -> None:
        """Leave nothing in these segments that is not a record, a hole or zeros. The holes' headers are synced before
        anything behind them is zeroed, so that a crash in between leaves extents that can be walked through.
        """
        ledger, seed = self.ledger, self.superblock.seed
        broken = False
        for found in unsealed:
            start = self._start(found.segment)
            for part in found.scan.broken:
                broken = True
                hole = encode_hole(part.size, part.records, found.segment.generation, seed)
                found.dirty |= not self._done(self.control.patch, start + part.offset, hole)
        if broken:
            self.disk.sync()
        for found in unsealed:
            start = self._start(found.segment)
            for part in found.scan.broken:
                begin, size = start + part.offset + HOLE_HEADER, part.size - HOLE_HEADER
                found.dirty |= not self._done(zero_bytes, self.control, begin, size)
            for offset, length in found.scan.unclean:
                found.dirty |= not self._done(zero_bytes, self.control, start + offset, length)
            for offset, length in found.scan.garbage:
                found.dirty |= not self._done(self.control.zero, start + offset, length)
            found.segment.dirty = found.dirty
            ledger.counts["write_errors"] += found.dirty

    def _done(self, write: Callable[..., object], *arguments: object) -> bool:
        try:
            write(*arguments)
        except DiskFailed:
            return False
        return True

    def _index(self, segment: Segment, rows: Rows) -> None:
        if not len(rows):
            return
        segment.note(rows)
        self.highest_stamp = max(self.highest_stamp, int(rows["stamp"].max()))
        self.ledger.sequence = max(self.ledger.sequence, int(rows["sequence"].max()))
        self.ledger.publish(segment, rows)

    def _unread(self, segment: Segment) -> None:
        """Nothing is known of it: nobody touches it before the next start."""
        self.ledger.counts["segments_unreadable"] += 1
        segment.unread = True
        self.ledger.segments.recovered(segment, State.RETIRED)

    def _start(self, segment: Segment) -> int:
        return self.superblock.geometry.start(segment.index)

    def _reader(self, segment: Segment) -> "_Reader":
        return _Reader(self.control, self._start(segment))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads of one segment."""

    control: Control
    start: int

    def __call__(self, offset: int, length: int) -> bytearray:
        return self.control.read(self.start + offset, length)
