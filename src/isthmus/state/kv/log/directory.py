"""The directory of a segment, wherever it is: in memory while the segment takes extents, in its footer afterwards."""

import threading

import numpy as np

from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.format import ENTRY, SECTOR, Rows, Trailer, align
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.scan import scan_segment
from isthmus.state.kv.log.segments import READABLE, Segment


class Directories:
    """Reads directories. `changed` guards the ledger; the caller does not hold it, and keeps the segment from being
    reused (a pin, or being the one who evicts).
    """

    def __init__(self, ledger: Ledger, changed: threading.Condition, control: Control) -> None:
        self._ledger = ledger
        self._changed = changed
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
