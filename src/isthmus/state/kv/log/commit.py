"""Group commit: when a sync is due, and what follows from how it ends.

Promises: one sync at a time; what it covers had completed before it began; a sync that fails is never tried again for
what it was to cover (what was written then is written again elsewhere, or is lost and never called durable).

Lock order: the committer's own lock, then the ledger's.
"""

import threading

from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.io.disk import Disk
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.settings import LogSettings
from isthmus.state.kv.log.staging import Stage

_UNWRITTEN = frozenset({Stage.FILLING, Stage.CLOSED, Stage.WRITING})


class Committer:
    """See the module. Safe to call from several threads."""

    def __init__(self, disk: Disk, ledger: Ledger, settings: LogSettings) -> None:
        self._disk = disk
        self._ledger = ledger
        self._changed = ledger.changed
        self._settings = settings
        self._one = threading.Lock()
        self.commits = 0

    def due(self, now: float) -> bool:
        """Whether a commit is to begin now. The caller holds the ledger's lock."""
        ledger = self._ledger
        if not ledger.unsynced_bytes:
            return False
        starved = ledger.staging.starved and not any(one.stage is Stage.WRITING for one in ledger.unsettled)
        return (
            ledger.urgent
            or starved
            or ledger.unsynced_bytes >= self._settings.commit_bytes
            or now - ledger.unsynced_since >= self._settings.commit_s
            or (ledger.flush_to > ledger.durable and self._all_written(ledger.flush_to))
        )

    def _all_written(self, sequence: int) -> bool:
        extents = self._ledger.unsettled
        return not any(one.first_sequence <= sequence and one.stage in _UNWRITTEN for one in extents)

    def commit(self) -> bool:
        """Sync now; whether everything that had completed before is durable. The caller holds no lock of the log."""
        with self._one:
            with self._changed:
                ticket = self._ledger.sync_begins()
            try:
                self._disk.sync()
            except DiskFailed:
                with self._changed:
                    self._ledger.sync_failed()
                    self._changed.notify_all()
                return False
            with self._changed:
                self._ledger.covered(ticket)
                self.commits += 1
                self._changed.notify_all()
            return True
