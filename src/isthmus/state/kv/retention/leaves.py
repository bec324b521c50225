"""A queue of leaves: the lowest rank first, of all tenants or of one.

One heap a tenant, and a heap of the tenants by what stands first in theirs, so that both questions cost O(log n).
Nothing is ever taken out of the middle: a record knows the serial number of its one valid place, and places that are
not valid any more are dropped when they come up, or all at once when they are more than half.
"""

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic

from isthmus.state.kv.retention.order import UNQUEUED, Record
from isthmus.state.kv.retention.port import K

_SLACK = 64
_FEW = 8
"""Up to so many tenants all heads are looked at: cheaper than a heap of them."""

_Heap = list[tuple[float, int, Record[K]]]


class Leaves(Generic[K]):
    """Leaves by rank; equal ranks in the order in which they came. A record is in one queue at most."""

    __slots__ = ("_heads", "_heaps", "_most", "_serials", "_size")

    def __init__(self, serials: Iterator[int]) -> None:
        """`serials`: numbers from 1 on, shared by all queues that the same records may be in."""
        self._serials = serials
        self._heaps: dict[Hashable, _Heap[K]] = {}
        self._heads: list[tuple[float, int, Hashable]] = []
        self._size = 0
        self._most = _SLACK

    def push(self, record: Record[K], rank: float) -> None:
        """Queue `record`; its place in this or another queue, if it had one, is not valid any more."""
        serial = record.place = next(self._serials)
        tenant = record.tenant
        heap = self._heaps.get(tenant)
        if heap is None:
            heap = self._heaps[tenant] = []
            if len(self._heaps) == _FEW + 1:
                self._rebuild_heads()
        heapq.heappush(heap, (rank, serial, record))
        if len(self._heaps) > _FEW and heap[0][1] == serial:
            heapq.heappush(self._heads, (rank, serial, tenant))
        self._size += 1
        if self._size > self._most:
            self._compact()

    def pop(self, tenant: Hashable | None = None) -> tuple[float, Record[K]] | None:
        """The record of the lowest rank (of `tenant`) and its rank here, in no queue any more. Those that have got a
        child since leave the queue, too, and are passed over.
        """
        while True:
            heap = self._first_heap() if tenant is None else self._heaps.get(tenant)
            if heap is None:
                return None
            rank, serial, record = heapq.heappop(heap)
            self._size -= 1
            if not heap:
                del self._heaps[record.tenant]
            elif len(self._heaps) > _FEW:
                heapq.heappush(self._heads, (heap[0][0], heap[0][1], record.tenant))
                if len(self._heads) > 2 * len(self._heaps) + _SLACK:
                    self._rebuild_heads()
            if record.place == serial:
                record.place = UNQUEUED
                if not record.children:
                    return rank, record

    def _first_heap(self) -> _Heap[K] | None:
        """The heap whose first is before those of all others."""
        heaps = self._heaps
        if len(heaps) == 1:
            return next(iter(heaps.values()))
        if len(heaps) <= _FEW:
            return min(heaps.values(), key=_head, default=None)
        while True:
            _, serial, tenant = self._heads[0]
            heap = heaps.get(tenant)
            if heap is not None and heap[0][1] == serial:
                return heap
            heapq.heappop(self._heads)

    def _compact(self) -> None:
        """Drop all places that are not valid. Amortised over at least as many pushes as are kept."""
        self._size = 0
        for tenant, heap in list(self._heaps.items()):
            heap[:] = [place for place in heap if place[2].place == place[1]]
            heapq.heapify(heap)
            self._size += len(heap)
            if not heap:
                del self._heaps[tenant]
        self._most = 2 * self._size + _SLACK
        self._rebuild_heads()

    def _rebuild_heads(self) -> None:
        """The heads of all heaps that have one; used over `_FEW` tenants only."""
        self._heads = [(heap[0][0], heap[0][1], tenant) for tenant, heap in self._heaps.items() if heap]
        heapq.heapify(self._heads)

    def __len__(self) -> int:
        """Places in the queue, valid or not."""
        return self._size

    def serials(self) -> set[int]:
        """The serial numbers of the places that are valid."""
        return {serial for heap in self._heaps.values() for _, serial, record in heap if record.place == serial}


def _head(heap: _Heap[K]) -> tuple[float, int]:
    """What a heap stands by among others; serial numbers differ, so no two are equal."""
    return heap[0][0], heap[0][1]
