"""What is done ahead of need and afterwards: evictions, scrubs, readers that have to be replaced."""

from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.log.evict import Evictor
from isthmus.state.kv.log.forgetting import Forgetting
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.reader import ReaderPool
from isthmus.state.kv.log.scrub import Scrubber


class Housekeeper:
    """One step does a little of each. Driven by one thread."""

    def __init__(
        self,
        ledger: Ledger,
        evictor: Evictor,
        scrubber: Scrubber,
        forgetting: Forgetting,
        readers: ReaderPool,
    ) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._evictor = evictor
        self._scrubber = scrubber
        self._forgetting = forgetting
        self._readers = readers

    def waiting(self) -> bool:
        """Whether something is to be done that the last step could not do yet. The caller holds the lock."""
        return not self._evictor.idle or self._evictor.needed() or bool(self._ledger.erasures.pending)

    def step(self, now: float) -> bool:
        """Whether anything was done."""
        moved = self._evictor.step(now)
        epoch, scrubbed = self._scrubber.step(now)
        try:
            self._forgetting.retry(now)
            if epoch:
                self._forgetting.finish(epoch)
        except DiskFailed:
            # What was carried out a restart will find out again; what was not stored was refused.
            with self._changed:
                self._ledger.counts["scrub_errors"] += 1
        return self._readers.mend() or moved or scrubbed
