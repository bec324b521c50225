"""What was said of the future of records: an order in front of the policy's own, and one behind it.

Who leaves first

1. what is `DONE` (and records of lifetime `SHORT`), what was said first first;
2. what had its `TURN_ENDED`: a person may come back at any time, in minutes at best;
3. what is `WAITING` and will be away for longer than an unused record lasts here (`turnover_s`, measured), the longest
   away first. What comes back sooner is worth more than what the policy would give;
4. the policy's own order;
5. what is `WAITING` for less than that, or wanted soon (`PREFETCH`), the longest away first.

A use takes back all of this but a pin. A wait that is overdue by `soon_s` is forgotten. A pinned record never leaves
before its pin has ended; a newer pin replaces an older one, also by a shorter time. Hints are advice: pins over
`pin_bytes` in all are not taken, and seconds out of range are the nearest in range.
"""

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from isthmus.contracts.blocks import HintKind
from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.retention.leaves import Leaves
from isthmus.state.kv.retention.order import UNQUEUED, Record
from isthmus.state.kv.retention.port import K, RetentionCorrupt

MAX_SECONDS = 7 * 86_400.0
_SLACK = 64


@dataclass(frozen=True, slots=True)
class HintLimits:
    """`pin_bytes`: most that may be pinned. `soon_s`: who comes back within this is never sent away for it, and how
    long one who does not come back is still expected.
    """

    pin_bytes: int
    soon_s: float = 5.0

    def __post_init__(self) -> None:
        if self.pin_bytes < 0 or not 0 <= self.soon_s <= MAX_SECONDS:
            raise InvalidInput(f"pin_bytes is at least 0, soon_s 0 to {MAX_SECONDS:.0f}", "hints")


class Hints(Generic[K]):
    """What was said of the records present; nothing of others. Its owner offers it leaves and asks it for them."""

    def __init__(self, limits: HintLimits, serials: Iterator[int]) -> None:
        """`serials`: see `Leaves`."""
        self._limits = limits
        self._serials = serials
        self._said: dict[K, tuple[HintKind, float]] = {}
        """The kind, and when the record is expected back, or for the first two orders their turn."""
        self._pins: dict[K, tuple[float, int]] = {}
        """Until when, and the record's size."""
        self._ends: list[tuple[float, int, K]] = []
        """When pins and waits end; some do not hold any more."""
        self._done: Leaves[K] = Leaves(serials)
        self._ended: Leaves[K] = Leaves(serials)
        self._away: Leaves[K] = Leaves(serials)
        self.pinned_bytes = 0

    def __len__(self) -> int:
        """Records of which something was said."""
        return len(self._said) + len(self._pins)

    def say(self, record: Record[K], kind: HintKind, seconds: float, now: float) -> None:
        """Note a hint. The owner offers the record anew when it is a leaf."""
        seconds = min(seconds, MAX_SECONDS) if seconds > 0 else 0.0
        key = record.key
        if kind is HintKind.PIN:
            self._pin(record, now + seconds)
        elif kind is HintKind.WAITING or kind is HintKind.PREFETCH:
            self._said[key] = (kind, now + seconds)
            self._ends_at(now + seconds + self._limits.soon_s, key)
        elif self._said.get(key, ("", 0))[0] is not kind:
            self._said[key] = (kind, float(next(self._serials)))

    def _pin(self, record: Record[K], until: float) -> None:
        _, size = self._pins.get(record.key, (0.0, 0))
        if self.pinned_bytes + record.size - size > self._limits.pin_bytes:
            return
        self.pinned_bytes += record.size - size
        self._pins[record.key] = (until, record.size)
        self._ends_at(until, record.key)

    def _ends_at(self, when: float, key: K) -> None:
        heapq.heappush(self._ends, (when, next(self._serials), key))
        self._trim()

    def _trim(self) -> None:
        """Drop ends that do not hold any more, when they are more than half."""
        if len(self._ends) > 2 * len(self) + _SLACK:
            self._ends = [end for end in self._ends if self._holds(end[0], end[2])]
            heapq.heapify(self._ends)

    def _holds(self, when: float, key: K) -> bool:
        """Whether a pin or a wait of `key` ends at `when`."""
        kind, back = self._said.get(key, (None, 0.0))
        waits = kind is HintKind.WAITING or kind is HintKind.PREFETCH
        return self._pins.get(key, (None, 0))[0] == when or (waits and back + self._limits.soon_s == when)

    def used(self, records: Sequence[Record[K]]) -> list[Record[K]]:
        """Records were used: what was said of them but pins is void. Returns those of which something was."""
        said = [record for record in records if self._said.pop(record.key, None) is not None]
        self._trim()
        return said

    def forget(self, key: K) -> None:
        """A record has gone."""
        self._said.pop(key, None)
        _, size = self._pins.pop(key, (0.0, 0))
        self.pinned_bytes -= size
        self._trim()

    def end(self, now: float) -> list[K]:
        """End the pins and waits whose time is over. Returns the keys of which that may have been."""
        ended: list[K] = []
        while self._ends and self._ends[0][0] <= now:
            when, _, key = heapq.heappop(self._ends)
            if not self._holds(when, key):
                continue
            until, size = self._pins.get(key, (None, 0))
            if until == when:
                del self._pins[key]
                self.pinned_bytes -= size
            else:
                del self._said[key]
            ended.append(key)
        return ended

    def pinned(self, key: K) -> bool:
        """Whether it is."""
        return key in self._pins

    def offer(self, record: Record[K]) -> bool:
        """A leaf: whether it is kept here, in an order or (pinned) in none. If not it is the policy's."""
        if record.key in self._pins:
            record.place = UNQUEUED
            return True
        kind, turn = self._said.get(record.key, (None, 0.0))
        if kind is None:
            return False
        if kind is HintKind.DONE:
            self._done.push(record, turn)
        elif kind is HintKind.TURN_ENDED:
            self._ended.push(record, turn)
        else:
            self._away.push(record, -turn)
        return True

    def first(self, tenant: Hashable | None, now: float, turnover_s: float) -> Record[K] | None:
        """The leaf that goes before any of the policy's."""
        found = self._done.pop(tenant) or self._ended.pop(tenant)
        if found is None:
            found = self._away.pop(tenant)
            if found is not None and -found[0] - now <= max(turnover_s, self._limits.soon_s):
                self._away.push(found[1], found[0])
                found = None
        return None if found is None else found[1]

    def last(self, tenant: Hashable | None) -> Record[K] | None:
        """The leaf that goes when the policy has none."""
        found = self._away.pop(tenant)
        return None if found is None else found[1]

    def check(self, present: dict[K, Record[K]]) -> set[int]:
        """The serial numbers in its queues. Raises `RetentionCorrupt` unless it speaks of `present` only, the bytes
        pinned are right, and what remembers ends is bounded.
        """
        if any(key not in present for key in (*self._said, *self._pins)):
            raise RetentionCorrupt("a hint is kept of a record that has gone")
        if self.pinned_bytes != sum(present[key].size for key in self._pins):
            raise RetentionCorrupt(f"{self.pinned_bytes} bytes are said to be pinned")
        if self.pinned_bytes > self._limits.pin_bytes or len(self._ends) > 2 * len(self) + _SLACK:
            raise RetentionCorrupt("more is pinned, or remembered, than the limit")
        return self._done.serials() | self._ended.serials() | self._away.serials()
