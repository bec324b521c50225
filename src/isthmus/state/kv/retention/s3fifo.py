"""S3-FIFO by bytes, leaf first (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

Two FIFO queues: *small* (a tenth of the bytes) takes what is new, *main* what proved itself. A leaf that comes up in
small moves to main when it was used more than once since it came in (its counter starts again at 0), else it goes, and
its key is remembered: a record that comes back while it is remembered goes to main at once. A leaf that comes up in
main goes round again as often as it was used, three times at most. Small gives first while it has its tenth.

The tree: a queue's order is of all its records, but only leaves come up; a record that becomes a leaf takes the place
that its entry gave it. **What is in main has its prefix there**: whoever proves a leaf proves what it stands on, so the
ancestors move along. Without that rule small would fill with the prefixes of what main holds, look over its share for
good, and throw out everything new.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic

from isthmus.state.kv.retention.ghosts import FEWEST, Ghosts
from isthmus.state.kv.retention.leaves import Leaves
from isthmus.state.kv.retention.order import UNQUEUED, Record
from isthmus.state.kv.retention.port import K, RetentionCorrupt

SMALL, MAIN = 0, 1
SMALL_SHARE = 0.1
MOST_USES = 3
PROVED = 2
"""So many uses in small take a record to main."""


class S3Fifo(Generic[K]):
    """Implements `Order`. Ghosts: at most main's share of `capacity` in bytes, and as many as there are records."""

    def __init__(self, capacity: int, records: Mapping[K, Record[K]], serials: Iterator[int]) -> None:
        self._records = records
        self._queues: tuple[Leaves[K], Leaves[K]] = (Leaves(serials), Leaves(serials))
        self._bytes = [0, 0]
        self._share = max(1, int(capacity * SMALL_SHARE))
        self._ghost_bytes = capacity - self._share
        self._ghosts: Ghosts[K] = Ghosts()
        self._turn = 0

    def admit(self, record: Record[K]) -> None:
        """See `Order`. A record that closes the hole under others goes where they may be: to main."""
        known = self._ghosts.take(record.key)
        if not record.rank:
            self.renew(record)
            if known or record.children:
                self._bytes[SMALL] += record.size
                self._prove(record)
                return
        self._bytes[record.band] += record.size

    def used(self, records: Sequence[Record[K]], now: float) -> None:
        """See `Order`."""
        for record in records:
            record.used = now
            uses = record.uses
            if uses < MOST_USES:
                record.uses = uses + 1

    def offer(self, record: Record[K]) -> None:
        """See `Order`."""
        self._queues[record.band].push(record, record.rank)

    def take(self, tenant: Hashable | None) -> Record[K] | None:
        """See `Order`. Every leaf passed over moves to main once, or has its counter lowered: both are paid by uses."""
        small, main = self._queues
        while True:
            first, second = (small, main) if self._bytes[SMALL] >= self._share else (main, small)
            found = first.pop(tenant) or second.pop(tenant)
            if found is None:
                return None
            record = found[1]
            if record.band == SMALL and record.uses >= PROVED:
                self._prove(record)
            elif record.band == MAIN and record.uses:
                record.uses -= 1
                self.renew(record)
            else:
                return record
            main.push(record, record.rank)

    def renew(self, record: Record[K]) -> None:
        """See `Order`."""
        self._turn += 1
        record.rank = self._turn

    def leave(self, record: Record[K], evicted: bool) -> None:
        """See `Order`. What main lets go is not remembered, as in the paper."""
        self._bytes[record.band] -= record.size
        if evicted and record.band == SMALL:
            self._ghosts.add(record.key, record.size)
            self._trim()

    def _prove(self, record: Record[K]) -> None:
        """Move a record of small, and what it stands on, to main."""
        at: Record[K] | None = record
        while at is not None and at.band == SMALL:
            at.band, at.uses = MAIN, 0
            at.place = min(at.place, UNQUEUED)
            self._bytes[SMALL] -= at.size
            self._bytes[MAIN] += at.size
            self.renew(at)
            at = None if at.parent is None else self._records.get(at.parent)

    def _trim(self) -> None:
        ghosts, most = self._ghosts, max(FEWEST, len(self._records))
        while ghosts and (ghosts.bytes > self._ghost_bytes or len(ghosts) > most):
            ghosts.drop_oldest()

    def check(self, records: Iterable[Record[K]]) -> set[int]:
        """See `Order`."""
        total = [0, 0]
        for record in records:
            total[record.band] += record.size
            parent = None if record.parent is None else self._records.get(record.parent)
            if record.band == MAIN and parent is not None and parent.band == SMALL:
                raise RetentionCorrupt("a record of main stands on one of small")
            if record.key in self._ghosts:
                raise RetentionCorrupt("a record that is present is remembered as gone")
        if total != self._bytes:
            raise RetentionCorrupt(f"small and main have {total} bytes, the counts say {self._bytes}")
        if self._ghosts.recount() != self._ghosts.bytes or self._ghosts.bytes > self._ghost_bytes:
            raise RetentionCorrupt(f"{self._ghosts.bytes} bytes are remembered as gone")
        return self._queues[SMALL].serials() | self._queues[MAIN].serials()
