"""ARC by bytes, leaf first (Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003).

Two LRU orders: *once* (the paper's T1) of records that were used once since they came in, *again* (T2) of those that
were used more often. Of each the keys that left last are remembered (B1, B2). `target` (p) is the share in bytes that
once should have: a record that comes back and is remembered by once raises it, by again lowers it, in steps of its size
times the ratio of what both remember (if over 1). Once gives while it has more than its target, else again does.

By bytes: `once` and what it remembers have at most the capacity, all four together twice that. The caller evicts before
it inserts, so the target moves one insertion later than in the paper, and its tie of REPLACE (|T1| = p exactly) is not
told apart.

The tree: a use covers a prefix, so what stands in again has its prefix there, and once is the fringe of the tree. Each
order is of all its records, but only leaves come up; a record that becomes a leaf comes up at its own last use.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic

from isthmus.state.kv.retention.ghosts import FEWEST, Ghosts
from isthmus.state.kv.retention.leaves import Leaves
from isthmus.state.kv.retention.lru import newest_rank
from isthmus.state.kv.retention.order import UNQUEUED, Record
from isthmus.state.kv.retention.port import K, RetentionCorrupt

ONCE, AGAIN = 0, 1


class Arc(Generic[K]):
    """Implements `Order`. Remembers at most as many keys as there are records."""

    def __init__(self, capacity: int, records: Mapping[K, Record[K]], serials: Iterator[int]) -> None:
        self._records = records
        self._capacity = capacity
        self._queues: tuple[Leaves[K], Leaves[K]] = (Leaves(serials), Leaves(serials))
        self._ghosts: tuple[Ghosts[K], Ghosts[K]] = (Ghosts(), Ghosts())
        self._bytes = [0, 0]
        self._tick = 0
        self.target = 0.0
        """Bytes that once should have."""

    def admit(self, record: Record[K]) -> None:
        """See `Order`."""
        if record.rank:
            self._ghosts[record.band].take(record.key)
        else:
            self.renew(record)
            record.band = self._adapt(record)
        self._bytes[record.band] += record.size

    def _adapt(self, record: Record[K]) -> int:
        """Move the target by what is remembered of a new record. Returns the order that it goes to."""
        once, again = self._ghosts
        before_once, before_again = once.bytes, again.bytes
        if once.take(record.key):
            step = record.size * max(1.0, before_again / before_once)
            self.target = min(float(self._capacity), self.target + step)
            return AGAIN
        if again.take(record.key):
            step = record.size * max(1.0, before_once / before_again)
            self.target = max(0.0, self.target - step)
            return AGAIN
        return ONCE

    def used(self, records: Sequence[Record[K]], now: float) -> None:
        """See `Order`."""
        self._tick = tick = self._tick + 1
        for record in records:
            record.rank = tick
            record.used = now
            if record.band == ONCE:
                record.band = AGAIN
                self._bytes[ONCE] -= record.size
                self._bytes[AGAIN] += record.size
                if record.place > UNQUEUED:
                    if record.children:
                        record.place = UNQUEUED
                    else:
                        self.offer(record)

    def offer(self, record: Record[K]) -> None:
        """See `Order`."""
        self._queues[record.band].push(record, record.rank)

    def take(self, tenant: Hashable | None) -> Record[K] | None:
        """See `Order`."""
        first = ONCE if self._bytes[ONCE] > self.target else AGAIN
        record = newest_rank(self._queues[first], tenant)
        return newest_rank(self._queues[1 - first], tenant) if record is None else record

    def renew(self, record: Record[K]) -> None:
        """See `Order`."""
        self._tick += 1
        record.rank = self._tick

    def leave(self, record: Record[K], evicted: bool) -> None:
        """See `Order`."""
        self._bytes[record.band] -= record.size
        if evicted:
            self._ghosts[record.band].add(record.key, record.size)
            self._trim()

    def _trim(self) -> None:
        """Keep what is remembered within its limits; it only grows by what leaves."""
        once, again = self._ghosts
        while once and self._bytes[ONCE] + once.bytes > self._capacity:
            once.drop_oldest()
        room = 2 * self._capacity - self._bytes[ONCE] - self._bytes[AGAIN]
        most = max(FEWEST, len(self._records))
        while once.bytes + again.bytes > room or len(once) + len(again) > most:
            (again or once).drop_oldest()

    def check(self, records: Iterable[Record[K]]) -> set[int]:
        """See `Order`."""
        total = [0, 0]
        for record in records:
            total[record.band] += record.size
            if any(record.key in ghosts for ghosts in self._ghosts):
                raise RetentionCorrupt("a record that is present is remembered as gone")
        if total != self._bytes:
            raise RetentionCorrupt(f"once and again have {total} bytes, the counts say {self._bytes}")
        if any(ghosts.recount() != ghosts.bytes for ghosts in self._ghosts):
            raise RetentionCorrupt("the bytes of what is remembered as gone are miscounted")
        if not 0 <= self.target <= self._capacity:
            raise RetentionCorrupt(f"the target is {self.target} of {self._capacity} bytes")
        return self._queues[ONCE].serials() | self._queues[AGAIN].serials()
