"""Leases: who may read which records until when. Pure: the time is an argument, what a pin is the caller knows.

Promises: a lease ends at its deadline and not one call later; what it pinned is handed back exactly once, by its
release or by its expiry; there are never more than `max_leases`, and none is longer than `max_seconds`; no other
process holds more of them than are left, so one that leases whatever it can takes half and leaves half.
"""

import heapq
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from isthmus.contracts.errors import InvalidInput

T = TypeVar("T")

WITHIN = 0
"""The holder that is the process itself."""


class Granted(msgspec.Struct, Generic[T], frozen=True, eq=False):
    """A lease: its pins, in the order of the keys asked for, and when it ends."""

    number: int
    holder: int
    pins: tuple[T | None, ...]
    granted_at: float
    deadline: float


class LeaseTable(Generic[T]):
    """The leases that have not ended."""

    def __init__(self, *, max_leases: int, max_seconds: float) -> None:
        if max_leases < 1 or not 0 < max_seconds < float("inf"):
            raise InvalidInput("a store grants at least 1 lease, of more than 0 seconds", "max_leases")
        self._max_leases = max_leases
        self._max_seconds = max_seconds
        self._live: dict[int, Granted[T]] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._by_holder: dict[int, set[int]] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._live)

    @property
    def soonest(self) -> float:
        """None ends by itself before this time."""
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def full(self, holder: int) -> bool:
        """Whether none can be granted to `holder` before one ends."""
        left = self._max_leases - len(self._live)
        return not left or (holder != WITHIN and len(self._by_holder.get(holder, ())) >= left)

    def grant(self, holder: int, pins: Sequence[T | None], seconds: float, now: float) -> Granted[T]:
        """A lease of `seconds`, or as long as they may be. Raises `InvalidInput` when there are too many."""
        if self.full(holder):
            raise InvalidInput(f"there are {self._max_leases} leases already", "max_leases")
        self._last += 1
        length = min(max(0.0, seconds), self._max_seconds)  # in this order what is no number is 0, not for ever
        lease = Granted(self._last, holder, tuple(pins), now, now + length)
        self._live[lease.number] = lease
        heapq.heappush(self._deadlines, (lease.deadline, lease.number))
        self._by_holder.setdefault(holder, set()).add(lease.number)
        return lease

    def get(self, number: int, holder: int, now: float) -> Granted[T] | None:
        """The lease with this number, if it is `holder`'s and has not ended."""
        lease = self._live.get(number)
        return lease if lease is not None and lease.holder == holder and now < lease.deadline else None

    def release(self, number: int, holder: int) -> Granted[T] | None:
        """End it early. The lease, whose pins the caller frees; None when it has ended, or is another's."""
        lease = self._live.get(number)
        return self._end(lease) if lease is not None and lease.holder == holder else None

    def release_all(self, holder: int) -> list[Granted[T]]:
        """End all leases of a holder that is gone; what is to be freed."""
        return [self._end(self._live[number]) for number in sorted(self._by_holder.get(holder, ()))]

    def expire(self, now: float) -> list[Granted[T]]:
        """Those whose deadline has passed, by deadline; what is to be freed."""
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now:
            lease = self._live.get(heapq.heappop(self._deadlines)[1])
            if lease is not None:
                ended.append(self._end(lease))
        return ended

    def _end(self, lease: Granted[T]) -> Granted[T]:
        del self._live[lease.number]
        numbers = self._by_holder[lease.holder]
        numbers.discard(lease.number)
        if not numbers:
            del self._by_holder[lease.holder]
        # What was released early leaves its deadline behind: kept to about as many as there are leases.
        if len(self._deadlines) > 2 * len(self._live) + 64:
            self._deadlines = [(one.deadline, one.number) for one in self._live.values()]
            heapq.heapify(self._deadlines)
        return lease
