"""Least recently used, leaf first.

Each use gives a record the newest rank; the leaf of the lowest goes. A use covers a prefix, so a parent's rank is at
least its children's unless the caller touches without the prefix, and then the tree still comes first. A use costs one
assignment: a leaf's place in the queue is brought up to date when it comes up, not when it is used.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic

from isthmus.state.kv.retention.leaves import Leaves
from isthmus.state.kv.retention.order import Record
from isthmus.state.kv.retention.port import K


class Lru(Generic[K]):
    """Implements `Order`."""

    def __init__(self, _records: Mapping[K, Record[K]], serials: Iterator[int]) -> None:
        self._leaves: Leaves[K] = Leaves(serials)
        self._tick = 0

    def admit(self, record: Record[K]) -> None:
        """See `Order`."""
        if not record.rank:
            self.renew(record)

    def used(self, records: Sequence[Record[K]], now: float) -> None:
        """See `Order`."""
        self._tick = tick = self._tick + 1
        for record in records:
            record.rank = tick
            record.used = now

    def offer(self, record: Record[K]) -> None:
        """See `Order`."""
        self._leaves.push(record, record.rank)

    def take(self, tenant: Hashable | None) -> Record[K] | None:
        """See `Order`."""
        return newest_rank(self._leaves, tenant)

    def renew(self, record: Record[K]) -> None:
        """See `Order`."""
        self._tick += 1
        record.rank = self._tick

    def leave(self, record: Record[K], evicted: bool) -> None:
        """See `Order`. Nothing is remembered."""

    def check(self, _records: Iterable[Record[K]]) -> set[int]:
        """See `Order`."""
        return self._leaves.serials()


def newest_rank(leaves: Leaves[K], tenant: Hashable | None) -> Record[K] | None:
    """The leaf of the lowest rank, by the ranks that records have now. Ranks only grow after a push, so a leaf that has
    grown since goes back into the queue; each use causes that at most once.
    """
    while (found := leaves.pop(tenant)) is not None:
        rank, record = found
        if record.rank == rank:
            return record
        leaves.push(record, record.rank)
    return None
