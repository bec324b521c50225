"""Counts of outcomes by operation, tier and reason: why there was a hit, a miss, a drop. Safe from several threads."""

import threading
from collections import Counter
from collections.abc import Iterable

from isthmus.contracts.blocks import Outcome, Reason, Tier


class Counts:
    """Counters since the start, named `<operation>_<tier>_<reason>`; `none` for what concerns no tier."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, operation: str, tier: Tier | None, reason: Reason | str, count: int = 1) -> None:
        """`count` more of these."""
        if count:
            name = f"{operation}_{tier or 'none'}_{reason}"
            with self._lock:
                self._counts[name] += count

    def add_outcomes(self, operation: str, outcomes: Iterable[Outcome]) -> None:
        """One more for each outcome of a batch."""
        for (tier, reason), count in Counter((one.tier, one.reason) for one in outcomes).items():
            self.add(operation, tier, reason, count)

    def snapshot(self) -> dict[str, int]:
        """All of them now."""
        with self._lock:
            return dict(sorted(self._counts.items()))
