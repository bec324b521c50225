"""Making room: whole segments, the least worth first, ahead of need. Driven by one thread.

The order of things

1. the directory of the victim is read; those of its records that were read since they were written (at most half a
segment; all of them when little of it is alive) are appended again, with the stamp they had;
2. when those are durable, and not before, every record of the victim leaves the index;
3. the segment is free, if nothing pins it, in the same instant. Its next header has the next generation.

A crash in between leaves two copies of some records, both valid. It may also leave no free segment at all, because the
last one had been taken for survivors. Then those of the next victim have nowhere to go before it is free itself: it is
let go of first, as any other eviction would, and what is in memory of them is written after.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from isthmus.contracts.blocks import DIGEST_BYTES, Lifetime
from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.log.admission import Admission
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.directory import Directories, SegmentRecords
from isthmus.state.kv.log.format import RECORD_HEADER, SURVIVORS, RecordHeader, Rows, payload_offset, spans_of
from isthmus.state.kv.log.ledger import Ledger, location_of
from isthmus.state.kv.log.segments import RESERVED, Segment, State
from isthmus.state.kv.log.staging import Extent, Stage

SPARSE_PART = 0.25
"""A segment with no more alive than this is worth keeping whole: its records are merged with others'."""
_KEPT_PART = 0.5
_PATIENCE_S = 5.0
"""How long a victim may stay pinned, or its survivors wait for memory, before another one is chosen."""


@dataclass(slots=True)
class _Eviction:
    """A victim, and what of it is still to be appended again."""

    segment: Segment
    rows: Rows
    begun: float
    keep: list[int]
    """Indexes of rows, by slot, the next one last."""
    records: SegmentRecords
    extents: list[Extent] = field(default_factory=list)
    kept: int = 0


class Evictor:
    """See the module."""

    def __init__(
        self,
        ledger: Ledger,
        control: Control,
        directories: Directories,
        admission: Admission,
        *,
        ahead: int,
    ) -> None:
        """`ahead`: segments to keep free beside the reserved one."""
        self._ledger = ledger
        self._changed = ledger.changed
        self._control = control
        self._directories = directories
        self._admission = admission
        self._ahead = ahead
        self._job: _Eviction | None = None
        self._skip: dict[int, float] = {}
        self.wanted = 0
        """Segments that somebody asked to be evicted beside those that room is needed for."""
        self.whole: set[int] = set()
        """Segments to be emptied with everything alive in them kept."""
        self.freed_bytes = 0
        self.stalled = False
        """Nothing could be evicted at the last try."""

    @property
    def idle(self) -> bool:
        """Whether nothing is being evicted or asked for."""
        return self._job is None and not self.wanted and not self.whole

    def needed(self) -> bool:
        """Whether a segment has to go. The caller holds the lock."""
        return bool(self.wanted or self.whole or self._ledger.segments.count(State.FREE) < RESERVED + self._ahead)

    def step(self, now: float) -> bool:
        """Do a part of an eviction that is under way, or begin one. Whether anything was done."""
        if self._job is None:
            return self._begin(now)
        job = self._job
        if job.keep:
            if self._append_some(job, now):
                return True
            with self._changed:
                if now - job.begun < _PATIENCE_S and not self._nowhere():
                    return False
                self._ledger.counts["survivors_dropped"] += len(job.keep)
            job.keep.clear()
        return self._finish(job, now)

    def _begin(self, now: float) -> bool:
        with self._changed:
            if self._ledger.read_only or not self.needed():
                return False
            self._skip = {index: until for index, until in self._skip.items() if until > now}
            segment = self._choose()
            self.stalled = segment is None
            if segment is None:
                self._changed.notify_all()
                # None is sealed: those that are closing can be, after a sync.
                self._ledger.urgent = self._ledger.urgent or bool(self._ledger.segments.count(State.CLOSING))
                return False
        rows = self._directories.of(segment)
        with self._changed:
            if rows is None:
                self._ledger.counts["segments_unreadable"] += 1
                self._ledger.retire(segment)
                self.whole.discard(segment.index)
                return True
            records = SegmentRecords(self._ledger, self._control, segment)
            self._job = _Eviction(segment, rows, now, self._survivors(segment, rows), records)
        return True

    def _choose(self) -> Segment | None:
        for segment in self._ledger.segments.victims(self._ledger.written_bytes):
            if segment.index not in self._skip and (not self.whole or segment.index in self.whole or self._short()):
                return segment
        self.whole.clear()
        return None

    def _short(self) -> bool:
        return bool(self.wanted) or self._ledger.segments.count(State.FREE) < RESERVED + self._ahead

    def _survivors(self, segment: Segment, rows: Rows) -> list[int]:
        """Which records are appended again: the last first."""
        alive = ~self._ledger.erasures.dead_rows(rows)
        sparse = segment.live_bytes <= SPARSE_PART * segment.size
        if segment.index not in self.whole and not sparse:
            alive &= segment.was_hit(rows)
        order = np.argsort(rows["slot"], kind="stable")
        chosen = order[alive[order]]
        sums = np.cumsum(spans_of(rows[chosen]))
        most = segment.size if segment.index in self.whole else int(_KEPT_PART * segment.size)
        return list(reversed(chosen[sums <= most].tolist()))

    # Appending again

    def _append_some(self, job: _Eviction, now: float) -> bool:
        """Append survivors until memory is short; whether any were."""
        done = False
        while job.keep:
            row = job.rows[job.keep[-1]]
            try:
                found = job.records.get(row)
            except DiskFailed:
                found = None
            if found is None:
                with self._changed:
                    self._ledger.counts["survivors_dropped"] += 1
            elif not self._append(job, row, *found, now):
                return done
            job.keep.pop()
            done = True
        return done

    def _append(self, job: _Eviction, row: Rows, old: RecordHeader, data: memoryview, now: float) -> bool:
        """Append one record again; False: there is no memory for it now."""
        ledger, shape = self._ledger, old.shape
        begin = payload_offset(shape.chunks)
        digests = bytes(data[RECORD_HEADER : RECORD_HEADER + DIGEST_BYTES * shape.chunks])
        with self._changed:
            at = location_of(job.segment.index, int(row["slot"]))
            if ledger.erasures.dead(old.key, old.owner, old.stamp) or at not in ledger.index.candidates(old.key):
                return True
            header = replace(old, sequence=ledger.sequence + 1)
            slot = ledger.staging.reserve(SURVIVORS, header, now)
            if slot is None:
                return False
            ledger.take(slot, header)
            if slot.extent not in job.extents:
                job.extents.append(slot.extent)
        ledger.staging.fill(slot, header, digests, data[begin : begin + shape.record_bytes])
        with self._changed:
            slot.extent.copying -= 1
            ledger.counts["survivors"] += 1
            job.kept += 1
        return True

    # Letting go

    def _nowhere(self) -> bool:
        """Whether survivors can only be written once a segment gets free. The caller holds the lock."""
        segments = self._ledger.segments
        own = segments.having(State.PREPARED, State.READY, State.OPEN)
        return not segments.count(State.FREE) and not any(segment.lane == SURVIVORS for segment in own)

    def _finish(self, job: _Eviction, now: float) -> bool:
        with self._changed:
            ledger, segment = self._ledger, job.segment
            if any(extent.stage is Stage.LOST for extent in job.extents):
                self._job = None
                return True
            waiting = [extent for extent in job.extents if extent.stage is not Stage.DURABLE]
            if waiting and not self._nowhere():
                ledger.flush_to = max(ledger.flush_to, waiting[-1].last_sequence)
                ledger.urgent = ledger.urgent or all(extent.stage is Stage.WRITTEN for extent in waiting)
                self._changed.notify_all()
                return False
            if segment.state is not State.SEALED:
                self._job = None
                return True
            if segment.pins:
                if now - job.begun >= _PATIENCE_S:
                    self._skip[segment.index] = now + _PATIENCE_S
                    self._job = None
                    return True
                return False
            if segment.lane != SURVIVORS:
                self._admission.observe(Lifetime(segment.lane), segment.hit_part)
            ledger.counts["segments_evicted"] += 1
            ledger.counts["records_evicted"] += ledger.unindex(segment, job.rows) - job.kept
            self.freed_bytes += segment.size
            self.wanted = max(0, self.wanted - 1)
            self.whole.discard(segment.index)
            ledger.release(segment)
            self._job = None
            self._changed.notify_all()
            return True
