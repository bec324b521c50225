"""The books of the log in memory: what is visible, what is durable, what is where. No I/O; its owner holds a lock.

Promises

- a record is in the index only while its extent is written (WRITTEN or DURABLE) in a readable segment, and only if it
is not forgotten;
- `durable` never goes back, and every record with a sequence up to it was covered by a successful sync that began after
its write had completed, together with all that recovery needs to find it: its segment's header and every extent before
it in its segment;
- an extent whose write failed, or whose sync failed, is written again elsewhere, at most `MAX_ATTEMPTS` times in all;
after that the log takes nothing more in, and `durable` stays below what was lost, for good;
- a segment with a failed write, or with unsynced writes when a sync fails, is written by nobody any more (RETIRED).

Every completed write gets a ticket; a sync covers the tickets given out before it began.
"""

import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.state.kv.index.table import FingerprintTable
from isthmus.state.kv.log.erasure import ErasureTable
from isthmus.state.kv.log.format import Geometry, RecordHeader, Rows, record_span, spans_of
from isthmus.state.kv.log.segments import READABLE, Segment, SegmentTable, State, usage_by_namespace, usage_of
from isthmus.state.kv.log.staging import Extent, Slot, Stage, Staging

MAX_ATTEMPTS = 3
SLOT_BITS = 24
_SLOT_MASK = (1 << SLOT_BITS) - 1


def location_of(segment: int, slot: int) -> int:
    """What the index holds for a record."""
    return segment << SLOT_BITS | slot


def segment_and_slot(location: int) -> tuple[int, int]:
    """The other way round."""
    return location >> SLOT_BITS, location & _SLOT_MASK


def locations_of(segment: int, rows: Rows) -> NDArray[np.uint64]:
    """What the index holds for the records of a directory."""
    return rows["slot"].astype(np.uint64) | np.uint64(segment << SLOT_BITS)


def keys_of(rows: Rows) -> NDArray[np.uint8]:
    """The keys of a directory, as the index takes them."""
    return np.ascontiguousarray(rows["key"])


class Ledger:
    """See the module."""

    def __init__(
        self, geometry: Geometry, segments: SegmentTable, staging: Staging, index: FingerprintTable, seed: int
    ) -> None:
        self.changed = threading.Condition()
        """The lock of all this, told of every change."""
        self.geometry = geometry
        self.segments = segments
        self.staging = staging
        self.index = index
        self.seed = seed
        self.erasures = ErasureTable()
        self.erasures_stored = 0
        """Up to this epoch they are in force after a restart too."""
        self.sequence = 0
        self.durable = 0
        self.completed = 0
        self.synced = 0
        self.unsynced_bytes = 0
        self.unsynced_since = 0.0
        self.unsettled: list[Extent] = []
        self.flush_to = 0
        self.urgent = False
        """Somebody waits for a sync."""
        self.read_only = ""
        """Why nothing more is taken in; empty: it is."""
        self.counts: Counter[str] = Counter()
        self.usage: dict[bytes, int] = {}
        self.taken_bytes = 0
        self.written_bytes = 0
        self._pending: dict[int, list[Extent]] = {}

    # Taking in

    def take(self, slot: Slot, header: RecordHeader) -> None:
        """A record got room in an extent, and the next sequence."""
        self.sequence = header.sequence
        extent, name = slot.extent, header.owner.namespace_id
        if extent.records == 1:
            self.unsettled.append(extent)
        self.usage[name] = self.usage.get(name, 0) + header.span

    def _discharge(self, usage: dict[bytes, int]) -> None:
        for name, size in usage.items():
            left = self.usage.get(name, 0) - size
            if left > 0:
                self.usage[name] = left
            else:
                self.usage.pop(name, None)

    # What the writer says

    def assign(self, extent: Extent, segment: Segment) -> None:
        """An extent is written to an open segment."""
        extent.at, extent.ordinal = self.segments.allocate(segment, extent.size, extent.records)
        extent.segment, extent.stage = segment, Stage.WRITING
        extent.attempts += 1
        self._pending.setdefault(segment.index, []).append(extent)

    def wrote(self, size: int, now: float) -> int:
        """A write of `size` bytes completed: its ticket."""
        if not self.unsynced_bytes:
            self.unsynced_since = now
        self.unsynced_bytes += size
        self.written_bytes += size
        self.completed += 1
        return self.completed

    def extent_written(self, extent: Extent, error: int, now: float) -> None:
        """The writes of an extent ended."""
        segment = extent.segment
        if segment is None:
            return
        if error:
            self.counts["write_errors"] += 1
            self.retire(segment)
        if segment.state is State.RETIRED:
            self._again(extent, segment)
            return
        extent.ticket = self.wrote(extent.size, now)
        extent.stage = Stage.WRITTEN
        extent.table = table = extent.placed()
        segment.note(table)
        if segment.rows is not None:
            segment.rows.append(table)
        self.publish(segment, table)

    def publish(self, segment: Segment, rows: Rows) -> None:
        """Records of a segment can be found from now on, but for those that are forgotten."""
        dead = self.erasures.dead_rows(rows)
        alive = rows[~dead] if dead.any() else rows
        self.index.put(keys_of(alive), locations_of(segment.index, alive))
        segment.alive(len(alive), int(spans_of(alive).sum()))

    def header_written(self, segment: Segment, error: int, size: int, now: float) -> None:
        """The header of a PREPARED segment was written."""
        if error:
            self.counts["write_errors"] += 1
            self.retire(segment)
        elif segment.state is State.PREPARED:
            segment.ticket = self.wrote(size, now)

    def footer_written(self, segment: Segment, footer: int, error: int, now: float) -> None:
        """The footer of a CLOSING segment was written; it begins at `footer`."""
        if error:
            self.counts["write_errors"] += 1
            self.retire(segment)
        elif segment.state is State.CLOSING:
            segment.ticket = self.wrote(segment.size - footer, now)
            segment.footer = footer

    def pending(self, segment: Segment) -> Sequence[Extent]:
        """Its extents that are not durable, in the order in which they lie there."""
        return self._pending.get(segment.index, ())

    # What the committer says

    def sync_begins(self) -> int:
        """A sync is about to begin: the ticket up to which it covers."""
        self.unsynced_bytes = 0
        self.urgent = False
        return self.completed

    def covered(self, ticket: int) -> None:
        """The sync that `sync_begins` gave this ticket succeeded."""
        self.synced = ticket
        for index, extents in list(self._pending.items()):
            while extents and extents[0].stage is Stage.WRITTEN and extents[0].ticket <= ticket:
                self._settle(extents.pop(0), Stage.DURABLE)
            if not extents:
                del self._pending[index]
        for segment in self.segments.having(State.PREPARED, State.CLOSING):
            if not 0 < segment.ticket <= ticket:
                continue
            if segment.state is State.PREPARED:
                self.segments.move(segment, State.READY)
            else:
                self.segments.move(segment, State.SEALED)
                segment.rows = None
            segment.ticket = 0
        self._advance()

    def sync_failed(self) -> None:
        """A sync failed: nothing that was written since the last good one can be trusted."""
        self.counts["sync_failures"] += 1
        for segment in self.segments.having(State.PREPARED, State.READY, State.OPEN, State.CLOSING, State.RETIRED):
            unsynced = any(extent.stage is Stage.WRITTEN for extent in self.pending(segment))
            if unsynced or segment.ticket > self.synced:
                self.retire(segment)
        self._advance()

    def retire(self, segment: Segment) -> None:
        """Nobody writes this segment any more. What is not durable in it is written again elsewhere."""
        if segment.state is not State.RETIRED:
            self.counts["segments_retired"] += 1
            self.segments.move(segment, State.RETIRED)
            segment.ticket = segment.footer = 0
        for extent in reversed([one for one in self.pending(segment) if one.stage is Stage.WRITTEN]):
            self._again(extent, segment)
        still = self.pending(segment)
        if still:
            segment.end = min(segment.end, still[0].at)

    def _again(self, extent: Extent, segment: Segment) -> None:
        """Take an extent back from a segment."""
        held = self._pending[segment.index]
        held.remove(extent)
        if not held:
            del self._pending[segment.index]
        segment.end = min(segment.end, extent.at)
        segment.dirty = True
        if extent.table is not None:
            self.unindex(segment, extent.table)
            segment.note(extent.table, -1)
            if segment.rows is not None:
                segment.rows = [rows for rows in segment.rows if rows is not extent.table]
        if extent.attempts >= MAX_ATTEMPTS:
            self._lose(extent)
        else:
            self.counts["extents_rewritten"] += 1
            self.staging.again(extent)

    def _lose(self, extent: Extent) -> None:
        self.counts["records_lost"] += extent.records
        self.refuse(f"{MAX_ATTEMPTS} writes of the same records failed")
        self._discharge(usage_by_namespace(extent.placed()))
        extent.stage = Stage.LOST
        self.staging.recycle(extent)

    def refuse(self, why: str) -> None:
        """Take nothing more in."""
        if not self.read_only:
            self.read_only = why

    def give_up(self) -> None:
        """What waits for the disk can never be written: no segment is left for it."""
        self.refuse("no segment is left that can be written")
        for lane, queue in enumerate(self.staging.queues):
            self.staging.close(lane)
            for extent in [one for one in queue if not one.copying]:
                queue.remove(extent)
                self._lose(extent)

    def _settle(self, extent: Extent, stage: Stage) -> None:
        extent.stage = stage
        self.unsettled.remove(extent)
        self.staging.recycle(extent)

    def _advance(self) -> None:
        first = min((extent.first_sequence for extent in self.unsettled), default=self.sequence + 1)
        self.durable = max(self.durable, first - 1)

    @property
    def findable(self) -> int:
        """No record up to this sequence waits to be written: it can be found, unless it was lost, evicted or forgotten.
        May go back, when a write turns out to have failed.
        """
        waiting = [one.first_sequence for one in self.unsettled if one.stage < Stage.WRITTEN]
        return min(waiting, default=self.sequence + 1) - 1

    def settled(self, sequence: int) -> bool:
        """Whether every record up to `sequence` is durable, or lost for good."""
        return not any(one.first_sequence <= sequence and one.stage is not Stage.LOST for one in self.unsettled)

    # Finding and losing records

    def locate(self, key: bytes) -> list[int]:
        """Every location that may be a key's, and can be read."""
        return [at for at in self.index.candidates(key) if self.segments[at >> SLOT_BITS].state in READABLE]

    def quarantine(self, key: bytes, location: int, chunks: int, chunk_bytes: int) -> bool:
        """A record is not what it should be: nobody finds it any more. Whether somebody could until now."""
        if not self.index.discard(key, location):
            return False
        self.counts["quarantined"] += 1
        self.segments[location >> SLOT_BITS].alive(-1, -record_span(chunks, chunk_bytes))
        return True

    def unindex(self, segment: Segment, rows: Rows) -> int:
        """Nobody finds these records of a segment any more; how many somebody could until now."""
        found = self.index.remove(keys_of(rows), locations_of(segment.index, rows))
        count = int(found.sum())
        if count:
            segment.alive(-count, -int(spans_of(rows[found]).sum()))
        return count

    def erased(self, segment: Segment, rows: Rows) -> None:
        """These records of a segment are not on the disk any more."""
        if len(rows):
            segment.note(rows, -1)
            self._discharge(usage_by_namespace(rows))

    def release(self, segment: Segment) -> None:
        """A segment, none of whose records is in the index, is free."""
        self._discharge(segment.usage)
        self.segments.release(segment)

    def recount(self) -> None:
        """Usage from what the segments say (when the log was opened)."""
        self.usage = usage_of(self.segments)

    # Figures

    def lag(self, now: float) -> tuple[int, float]:
        """Bytes that are taken in and not durable, and the age of the oldest of them in seconds."""
        alive = [extent for extent in self.unsettled if extent.stage is not Stage.LOST]
        return sum(extent.used for extent in alive), now - min((extent.begun for extent in alive), default=now)
