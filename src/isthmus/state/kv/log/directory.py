"""What is in a segment, wherever that is said: in memory while it takes extents, in its footer afterwards; and the
records themselves, one after the other.
"""

import numpy as np

from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.format import (
    ENTRY,
    SECTOR,
    SLOT,
    RecordHeader,
    Rows,
    Trailer,
    align,
    decode_record,
    record_span,
)
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.scan import record_good, scan_segment
from isthmus.state.kv.log.segments import READABLE, Segment

_READ_BYTES = 4 << 20


class Directories:
    """Reads directories. `changed` guards the ledger; the caller does not hold it, and keeps the segment from being
    reused (a pin, or being the one who evicts).
    """

    def __init__(self, ledger: Ledger, control: Control) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._control = control

    def of(self, segment: Segment) -> Rows | None:
        """Every record that was written to the segment and not erased, dead ones too; None: it cannot be read."""
        with self._changed:
            if segment.state not in READABLE:
                return np.empty(0, ENTRY)
            if segment.unread:
                return None
            if segment.rows is not None:
                return np.concatenate(segment.rows) if segment.rows else np.empty(0, ENTRY)
        return self._footer(segment) if segment.footer else self._scanned(segment)

    def _footer(self, segment: Segment) -> Rows | None:
        start, seed = self._ledger.geometry.start(segment.index), self._ledger.seed
        try:
            tail = self._control.read(start + segment.size - SECTOR, SECTOR)
            trailer = Trailer.decode(bytes(tail), segment.size, seed)
            if trailer is not None and trailer.generation == segment.generation:
                data = self._control.read(start + trailer.directory_at, align(trailer.directory_bytes))
                rows = trailer.directory(bytes(data))
                if rows is not None:
                    return rows
        except DiskFailed:
            return None
        return self._scanned(segment)

    def _scanned(self, segment: Segment) -> Rows | None:
        """The footer went bad after it was written: the extents say the same, slowly."""
        start = self._ledger.geometry.start(segment.index)

        def read(offset: int, length: int) -> bytearray:
            return self._control.read(start + offset, length)

        try:
            found = scan_segment(read, segment.size, segment.generation, self._ledger.seed)
        except DiskFailed:
            return None
        return np.concatenate(found.rows) if found.rows else None


class SegmentRecords:
    """Reads whole records of one segment, verified, in long steps when they are asked for by slot. The caller keeps the
    segment from being reused.
    """

    def __init__(self, ledger: Ledger, control: Control, segment: Segment) -> None:
        self._ledger = ledger
        self._control = control
        self._segment = segment
        self._data = bytearray()
        self._at = 0

    def get(self, row: Rows) -> tuple[RecordHeader, memoryview] | None:
        """The record of a directory's entry: its header and all its bytes. None: it is not what it should be.

        Raises `DiskFailed` when it cannot be read.
        """
        segment, seed = self._segment, self._ledger.seed
        at, span = int(row["slot"]) * SLOT, record_span(int(row["chunks"]), int(row["chunk_bytes"]))
        if not self._at <= at or at + span > self._at + len(self._data):
            size = min(max(span, _READ_BYTES), segment.size - at)
            self._data = self._control.read(self._ledger.geometry.start(segment.index) + at, size)
            self._at = at
        view = memoryview(self._data)[at - self._at : at - self._at + span]
        header = decode_record(view, seed)
        if header is None or header.generation != segment.generation or header.span != span:
            return None
        return (header, view) if header.key == row["key"].tobytes() and record_good(view, header) else None
