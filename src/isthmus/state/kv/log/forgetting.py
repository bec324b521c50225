"""Erasures as they are asked for: durable before they are acknowledged, in force from then on.

The table is on the disk twice. A change is written to one copy and synced, then to the other and synced, and the copy
that is not known to be good comes first: at every moment one copy is whole, and once a `forget` has returned both say
so, so that no single damaged sector can bring anything back.
"""

import errno
import threading

from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.log.commit import Committer
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.directory import Directories
from isthmus.state.kv.log.erasure import ErasureTable, Scope, ScopeKind
from isthmus.state.kv.log.format import Superblock
from isthmus.state.kv.log.ledger import Ledger, segment_and_slot
from isthmus.state.kv.log.recovery import write_erasures
from isthmus.state.kv.log.segments import READABLE, Segment

RETRY_S = 5.0
"""Between two tries to make durable what was refused."""


class Forgetting:
    """See the module. Safe to call from several threads. `seq`: of the table on the disk."""

    def __init__(
        self,
        ledger: Ledger,
        control: Control,
        committer: Committer,
        directories: Directories,
        *,
        superblock: Superblock,
        seq: int,
    ) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._control = control
        self._committer = committer
        self._directories = directories
        self._superblock = superblock
        self._seq = seq
        self._doubtful = 0
        self._asked = 0
        self._not_before = 0.0
        self._one = threading.Lock()

    def forget(self, scope: Scope) -> int:
        """Forget everything of a scope that was taken in before this returns; the erasure's number.

        Raises `Overloaded` when too many erasures are being carried out, and `DiskFailed` when it could not be made
        durable: it is in force then, but after a restart only if a later `retry` went well, so it has to be asked for
        again.
        """
        with self._one:
            table = self._ledger.erasures.forget(scope, self._superblock.geometry.erasure_bytes)
            self._asked = table.epoch
            try:
                self._store(table)
            finally:
                with self._changed:
                    self._ledger.erasures = table
                    self._ledger.counts["forgotten"] += 1
                    self._changed.notify_all()
            self._unindex(ErasureTable(table.epoch, 0, table.entries[-1:]))
            return table.number

    def retry(self, now: float) -> None:
        """Make durable what could not be when it was asked for. Raises `DiskFailed`, at most every `RETRY_S`."""
        if self._ledger.erasures_stored >= self._asked or now < self._not_before:
            return
        with self._one:
            self._not_before = now + RETRY_S
            self._store(self._ledger.erasures)

    def finish(self, epoch: int) -> None:
        """Every erasure up to `epoch` was carried out. Raises `DiskFailed`: then a restart does it again."""
        with self._one:
            table = self._ledger.erasures.finish(epoch)
            try:
                self._store(table)
            finally:
                with self._changed:
                    self._ledger.erasures = table

    def _store(self, table: ErasureTable) -> None:
        self._seq += 1
        for copy in (self._doubtful, 1 - self._doubtful):
            self._doubtful = copy
            written = write_erasures(self._control, self._superblock, copy, table, self._seq)
            with self._changed:
                self._ledger.written_bytes += written
            if not self._committer.commit():
                raise DiskFailed("fdatasync", errno.EIO)
        self._doubtful = 0
        with self._changed:
            self._ledger.erasures_stored = table.epoch
            self._changed.notify_all()

    def _segments(self, table: ErasureTable) -> list[Segment]:
        """Where records of the only scope of `table` may be found."""
        scope = table.entries[0].scope
        with self._changed:
            if scope.kind is ScopeKind.KEY:
                places = {segment_and_slot(at)[0] for at in self._ledger.index.candidates(scope.id)}
                return [self._ledger.segments[index] for index in sorted(places)]
            return self._ledger.segments.having(*READABLE)

    def _unindex(self, table: ErasureTable) -> None:
        """Nobody finds the dead records any more. Reads of them are refused by their stamps already."""
        ledger = self._ledger
        for segment in self._segments(table):
            with self._changed:
                if segment.state not in READABLE or not table.touches(segment.usage, segment.lowest_stamp):
                    continue
                if not ledger.segments.pin(segment.index, segment.generation):
                    continue
            try:
                rows = self._directories.of(segment)
                with self._changed:
                    if rows is not None:
                        ledger.counts["records_forgotten"] += ledger.unindex(segment, rows[table.dead_rows(rows)])
            finally:
                with self._changed:
                    ledger.segments.unpin(segment.index)
