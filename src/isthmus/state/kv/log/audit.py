"""Looking at everything the log holds: to list it, to verify it."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.contracts.blocks import Lifetime, Owner, RecordKind, Shape
from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.directory import Directories, SegmentRecords
from isthmus.state.kv.log.format import RECORD_HEADER, SLOT, Rows, decode_record
from isthmus.state.kv.log.ledger import Ledger, keys_of, locations_of, segment_and_slot
from isthmus.state.kv.log.records import LogEntry, Verified
from isthmus.state.kv.log.segments import Segment


class Auditor:
    """See the module. Safe to call from several threads; takes no part of the hot paths but the disk's time."""

    def __init__(self, ledger: Ledger, control: Control, directories: Directories) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._control = control
        self._directories = directories

    def scan(self) -> Iterator[LogEntry]:
        """See `SegmentLog.scan`."""
        for segment in self._ledger.segments.all:
            for row in self._held(segment)[1]:
                shape = Shape(RecordKind(int(row["kind"])), int(row["chunks"]), int(row["chunk_bytes"]))
                owner = Owner(row["namespace"].tobytes(), row["session"].tobytes())
                lifetime = Lifetime(int(row["lifetime"]))
                yield LogEntry(row["key"].tobytes(), owner, shape, lifetime, int(row["sequence"]), segment.index)

    def describe(self, keys: Sequence[bytes]) -> list[LogEntry | None]:
        """See `SegmentLog.describe`."""
        return [self._describe(key) for key in keys]

    def verify(self, progress: Callable[[int, int], None]) -> Verified:
        """See `SegmentLog.verify`."""
        good = corrupt = unreadable = 0
        total = len(self._ledger.segments)
        for segment in self._ledger.segments.all:
            generation, rows = self._held(segment)
            with self._changed:
                pinned = len(rows) > 0 and self._ledger.segments.pin(segment.index, generation)
            if pinned:
                try:
                    counts = self._verify(segment, rows)
                finally:
                    with self._changed:
                        self._ledger.segments.unpin(segment.index)
                good, corrupt, unreadable = good + counts[0], corrupt + counts[1], unreadable + counts[2]
            progress(segment.index + 1, total)
        return Verified(good, corrupt, unreadable)

    def _verify(self, segment: Segment, rows: Rows) -> tuple[int, int, int]:
        records = SegmentRecords(self._ledger, self._control, segment)
        good = corrupt = unreadable = 0
        for row, location in zip(rows, locations_of(segment.index, rows).tolist(), strict=True):
            try:
                if records.get(row) is not None:
                    good += 1
                    continue
            except DiskFailed:
                unreadable += 1
                continue
            with self._changed:
                found = self._ledger.quarantine(
                    row["key"].tobytes(), location, int(row["chunks"]), int(row["chunk_bytes"])
                )
            corrupt += found
        return good, corrupt, unreadable

    def _held(self, segment: Segment) -> tuple[int, Rows]:
        """The generation of a segment, and those of its records that the index has, by slot."""
        with self._changed:
            generation = segment.generation
            if not self._ledger.segments.pin(segment.index, generation):
                return generation, _NOTHING
        try:
            rows = self._directories.of(segment)
        finally:
            with self._changed:
                self._ledger.segments.unpin(segment.index)
        if rows is None or not len(rows):
            return generation, _NOTHING
        rows = rows[np.argsort(rows["slot"], kind="stable")]
        return generation, rows[self._indexed(segment, rows)]

    def _indexed(self, segment: Segment, rows: Rows) -> NDArray[np.bool_]:
        with self._changed:
            wanted = locations_of(segment.index, rows).astype(np.int64)
            found: NDArray[np.bool_] = np.equal(self._ledger.index.find(keys_of(rows)), wanted)
            for index in np.flatnonzero(~found).tolist():
                found[index] = int(wanted[index]) in self._ledger.index.candidates(rows["key"][index].tobytes())
            return found

    def _describe(self, key: bytes) -> LogEntry | None:
        ledger = self._ledger
        with self._changed:
            places = ledger.locate(key)
        for place in places:
            index, slot = segment_and_slot(place)
            segment = ledger.segments[index]
            with self._changed:
                if not ledger.segments.pin(index, segment.generation):
                    continue
            try:
                data = self._control.read(ledger.geometry.start(index) + slot * SLOT, RECORD_HEADER)
            except DiskFailed:
                continue
            finally:
                with self._changed:
                    ledger.segments.unpin(index)
            header = decode_record(bytes(data), ledger.seed)
            if header is None or header.key != key or ledger.erasures.dead(key, header.owner, header.stamp):
                continue
            return LogEntry(
                key, header.owner, header.shape, header.lifetime, header.sequence, index, parent=header.parent
            )
        return None


_NOTHING: Rows = np.empty(0, [("slot", "<u4")])
