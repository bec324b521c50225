"""Leases on records, and verified reads under them.

A copy that is not what was written is taken out of use (and counted: `quarantine_*`), and every other copy of the
record is tried before a read says so: from the arena to the log, from one record of the log to another (lookup.py), and
from the log to what the arena was given meanwhile.

A read looks at the lease again after its copy: what was pinned by a lease that has ended meanwhile may have been
overwritten while it was copied, so it is `EXPIRED` whatever the digests say.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

from isthmus.contracts.blocks import MAX_BATCH, Outcome, Reason, Tier, Want
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.arena import Record, State
from isthmus.state.kv.arena.copying import flat
from isthmus.state.kv.attendant import Attendant
from isthmus.state.kv.leases import WITHIN, Granted, LeaseTable
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.log.records import Location, LogRead
from isthmus.state.kv.parts import Parts, check_batch

_HIT = Outcome(Reason.HIT, Tier.DRAM)
_NO_GOOD = frozenset({Reason.CORRUPT, Reason.IO_ERROR})

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

    The attendant is told what turned out to be wanted more than once.
    """

    def __init__(self, parts: Parts, attendant: Attendant) -> None:
        self._parts = parts
        self._attendant = attendant
        settings = parts.settings
        self._lock = threading.Lock()
        self._table: LeaseTable[Pin] = LeaseTable(max_leases=settings.max_leases, max_seconds=settings.lease_s)
        self._live: dict[int, StoreLease] = {}
        self._soonest = float("inf")
        self.expired: Callable[[StoreLease], None] | None = None
        """Called, without a lock, for every lease that ended by itself."""

    def __len__(self) -> int:
        return len(self._table)

    def lease(self, keys: Sequence[BlockKey], seconds: float, holder: int = WITHIN) -> StoreLease:
        """See `BlockStore.lease`. With the table of leases full nothing is granted."""
        check_batch(len(keys), MAX_BATCH, "keys")
        self.expire()
        counts = self._parts.counts
        pins: list[Pin | None] = [*self._parts.dram.pin(keys)]
        if self._parts.dram.refused:
            self._attendant.wanted([pin for pin in pins if isinstance(pin, Record)])
        absent = below = 0
        if None in pins:
            below = self._pin_below(keys, pins)
            absent = pins.count(None)
        now = self._parts.clock.monotonic()
        with self._lock:
            full = self._table.full(holder)
            if full:
                lease = StoreLease(self, keys, Granted(0, holder, (None,) * len(keys), now, now))
            else:
                lease = StoreLease(self, keys, self._table.grant(holder, pins, seconds, now))
                self._live[lease.number] = lease
                self._soonest = min(self._soonest, lease.deadline)
        if full:
            self._unpin(pins)
            counts.add("lease", None, Reason.FULL, len(keys))
            return lease
        counts.add("lease", Tier.DRAM, Reason.HIT, len(pins) - below - absent)
        counts.add("lease", Tier.NVME, Reason.HIT, below)
        counts.add("lease", None, Reason.ABSENT, absent)
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
        now = self._parts.clock.monotonic()
        if now < self._soonest:
            return
        with self._lock:
            ended = self._table.expire(now)
            self._soonest = self._table.soonest
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

        def above(want: Want) -> Outcome | None:
            late = self._parts.clock.monotonic() >= deadline
            return Outcome(Reason.LATE) if late else self._from_arena(lease, want)

        found_above = self._parts.crew.together(above, wants, sum(want.into.nbytes for want in wants))
        below = [at for at, one in enumerate(found_above) if one is None or one.reason is Reason.CORRUPT]
        outcomes = [one or Outcome(Reason.ABSENT) for one in found_above]
        if below and self._parts.log is not None:
            found = self._from_log(lease, [wants[index] for index in below], deadline)
            for index, outcome in zip(below, found, strict=True):
                outcomes[index] = outcome or outcomes[index]
                if outcomes[index].reason in _NO_GOOD:
                    outcomes[index] = self._from_newer(lease, wants[index]) or outcomes[index]
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
        if pin is None or (want.shape is not pin.shape and want.shape != pin.shape):
            return Outcome(Reason.ABSENT)
        dram = self._parts.dram
        if pin.state is State.VISIBLE:
            good = dram.arena.fetch(pin, want.first_chunk, want.count, flat(want.into))
            if self._over(lease):
                return Outcome(Reason.EXPIRED, Tier.DRAM)
            if good and pin.state is State.VISIBLE:
                return _HIT
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
            location = pin if isinstance(pin, Location) else self._below(log, pin, want, deadline)
            if location is not None:
                reads.append((index, LogRead(location, want)))
        outcomes = log.read([read for _, read in reads], self._parts.left(deadline))
        over = self._over(lease)
        for (index, _), outcome in zip(reads, outcomes, strict=True):
            found[index] = Outcome(Reason.EXPIRED, Tier.NVME) if over else outcome
        self._attendant.read_below([wants[at].key for at, one in enumerate(found) if one and one.reason is Reason.HIT])
        return found

    def _below(self, log: SegmentLog, pin: Pin | None, want: Want, deadline: float) -> Location | None:
        """Where the log has what was damaged in the arena. It may be on its way there just now."""
        (found,) = log.locate([want.key])
        if found is None and isinstance(pin, Record) and pin.sequence > log.findable:
            log.await_findable(pin.sequence, self._parts.left(deadline))
            (found,) = log.locate([want.key])
        return found

    def _from_newer(self, lease: StoreLease, want: Want) -> Outcome | None:
        """A read from the arena of what was not there when the lease was granted; None: it is not there now either."""
        dram = self._parts.dram
        (record,) = dram.pin([want.key])
        if record is None:
            return None
        try:
            good = record.shape == want.shape and dram.arena.fetch(
                record, want.first_chunk, want.count, flat(want.into)
            )
            visible = record.state is State.VISIBLE
            if not good and visible and record.shape == want.shape:
                dram.quarantine(record)
        finally:
            dram.unpin([record])
        if self._over(lease):
            return Outcome(Reason.EXPIRED, Tier.DRAM)
        return _HIT if good and visible else None

    def _over(self, lease: StoreLease) -> bool:
        return lease.ended or self._parts.clock.monotonic() >= lease.deadline

    def _pin_below(self, keys: Sequence[BlockKey], pins: list[Pin | None]) -> int:
        """Pin in the log what the arena does not have; how many that were. Should it fail nothing is pinned."""
        log = self._parts.log
        if log is None:
            return 0
        found = 0
        missing = [index for index, pin in enumerate(pins) if pin is None]
        with ExitStack() as undo:
            undo.callback(self._unpin, pins)
            for index, location in zip(missing, log.hold([keys[index] for index in missing]), strict=True):
                pins[index] = location
                found += location is not None
            undo.pop_all()
        return found

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
