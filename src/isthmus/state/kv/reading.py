"""Leases on records, and verified reads under them.

A read looks at the lease again after its copy: what was pinned by a lease that has ended meanwhile may have been
overwritten while it was copied, so it is `EXPIRED` whatever the digests say.
"""

import threading
from collections.abc import Sequence
from types import TracebackType

from isthmus.contracts.blocks import MAX_BATCH, Outcome, Reason, Tier, Want
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.arena import Record, State
from isthmus.state.kv.arena.copying import flat
from isthmus.state.kv.leases import Granted, LeaseTable
from isthmus.state.kv.parts import Parts, check_batch

LOCAL = 0
"""The holder of leases within this process."""


class StoreLease:
    """Implements `Lease`. `number` and `holder` name it; it ends at `deadline` (the store's monotonic clock)."""

    __slots__ = ("_reader", "deadline", "ended", "granted", "holder", "number", "pins", "places")

    def __init__(self, reader: "Reader", keys: Sequence[BlockKey], lease: Granted[Record]) -> None:
        self._reader = reader
        self.number = lease.number
        self.holder = lease.holder
        self.deadline = lease.deadline
        self.pins = lease.pins
        self.places = {key: index for index, key in enumerate(keys)}
        self.granted: Sequence[Tier | None] = [None if pin is None else Tier.DRAM for pin in lease.pins]
        self.ended = False

    def release(self) -> None:
        """See `Lease`."""
        self._reader.release(self)

    def __enter__(self) -> "StoreLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Reader:
    """Grants leases and reads under them. Safe from several threads."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        settings = parts.settings
        self._lock = threading.Lock()
        self._table: LeaseTable[Record] = LeaseTable(max_leases=settings.max_leases, max_seconds=settings.lease_s)
        self._live: dict[int, StoreLease] = {}

    def __len__(self) -> int:
        return len(self._table)

    def lease(self, keys: Sequence[BlockKey], seconds: float, holder: int = LOCAL) -> StoreLease:
        """See `BlockStore.lease`. With the table of leases full nothing is granted."""
        check_batch(len(keys), MAX_BATCH, "keys")
        self.expire()
        pins = self._parts.dram.pin(keys)
        now = self._parts.clock.monotonic()
        with self._lock:
            full = self._table.full
            granted = Granted(0, holder, (None,) * len(keys), now, now) if full else None
            if granted is None:
                granted = self._table.grant(holder, pins, seconds, now)
            lease = StoreLease(self, keys, granted)
            if not full:
                self._live[lease.number] = lease
        if full:
            self._unpin(pins)
            self._parts.counts.add("lease", None, Reason.FULL)
        for tier in (Tier.DRAM, Tier.NVME):
            self._parts.counts.add("lease", tier, Reason.HIT, lease.granted.count(tier))
        self._parts.counts.add("lease", None, Reason.ABSENT, lease.granted.count(None))
        return lease

    def release(self, lease: StoreLease) -> None:
        """End a lease; nothing when it has ended."""
        with self._lock:
            ended = self._table.release(lease.number, lease.holder)
            self._mark(ended)
        if ended is not None:
            self._unpin(ended.pins)

    def release_all(self, holder: int) -> int:
        """End all leases of a holder that is gone; how many."""
        with self._lock:
            ended = self._table.release_all(holder)
            for lease in ended:
                self._mark(lease)
        for lease in ended:
            self._unpin(lease.pins)
        return len(ended)

    def expire(self) -> list[StoreLease]:
        """End the leases whose deadline has passed."""
        over: list[StoreLease] = []
        with self._lock:
            ended = self._table.expire(self._parts.clock.monotonic())
            for lease in ended:
                over += self._mark(lease)
        for lease in ended:
            self._unpin(lease.pins)
        self._parts.counts.add("lease", None, Reason.EXPIRED, len(ended))
        return over

    def read(self, lease: StoreLease, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        """See `BlockStore.read`."""
        check_batch(len(wants), MAX_BATCH, "wants")
        deadline = self._parts.until(timeout_s)
        outcomes = []
        for want in wants:
            if self._parts.clock.monotonic() >= deadline:
                outcomes.append(Outcome(Reason.LATE))
            else:
                outcomes.append(self._from_arena(lease, want))
        self._parts.counts.add_outcomes("read", outcomes)
        return outcomes

    def _from_arena(self, lease: StoreLease, want: Want) -> Outcome:
        index = lease.places.get(want.key)
        record = None if index is None else lease.pins[index]
        if self._over(lease):
            return Outcome(Reason.EXPIRED)
        if record is None or want.shape != record.shape:
            return Outcome(Reason.ABSENT)
        dram = self._parts.dram
        if record.state is State.VISIBLE:
            good = dram.arena.fetch(record, want.first_chunk, want.count, flat(want.into))
            if self._over(lease):
                return Outcome(Reason.EXPIRED, Tier.DRAM)
            if good and record.state is State.VISIBLE:
                return Outcome(Reason.HIT, Tier.DRAM)
            if not good:
                dram.quarantine(record)
        return Outcome(Reason.CORRUPT if record.state is State.GONE else Reason.FORGOTTEN, Tier.DRAM)

    def _over(self, lease: StoreLease) -> bool:
        return lease.ended or self._parts.clock.monotonic() >= lease.deadline

    def _mark(self, ended: Granted[Record] | None) -> list[StoreLease]:
        """Whoever reads under it must know that it has ended before what it pinned is freed."""
        if ended is None:
            return []
        lease = self._live.pop(ended.number)
        lease.ended = True
        return [lease]

    def _unpin(self, pins: Sequence[Record | None]) -> None:
        self._parts.dram.unpin([pin for pin in pins if pin is not None])


def own_lease(lease: object) -> StoreLease:
    """`lease` as one of this store's. Raises `InvalidInput` when it is another's."""
    if not isinstance(lease, StoreLease):
        raise InvalidInput("the lease is not one of this store", "lease")
    return lease
