"""Retention over a tree: any policy's order, hints in front of it, quotas before both.

The records present are a forest by their parents. Who may leave is found among its leaves: a policy (`Order`) says
which leaf is next, and when a leaf is chosen its parent may become one. So a policy keeps its own order, and the tree
only decides when a record comes up in it: not before its last child has gone.

Three things keep an access cheap. A use notes itself in the records and moves nothing. A new record is not queued at
once, because most get a child before anybody asks for victims. And what is held goes to the back of the order when it
comes up, so it is not met again at every call.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count
from typing import Generic

from isthmus.contracts.blocks import HintKind, Lifetime
from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.retention.hints import HintLimits, Hints
from isthmus.state.kv.retention.order import FRESH, UNQUEUED, MakeOrder, Record
from isthmus.state.kv.retention.port import Entry, K, RetentionCorrupt
from isthmus.state.kv.retention.quotas import Quotas, TenantBytes

_MOST_FRESH = 4096
_TURNOVER_WEIGHT = 0.125
_WHOLE_PREFIX = frozenset({HintKind.PIN, HintKind.PREFETCH})
"""Hints that keep are meant for all of a sequence; those that let go only for what is its alone."""


class LeafFirst(Generic[K]):
    """Implements `Retention`. Made by `policies.make`."""

    def __init__(self, order: MakeOrder[K], quotas: Quotas, limits: HintLimits) -> None:
        serials: Iterator[int] = count(1)
        self._records: dict[K, Record[K]] = {}
        self._orphans: dict[K, int] = {}
        """Of keys that are absent: how many records present name them as their parent."""
        self._order = order(self._records, serials)
        self._hints: Hints[K] = Hints(limits, serials)
        self._tenants = TenantBytes(quotas)
        self._fresh: list[Record[K]] = []
        self._proposed: dict[K, Record[K]] = {}
        self._hinted = False
        """Whether anything may have been said of any record."""
        self.turnover_s = 0.0
        """For how long a record that the policy gives up was unused, averaged over the latest few."""

    def __len__(self) -> int:
        """See `Retention`."""
        return len(self._records)

    def used(self, tenant: Hashable | None = None) -> int:
        """See `Retention`."""
        return self._tenants.total if tenant is None else self._tenants.used(tenant)

    def insert(self, entry: Entry[K], now: float) -> None:
        """See `Retention`. A record of lifetime `SHORT` comes in as if it had been said to be done."""
        if self._proposed:
            self._withdraw()
        key, parent = entry.key, entry.parent
        record = self._records.get(key)
        if record is not None:
            if record.size != entry.size or record.tenant != entry.tenant:
                raise InvalidInput("the record is here already, with another size or tenant", "entry")
            self.touch((key,), now)
            return
        if entry.size < 1:
            raise InvalidInput(f"a record has at least 1 byte, not {entry.size}", "entry.size")
        record = Record(key, parent, entry.size, entry.tenant, entry.lifetime, now)
        if self._orphans:
            record.children = self._orphans.pop(key, 0)
        self._records[key] = record
        if parent is not None:
            above = self._records.get(parent)
            if above is None:
                self._orphans[parent] = self._orphans.get(parent, 0) + 1
            else:
                above.children += 1
        self._tenants.add(entry.tenant, entry.size)
        self._order.admit(record)
        if entry.lifetime is Lifetime.SHORT:
            self._hints.say(record, HintKind.DONE, 0.0, now)
            self._hinted = True
        if not record.children:
            record.place = FRESH
            self._fresh.append(record)
            if len(self._fresh) > _MOST_FRESH:
                self._queue_fresh()

    def touch(self, keys: Sequence[K], now: float) -> None:
        """See `Retention`."""
        if self._proposed:
            self._withdraw()
        get = self._records.get
        found = [record for key in keys if (record := get(key)) is not None]
        if not found:
            return
        self._order.used(found, now)
        if self._hinted:
            for record in self._hints.used(found):
                self._offer_anew(record)

    def hint(self, keys: Sequence[K], kind: HintKind, seconds: float, now: float) -> None:
        """See `Retention`. What lets go (`DONE`, `TURN_ENDED`, `WAITING`) is taken from the last key backwards, up to
        the first record that is shared: of lifetime `SHARED`, or with more than one child.
        """
        if self._proposed:
            self._withdraw()
        for key in reversed(keys):
            record = self._records.get(key)
            if record is None:
                continue
            if kind not in _WHOLE_PREFIX and (record.children > 1 or record.lifetime is Lifetime.SHARED):
                return
            self._hints.say(record, kind, seconds, now)
            self._hinted = True
            self._offer_anew(record)

    def remove(self, key: K) -> None:
        """See `Retention`."""
        record = self._records.pop(key, None)
        if record is None:
            return
        record.place = UNQUEUED
        if self._proposed.pop(key, None) is None:
            self._order.leave(record, evicted=False)
        if self._hinted:
            self._hints.forget(key)
        self._tenants.add(record.tenant, -record.size)
        if record.children:
            self._orphans[key] = record.children
        if record.parent is None:
            return
        above = self._records.get(record.parent)
        if above is None:
            left = self._orphans.pop(record.parent) - 1
            if left:
                self._orphans[record.parent] = left
            return
        above.children -= 1
        if not above.children and above.place == UNQUEUED and record.parent not in self._proposed:
            self._offer(above)

    def victims(self, size: int, now: float, held: Callable[[K], bool], tenant: Hashable | None = None) -> list[K]:
        """See `Retention`."""
        if self._proposed:
            self._withdraw()
        self._queue_fresh()
        if self._hinted:
            for key in self._hints.end(now):
                self._offer_anew(self._records[key])
            self._hinted = len(self._hints) > 0
        above: list[Record[K]] = []
        try:
            gathered = 0
            if tenant is None:
                for over, excess in self._tenants.over():
                    if gathered < size:
                        gathered += self._gather(min(excess, size - gathered), now, held, over, above)
            self._gather(size - gathered, now, held, tenant, above)
        finally:
            for parent in above:
                parent.children += 1
        return list(self._proposed)

    def _gather(
        self, size: int, now: float, held: Callable[[K], bool], tenant: Hashable | None, above: list[Record[K]]
    ) -> int:
        """Choose leaves for `size` bytes. Returns how many bytes they have. Each takes itself off its parent's
        children, so that the parent may be next; the parents are added to `above`, for the caller to set right.
        """
        gathered = 0
        aside: list[Record[K]] = []
        try:
            while gathered < size:
                record, own = self._next(tenant, now) if self._hinted else (self._order.take(tenant), True)
                if record is None:
                    break
                aside.append(record)
                if held(record.key):
                    continue
                aside.pop()
                if own:
                    self.turnover_s += _TURNOVER_WEIGHT * (now - record.used - self.turnover_s)
                gathered += record.size
                self._choose(record, above)
        finally:
            for record in aside:
                self._order.renew(record)
                self._offer(record)
        return gathered

    def _next(self, tenant: Hashable | None, now: float) -> tuple[Record[K] | None, bool]:
        """The leaf that should go first, in no queue any more; and whether it is by the policy's choice."""
        if (record := self._hints.first(tenant, now, self.turnover_s)) is not None:
            return record, False
        if (record := self._order.take(tenant)) is not None:
            return record, True
        return self._hints.last(tenant), False

    def _choose(self, record: Record[K], above: list[Record[K]]) -> None:
        self._proposed[record.key] = record
        self._order.leave(record, evicted=True)
        if record.parent is None:
            return
        parent = self._records.get(record.parent)
        if parent is None:
            return
        above.append(parent)
        parent.children -= 1
        if not parent.children and parent.place == UNQUEUED:
            self._offer(parent)

    def _withdraw(self) -> None:
        """What was proposed and is still here stays."""
        proposed, self._proposed = self._proposed, {}
        for record in proposed.values():
            self._order.admit(record)
            if not record.children:
                self._offer(record)

    def _queue_fresh(self) -> None:
        fresh, self._fresh = self._fresh, []
        for record in fresh:
            if record.place == FRESH:
                record.place = UNQUEUED
                if not record.children:
                    self._offer(record)

    def _offer(self, record: Record[K]) -> None:
        """A leaf that is in no queue goes to where it belongs."""
        if not (self._hinted and self._hints.offer(record)):
            self._order.offer(record)

    def _offer_anew(self, record: Record[K]) -> None:
        """What is said of a record has changed: if it is queued as a leaf, or could be, it is queued anew."""
        if record.place != FRESH:
            record.place = UNQUEUED
            if not record.children:
                self._offer(record)

    def check(self) -> None:
        """Raise `RetentionCorrupt` unless the children are counted right, every leaf can be found (or is proposed, or
        pinned), and the accounts of policy, hints and tenants add up. Costs as much as there is.
        """
        children: dict[K, int] = {}
        used: dict[Hashable, int] = {}
        for record in self._records.values():
            used[record.tenant] = used.get(record.tenant, 0) + record.size
            if record.parent is not None:
                children[record.parent] = children.get(record.parent, 0) + 1
        if any(record.children != children.pop(key, 0) for key, record in self._records.items()):
            raise RetentionCorrupt("a child count is wrong")
        if self._orphans != children:
            raise RetentionCorrupt("the records without their parent are miscounted")
        self._tenants.check(used)
        queued = self._hints.check(self._records)
        queued |= self._order.check(record for key, record in self._records.items() if key not in self._proposed)
        fresh = {id(record) for record in self._fresh}
        if len(self._fresh) > _MOST_FRESH:
            raise RetentionCorrupt(f"{len(self._fresh)} records wait to be queued")
        for key, record in self._records.items():
            if record.children or key in self._proposed or self._hints.pinned(key):
                continue
            if record.place not in queued and not (record.place == FRESH and id(record) in fresh):
                raise RetentionCorrupt("a leaf cannot be found")
