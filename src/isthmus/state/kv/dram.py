"""The DRAM tier: the arena, and retention that says which of its records leave it. Safe from several threads.

Promises: a record that somebody reads or fills is never evicted; one that the log has taken in, but does not find yet,
is not evicted before the log finds it, or has not come to that within a bound (`evict_dram_unwritten` counts those:
they are missed until they are found); one that is not durable there goes after those that are; a tenant over its quota
pays for its own records; a search for room ends (what it looks at is bounded). The lock is held for bookkeeping only,
never for a copy, a digest or a wait.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from isthmus.contracts.blocks import HintKind, Lifetime, Owner, Reason, Shape, Tier, TierStats
from isthmus.contracts.clock import Clock
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.arena import Arena, Record, State, pages_of
from isthmus.state.kv.arena.extents import PAGE_BYTES
from isthmus.state.kv.counting import Counts
from isthmus.state.kv.retention.policies import make
from isthmus.state.kv.retention.port import Entry, Retention
from isthmus.state.kv.retention.quotas import Quotas
from isthmus.state.kv.scopes import Scope, Scopes
from isthmus.state.kv.settings import StoreSettings

PATIENCE_S = 1.0
"""How long who needs room waits, at most, for the log to find what could make room: it takes milliseconds."""
_ROUNDS = 4
_AHEAD_PART = 256
"""Of the arena, which is emptied at once when there is no room: what must not go yet is met again at each search for
what may, so a search for one small record after the other would cost more than the records.
"""
_NEIGHBOURS = 4096
"""Extents looked at for room in one piece, when there is enough of it in several."""


Spare = Callable[[Record], bool]


def _nothing(_: Record) -> bool:
    return False


class Below(Protocol):
    """The log under the arena, as far as it matters to what leaves the arena (see `SegmentLog`)."""

    @property
    def durable(self) -> int:
        """Up to which sequence its records are durable."""
        ...

    @property
    def findable(self) -> int:
        """Up to which sequence its records are found."""
        ...

    def await_findable(self, sequence: int, timeout_s: float) -> bool:
        """Wait until those up to `sequence` are found; whether they are."""
        ...


class _OnTheirWay(Exception):
    """There would be room, but for records that the log does not find yet: up to `sequence`."""

    def __init__(self, sequence: int) -> None:
        super().__init__(sequence)
        self.sequence = sequence


class Dram:
    """The records in the arena. `below`: the log under it."""

    def __init__(
        self,
        arena: Arena,
        settings: StoreSettings,
        clock: Clock,
        *,
        scopes: Scopes,
        counts: Counts,
        below: Below | None,
    ) -> None:
        self.arena = arena
        self._clock = clock
        self._scopes = scopes
        self._counts = counts
        self._below = below
        self._quotas = Quotas(settings.tenant_bytes or None)
        self._retention: Retention[BlockKey] = make(settings.policy, arena.capacity, self._quotas)
        self._lock = threading.Lock()
        self.refused: set[BlockKey] = set()
        """Of records that were not worth the wear of the log when they came; they may become so."""

    def begin(
        self,
        key: BlockKey,
        parent: BlockKey | None,
        owner: Owner,
        shape: Shape,
        lifetime: Lifetime,
        *,
        patience_s: float = PATIENCE_S,
    ) -> Record | Reason:
        """Room for a record, evicting what must go for it; pinned and not visible. Else why there is none.

        `patience_s`: how long it may wait for the log to find what could go, at most `PATIENCE_S`.
        """
        end = self._clock.monotonic() + min(patience_s, PATIENCE_S)
        while True:
            left = end - self._clock.monotonic()
            try:
                return self._begin(key, parent, owner, shape, lifetime, patient=left > 0)
            except _OnTheirWay as others:
                if self._below is not None and not self._below.await_findable(others.sequence, left):
                    end = self._clock.monotonic()  # it cannot be written, or not in time

    def _begin(
        self, key: BlockKey, parent: BlockKey | None, owner: Owner, shape: Shape, lifetime: Lifetime, *, patient: bool
    ) -> Record | Reason:
        """As `begin`. Raises `_OnTheirWay` when `patient`, instead of evicting what is found nowhere else yet."""
        size = pages_of(shape.record_bytes) * PAGE_BYTES
        now = self._clock.monotonic()
        with self._lock:
            if self._scopes.refuses(owner):
                return Reason.FORGOTTEN
            if self.arena.holds(key):
                self._retention.touch((key,), now)
                return Reason.PRESENT
            if size > self.arena.largest:
                return Reason.TOO_LARGE
            tenant = owner.namespace_id
            excess = self._quotas.excess(tenant, self._retention.used(tenant), size)
            if excess and not self._make_way(excess, now, tenant, patient=patient):
                return Reason.QUOTA
            record = self.arena.begin(key, parent, owner, shape, lifetime)
            for _ in range(_ROUNDS):
                if record is not None:
                    break
                short = size - (self.arena.capacity - self.arena.used)
                ahead = self.arena.capacity // _AHEAD_PART
                if short > 0 and not self._make_way(short, now, ahead=ahead, patient=patient):
                    return Reason.FULL
                record = self.arena.begin(key, parent, owner, shape, lifetime)
                if record is None and not self._make_room_in_one_piece(size, now, patient):
                    return Reason.FULL
            if record is None:
                return Reason.FULL
            self._retention.insert(Entry(key, parent, size, tenant, lifetime), now)
            return record

    def publish(self, record: Record) -> bool:
        """The record is complete: visible, unless it was forgotten meanwhile. It stays pinned either way."""
        with self._lock:
            if record.state is not State.WRITING or self._scopes.refuses(record.owner):
                self._remove(record)
                return False
            self.arena.publish(record)
            return True

    def give_up(self, record: Record) -> None:
        """The record that began will not be complete."""
        with self._lock:
            self._remove(record)
            self.arena.unpin(record)

    def where(self, keys: Sequence[BlockKey]) -> list[Record | None]:
        """The visible records of these keys. Nothing keeps them here."""
        with self._lock:
            return [self.arena.find(key) for key in keys]

    def pin(self, keys: Sequence[BlockKey], *, use: bool = True) -> list[Record | None]:
        """The visible records of these keys, pinned. With `use` they count as used."""
        with self._lock:
            found = [self.arena.find(key) for key in keys]
            for record in found:
                if record is not None:
                    self.arena.pin(record)
                    record.hits += use
            if use:
                self._retention.touch(keys, self._clock.monotonic())
            return found

    def refuse(self, record: Record) -> None:
        """The log did not take the record: see `refused`."""
        with self._lock:
            if record.state is State.VISIBLE:
                self.refused.add(record.key)

    def append(self, record: Record, sequence: int) -> None:
        """The log took the record."""
        with self._lock:
            record.sequence = sequence
            self.refused.discard(record.key)

    def unpin(self, records: Sequence[Record]) -> None:
        """Undo `pin`, or the pin of a record that began."""
        if records:
            with self._lock:
                for record in records:
                    self.arena.unpin(record)

    def quarantine(self, record: Record) -> bool:
        """Its bytes are not what was written: nobody finds it any more, and its memory is not used again. False: it had
        left already, and they may have been erased.
        """
        with self._lock:
            found = record.state is State.VISIBLE
            if found:
                self.refused.discard(record.key)
                self._retention.remove(record.key)
                self.arena.quarantine(record)
                self._counts.add("quarantine", Tier.DRAM, Reason.CORRUPT)
        if found:  # its pages are nobody else's from now on
            self.arena.erase_bytes(record)
        return found

    def hint(self, kind: HintKind, keys: Sequence[BlockKey], seconds: float) -> None:
        """What is known of the future of some records."""
        with self._lock:
            self._retention.hint(keys, kind, seconds, self._clock.monotonic())

    def evict(self, size: int, timeout_s: float) -> int:
        """Evict records of at least `size` bytes, if there are so many that may go; how many bytes went. Those that the
        log does not find yet do not go before; they are waited for, up to `timeout_s`.
        """
        end = self._clock.monotonic() + timeout_s
        gone = 0
        while True:
            with self._lock:
                before, now = self.arena.used, self._clock.monotonic()
                self._evict(self._victims(size - gone, now, None, self._unfound()), "asked")
                gone += before - self.arena.used
                rest = self._victims(size - gone, now, None, _nothing) if gone < size else []
            if not rest or self._below is None or now >= end:
                return gone
            last = max(record.sequence for record in rest)
            if not self._below.await_findable(last, max(0.0, end - self._clock.monotonic())):
                return gone

    def take_out(self, scope: Scope) -> list[Record]:
        """Everything of the scope, pinned: nobody finds it any more, and its bytes are to be erased."""
        with self._lock:
            found = [record for record in self.arena if scope.covers(record.owner)]
            for record in found:
                self.arena.pin(record)
                self._remove(record)
            return found

    def wipe_free(self) -> None:
        """Zero all memory that is free: what was evicted before it was forgotten is not left lying there."""
        page = 0
        while True:
            with self._lock:
                taken = self.arena.take_free(page)
            if taken is None:
                return
            page, pages = taken
            self.arena.wipe(page, pages)
            with self._lock:
                self.arena.give_free(page)
            page += pages

    def records(self) -> list[Record]:
        """All visible records now."""
        with self._lock:
            return list(self.arena)

    def stats(self) -> TierStats:
        """Sizes now."""
        with self._lock:
            return TierStats(Tier.DRAM, self.arena.capacity, self.arena.used, len(self.arena))

    def check(self) -> None:
        """Raise `ArenaCorrupt` unless the conservation law holds. For tests: it costs as much as there is."""
        with self._lock:
            self.arena.check()

    def _remove(self, record: Record) -> None:
        if record.state in (State.WRITING, State.VISIBLE):
            self.refused.discard(record.key)
            self._retention.remove(record.key)
            self.arena.remove(record)

    def _make_way(
        self, size: int, now: float, tenant: bytes | None = None, *, ahead: int = 0, patient: bool = False
    ) -> bool:
        """Evict `size` bytes (of one tenant); whether there was so much that may go. Only then is anything evicted, and
        up to `ahead` bytes of what is durable below. Raises `_OnTheirWay` when `patient`.
        """
        victims = self._victims(max(size, ahead), now, tenant, self._undurable())
        if _bytes(victims) < size:
            victims = self._victims(size, now, tenant, self._unfound())
        if _bytes(victims) < size:
            victims = self._victims(size, now, tenant, _nothing)
            if _bytes(victims) < size:
                return False
            self._give_up_waiting(victims, patient)
        self._evict(victims, "evicted")
        return True

    def _undurable(self) -> Spare:
        durable = 0 if self._below is None else self._below.durable
        return lambda record: record.sequence > durable

    def _unfound(self) -> Spare:
        """Which records the log was given, and does not find yet."""
        if self._below is None:
            return _nothing
        findable = self._below.findable
        return lambda record: record.sequence > findable

    def _give_up_waiting(self, victims: Sequence[Record], patient: bool) -> None:
        """Some of `victims` may not be found yet: raises `_OnTheirWay` when `patient`, or counts them."""
        unfound = [record.sequence for record in filter(self._unfound(), victims)]
        if unfound and patient:
            raise _OnTheirWay(max(unfound))
        self._counts.add("evict", Tier.DRAM, "unwritten", len(unfound))

    def _victims(self, size: int, now: float, tenant: bytes | None, spare: Spare) -> list[Record]:
        """Records of `size` bytes, or fewer if that is all, that may go: none pinned and none to `spare`."""

        def held(key: BlockKey) -> bool:
            record = self.arena.find(key)
            return record is None or record.pins > 0 or spare(record)

        found = [self.arena.find(key) for key in self._retention.victims(size, now, held, tenant)]
        return [record for record in found if record is not None]

    def _make_room_in_one_piece(self, size: int, now: float, patient: bool) -> bool:
        """There is room enough, but scattered: evict neighbours of what would go first until it is in one piece. Raises
        `_OnTheirWay` when `patient`.
        """
        first = self._victims(1, now, None, _nothing)
        if not first:
            return False
        around = self.arena.around(first[0], size, _NEIGHBOURS, self._unfound())
        if not around:
            around = self.arena.around(first[0], size, _NEIGHBOURS)
            self._give_up_waiting(around, patient)
        self._evict(around, "moved_over")
        return bool(around)

    def _evict(self, records: Sequence[Record], why: str) -> None:
        for record in records:
            self._remove(record)
        self._counts.add("evict", Tier.DRAM, why, len(records))


def _bytes(records: Sequence[Record]) -> int:
    return sum(record.page_bytes for record in records)
