"""Erasing what was forgotten from the disk: every byte of every dead record, wherever it was written.

Promises

- nothing is touched for an erasure that is not durable itself: after a restart its records would be damaged, not dead;
- an erasure is `done` only after all of this was durable: the dead records of every segment are holes of zeros, no
directory names them, and what lies beside the records of any segment (of an earlier generation, or of a write that was
repeated elsewhere) is zeros too;
- live neighbours keep every byte: in sectors that they share with dead records the same bytes are written again, and
512 of them entirely or not at all;
- a crash anywhere in between leaves a log that can be read, with the erasure still to be done: it begins again.

One segment at a time, in three durable steps: the holes' headers (so that a scan can walk over them), zeros behind
them, a footer without them.
"""

import errno

import numpy as np

from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.log.commit import Committer
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.directory import Directories
from isthmus.state.kv.log.erasure import ErasureTable, Forgotten
from isthmus.state.kv.log.format import (
    HOLE_HEADER,
    SECTOR,
    SLOT,
    Rows,
    SegmentHeader,
    align,
    encode_footer,
    encode_hole,
    footer_at,
    footer_bytes,
    spans_of,
)
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.segments import READABLE, Segment, State

RETRY_S = 5.0
_SHORT = 256 << 10
"""Up to here zeros are written; longer ranges are left to the disk's own way of zeroing."""


def zero_bytes(control: Control, offset: int, length: int) -> int:
    """Zero a range that need not be aligned; bytes written for it. Raises `DiskFailed`."""
    if length <= 0:
        return 0
    end = offset + length
    first, last = align(offset), end - end % SECTOR
    if last - first <= _SHORT:
        return control.patch(offset, bytes(length))
    written = 0
    if offset < first:
        written += control.patch(offset, bytes(first - offset))
    control.zero(first, last - first)
    if last < end:
        written += control.patch(last, bytes(end - last))
    return written


def holes_of(rows: Rows) -> list[tuple[int, int, int]]:
    """What becomes of these records of one segment: holes (offset, bytes, records), one for neighbours in an extent."""
    begins = rows["slot"].astype(np.int64) * SLOT
    order = np.argsort(begins)
    found: list[tuple[int, int, int]] = []
    for begin, span in zip(begins[order].tolist(), spans_of(rows)[order].tolist(), strict=True):
        if found and sum(found[-1][:2]) == begin:
            found[-1] = (found[-1][0], found[-1][1] + span, found[-1][2] + 1)
        else:
            found.append((begin, span, 1))
    return found


class Scrubber:
    """Carries out erasures, a segment a step. Driven by one thread, the one that evicts."""

    def __init__(
        self,
        ledger: Ledger,
        control: Control,
        committer: Committer,
        directories: Directories,
    ) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._control = control
        self._committer = committer
        self._directories = directories
        self._table = ErasureTable()
        self._epoch = 0
        self._after = 0
        self._todo: list[int] = []
        self._not_before = 0.0
        self._failed = False

    def step(self, now: float) -> tuple[int, bool]:
        """Do one segment. Returns the epoch up to which every erasure has just been carried out, or 0; and whether
        anything was done.
        """
        with self._changed:
            stored = self._ledger.erasures_stored
            pending = tuple(entry for entry in self._ledger.erasures.pending if entry.epoch <= stored)
            if not pending or now < self._not_before:
                return 0, False
            if not self._epoch:
                self._begin(pending)
            if not self._ledger.settled(self._after):
                return 0, False
        try:
            return self._next(now)
        except DiskFailed:
            self._put_off(now)
            return 0, False

    def _begin(self, pending: tuple[Forgotten, ...]) -> None:
        """A pass over all segments, once everything that was stamped before is where it will stay."""
        self._epoch = pending[-1].epoch
        self._table = ErasureTable(self._epoch, 0, pending)
        self._after = self._ledger.sequence
        self._todo = [segment.index for segment in reversed(self._ledger.segments.all)]
        self._failed = False
        self._ledger.flush_to = max(self._ledger.flush_to, self._after)

    def _put_off(self, now: float) -> None:
        self._ledger.counts["scrub_errors"] += 1
        self._not_before = now + RETRY_S
        self._epoch = 0

    def _next(self, now: float) -> tuple[int, bool]:
        while self._todo:
            segment = self._ledger.segments[self._todo[-1]]
            worked = self._segment(segment)
            if worked is None:
                return 0, False
            self._todo.pop()
            if worked:
                self._ledger.counts["segments_scrubbed"] += 1
                return 0, True
        epoch, self._epoch = self._epoch, 0
        if self._failed or not self._committer.commit():
            self._not_before = now + RETRY_S
            return 0, False
        return epoch, True

    def _segment(self, segment: Segment) -> bool | None:
        """Scrub one segment: whether there was anything to do; None: it has to be looked at again later."""
        ledger = self._ledger
        with self._changed:
            if segment.unread:
                self._failed = True
                return False
            if segment.state is State.CLOSING or (segment.state is State.RETIRED and ledger.pending(segment)):
                # Its last writes are under way: afterwards it is a segment like the others.
                ledger.urgent = True
                return None
            affected = segment.state in READABLE and self._table.touches(segment.usage, segment.lowest_stamp)
            if not affected and not segment.dirty:
                return False
            pinned = ledger.segments.pin(segment.index, segment.generation)
        try:
            worked = self._dead(segment) if affected else False
            if worked is None or not segment.dirty:
                return worked
            return True if self._zero_gap(segment) else None
        finally:
            with self._changed:
                segment.fenced = False
                if pinned:
                    ledger.segments.unpin(segment.index)
                self._changed.notify_all()

    def _dead(self, segment: Segment) -> bool | None:
        """Make holes of the dead records of a segment, and forget them in its directory. None: it was closed meanwhile,
        with a footer that may name them, and may name more than was seen here: it has to be looked at again.
        """
        was_sealed = segment.state is State.SEALED
        rows = self._directories.of(segment)
        if rows is None:
            self._failed = True
            return False
        dead = self._table.dead_rows(rows)
        footless = was_sealed and not segment.footer
        if not dead.any() and not footless:
            return False
        start, seed = self._ledger.geometry.start(segment.index), self._ledger.seed
        holes = holes_of(rows[dead])
        hole = [encode_hole(size, records, segment.generation, seed) for _, size, records in holes]
        self._durable(sum(self._control.patch(start + one[0], head) for one, head in zip(holes, hole, strict=True)))
        self._durable(
            sum(zero_bytes(self._control, start + at + HOLE_HEADER, size - HOLE_HEADER) for at, size, _ in holes)
        )
        with self._changed:
            if not was_sealed and segment.state in (State.CLOSING, State.SEALED):
                return None
            self._ledger.unindex(segment, rows[dead])
            if segment.rows is not None:
                gone = rows[dead]["slot"]
                # An extent without dead records keeps the very array that the ledger knows it by.
                masks = [np.isin(part["slot"], gone) for part in segment.rows]
                segment.rows = [
                    part[~mask] if mask.any() else part for part, mask in zip(segment.rows, masks, strict=True)
                ]
        if was_sealed:
            self._refoot(segment, rows[~dead])
        with self._changed:
            self._ledger.erased(segment, rows[dead])
        return True

    def _refoot(self, segment: Segment, rows: Rows) -> None:
        """A footer without the dead. A crash while it is written costs a scan."""
        header = SegmentHeader(segment.index, segment.generation, segment.lane, segment.opened, segment.first_sequence)
        data = bytearray(footer_bytes(len(rows)))
        at = footer_at(segment.size, len(rows))
        encode_footer(
            memoryview(data),
            rows,
            header,
            segment_bytes=segment.size,
            data_end=segment.end,
            seed=self._ledger.seed,
        )
        with self._changed:
            # Until the new one is durable there is none, here as on the disk.
            segment.footer, segment.dirty = 0, True
        self._control.write(self._ledger.geometry.start(segment.index) + at, data)
        self._durable(len(data))
        with self._changed:
            segment.footer = at

    def _zero_gap(self, segment: Segment) -> bool:
        """Zero what lies in a segment beside its extents and its footer. False: its footer is being written."""
        with self._changed:
            if segment.state is State.CLOSING:
                return False
            # Whoever leaves something in it from now on says so again.
            segment.fenced, segment.dirty = True, False
            begin = segment.end if segment.state in READABLE else SECTOR
            end = segment.footer or segment.size
        try:
            if end > begin:
                self._control.zero(self._ledger.geometry.start(segment.index) + begin, end - begin)
            self._durable(0)
        except DiskFailed:
            with self._changed:
                segment.dirty = True
            raise
        return True

    def _durable(self, written: int) -> None:
        """Sync. Raises `DiskFailed` when that fails: the erasure is not done."""
        with self._changed:
            self._ledger.written_bytes += written
        if not self._committer.commit():
            raise DiskFailed("fdatasync", errno.EIO)
