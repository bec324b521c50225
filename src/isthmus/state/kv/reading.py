"""Leases on records, and verified reads under them.

A read looks at the lease again after its copy: what was pinned by a lease that has ended meanwhile may have been
overwritten while it was copied, so it is `EXPIRED` whatever the digests say.
"""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from isthmus.contracts.blocks import MAX_BATCH, Outcome, Reason, Tier, Want
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.arena import Record, State
from isthmus.state.kv.arena.copying import flat
from isthmus.state.kv.leases import Granted, LeaseTable
from isthmus.state.kv.log.records import Location, LogRead
from isthmus.state.kv.parts import Parts, check_batch

LOCAL = 0
"""The holder of leases within this process."""

Pin = Record | Location


class StoreLease:
    """Implements `Lease`. `number` and `holder` name it; it ends at `deadline` (the store's monotonic clock)."""

    __slots__ = ("_reader", "deadline", "ended", "granted", "granted_at", "holder", "number", "pins", "places")

    def __init__(self, reader: "Reader", keys: Sequence[BlockKey], lease: Granted[Pin]) -> None:
        self._reader = reader
        self.number = lease.number
        self.holder = lease.holder
        self.granted_at = lease.granted_at
        self.deadline = lease.deadline
        self.pins = lease.pins
        self.places = {key: index for index, key in enumerate(keys)}
        self.granted: Sequence[Tier | None] = [_tier(pin) for pin in lease.pins]
        self.ended = lease.number == 0

    def release(self) -> None:
        """See `Lease`."""
        self._reader.release(self.number, self.holder)

    def __enter__(self) -> "StoreLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Reader:
    """Grants leases and reads under them. Safe from several threads.

    `read_below` is told which records came from the log, so that those wanted again may be brought up.
    """

    def __init__(self, parts: Parts, read_below: Callable[[Sequence[BlockKey]], None]) -> None:
        self._parts = parts
        self._read_below = read_below
        settings = parts.settings
        self._lock = threading.Lock()
        self._table: LeaseTable[Pin] = LeaseTable(max_leases=settings.max_leases, max_seconds=settings.lease_s)
        self._live: dict[int, StoreLease] = {}
        self.expired: Callable[[StoreLease], None] | None = None
        """Called, without a lock, for every lease that ended by itself."""

    def __len__(self) -> int:
        return len(self._table)

    def lease(self, keys: Sequence[BlockKey], seconds: float, holder: int = LOCAL) -> StoreLease:
        """See `BlockStore.lease`. With the table of leases full nothing is granted."""
        check_batch(len(keys), MAX_BATCH, "keys")
        self.expire()
        counts = self._parts.counts
        pins: list[Pin | None] = [*self._parts.dram.pin(keys)]
        self._pin_below(keys, pins)
        now = self._parts.clock.monotonic()
        with self._lock:
            full = self._table.full
            if full:
                lease = StoreLease(self, keys, Granted(0, holder, (None,) * len(keys), now, now))
            else:
                lease = StoreLease(self, keys, self._table.grant(holder, pins, seconds, now))
                self._live[lease.number] = lease
        if full:
            self._unpin(pins)
            counts.add("lease", None, Reason.FULL)
        for tier in (Tier.DRAM, Tier.NVME):
            counts.add("lease", tier, Reason.HIT, lease.granted.count(tier))
        counts.add("lease", None, Reason.ABSENT, lease.granted.count(None))
        return lease

    def find(self, number: int, holder: int) -> StoreLease | None:
        """The lease of this number, if it is the holder's and has not ended."""
        with self._lock:
            found = self._table.get(number, holder, self._parts.clock.monotonic())
            return None if found is None else self._live[number]

    def release(self, number: int, holder: int) -> None:
        """End a lease; nothing when it has ended."""
        with self._lock:
            ended = self._table.release(number, holder)
            if ended is not None:
                self._live.pop(number).ended = True
        if ended is not None:
            self._unpin(ended.pins)

    def release_all(self, holder: int) -> int:
        """End all leases of a holder that is gone; how many."""
        with self._lock:
            ended = self._table.release_all(holder)
            for lease in ended:
                self._live.pop(lease.number).ended = True
        for lease in ended:
            self._unpin(lease.pins)
        return len(ended)

    def expire(self) -> None:
        """End the leases whose deadline has passed."""
        with self._lock:
            ended = self._table.expire(self._parts.clock.monotonic())
            over = [self._live.pop(lease.number) for lease in ended]
            for lease in over:
                lease.ended = True  # whoever reads under it has to know before what it pinned is freed
        for lease in over:
            self._unpin(lease.pins)
            if self.expired is not None:
                self.expired(lease)
        self._parts.counts.add("lease", None, Reason.EXPIRED, len(over))

    def read(self, lease: StoreLease, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        """See `BlockStore.read`."""
        check_batch(len(wants), MAX_BATCH, "wants")
        deadline = self._parts.until(timeout_s)
        outcomes: list[Outcome] = []
        below: list[int] = []
        for index, want in enumerate(wants):
            if self._parts.clock.monotonic() >= deadline:
                outcomes.append(Outcome(Reason.LATE))
                continue
            outcome = self._from_arena(lease, want)
            if outcome is None or outcome.reason is Reason.CORRUPT:
                below.append(index)
            outcomes.append(outcome or Outcome(Reason.ABSENT))
        if below and self._parts.log is not None:
            found = self._from_log(lease, [wants[index] for index in below], deadline)
            for index, outcome in zip(below, found, strict=True):
                outcomes[index] = outcome or outcomes[index]
        self._parts.counts.add_outcomes("read", outcomes)
        return outcomes

    def _from_arena(self, lease: StoreLease, want: Want) -> Outcome | None:
        """None: it is in the log only."""
        index = lease.places.get(want.key)
        pin = None if index is None else lease.pins[index]
        if self._over(lease):
            return Outcome(Reason.EXPIRED)
        if isinstance(pin, Location):
            return None
        if pin is None or want.shape != pin.shape:
            return Outcome(Reason.ABSENT)
        dram = self._parts.dram
        if pin.state is State.VISIBLE:
            good = dram.arena.fetch(pin, want.first_chunk, want.count, flat(want.into))
            if self._over(lease):
                return Outcome(Reason.EXPIRED, Tier.DRAM)
            if good and pin.state is State.VISIBLE:
                return Outcome(Reason.HIT, Tier.DRAM)
            if not good:
                dram.quarantine(pin)
        return Outcome(Reason.CORRUPT if pin.state is State.GONE else Reason.FORGOTTEN, Tier.DRAM)

    def _from_log(self, lease: StoreLease, wants: Sequence[Want], deadline: float) -> list[Outcome | None]:
        """None: the log has no copy of what was damaged in the arena."""
        log = self._parts.log
        if log is None:
            return [None] * len(wants)
        found: list[Outcome | None] = [None] * len(wants)
        reads: list[tuple[int, LogRead]] = []
        for index, want in enumerate(wants):
            pin = lease.pins[lease.places[want.key]]
            location = pin if isinstance(pin, Location) else log.locate([want.key])[0]
            if location is not None:
                reads.append((index, LogRead(location, want)))
        outcomes = log.read([read for _, read in reads], self._parts.left(deadline))
        over = self._over(lease)
        for (index, _), outcome in zip(reads, outcomes, strict=True):
            found[index] = Outcome(Reason.EXPIRED, Tier.NVME) if over else outcome
        self._read_below([wants[at].key for at, one in enumerate(found) if one and one.reason is Reason.HIT])
        return found

    def _over(self, lease: StoreLease) -> bool:
        return lease.ended or self._parts.clock.monotonic() >= lease.deadline

    def _pin_below(self, keys: Sequence[BlockKey], pins: list[Pin | None]) -> None:
        """Pin in the log what the arena does not have."""
        log = self._parts.log
        missing = [index for index, pin in enumerate(pins) if pin is None]
        if log is None or not missing:
            return
        for index, location in zip(missing, log.locate([keys[index] for index in missing]), strict=True):
            if location is not None and log.pin(location):
                pins[index] = location

    def _unpin(self, pins: Sequence[Pin | None]) -> None:
        self._parts.dram.unpin([pin for pin in pins if isinstance(pin, Record)])
        if self._parts.log is not None:
            for pin in pins:
                if isinstance(pin, Location):
                    self._parts.log.unpin(pin)


def own_lease(lease: object) -> StoreLease:
    """`lease` as one of this store's. Raises `InvalidInput` when it is another's."""
    if not isinstance(lease, StoreLease):
        raise InvalidInput("the lease is not one of this store", "lease")
    return lease


def _tier(pin: Pin | None) -> Tier | None:
    if pin is None:
        return None
    return Tier.DRAM if isinstance(pin, Record) else Tier.NVME
