"""What an administrator may do to a store: forget, list, verify, evict, compact."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from isthmus.contracts.blocks import NO_SESSION, Erasure, Lifetime, Owner, RecordKind, Tier
from isthmus.contracts.errors import DeadlineExceeded, InvalidInput, StoreUnavailable
from isthmus.state.kv.arena.arena import Record
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.log import erasure as log_erasure
from isthmus.state.kv.parts import Parts
from isthmus.state.kv.scopes import Scope


class Kept(msgspec.Struct, frozen=True):
    """A record that a tier keeps, for people. `segment`: of the log; -1 in DRAM."""

    key: bytes
    namespace_id: bytes
    session_id: bytes
    tier: Tier
    kind: RecordKind
    record_bytes: int
    lifetime: Lifetime
    sequence: int = 0
    pins: int = 0
    segment: int = -1


class Checked(msgspec.Struct, frozen=True):
    """How a verification went: records that are what was written, that are not (they are quarantined now), that could
    not be read.
    """

    dram_good: int = 0
    dram_corrupt: int = 0
    nvme_good: int = 0
    nvme_corrupt: int = 0
    nvme_unreadable: int = 0


@dataclass(frozen=True, slots=True)
class Upkeep:
    """Works on the tiers of one store. Safe from several threads."""

    parts: Parts

    def forget(self, namespace_id: bytes, session_id: bytes = NO_SESSION) -> Erasure:
        """Erase everything of a namespace, or of one session of it, from every tier; durable when this returns.

        Raises `StoreUnavailable` when writes under way do not end within the store's limit, and what the log raises:
        then it has to be asked for again.
        """
        owner = Owner(namespace_id, session_id)
        scope = Scope(owner.namespace_id, owner.session_id)
        scopes, dram, log = self.parts.scopes, self.parts.dram, self.parts.log
        number: int | None = None
        writes = scopes.begin(scope)
        try:
            records = dram.take_out(scope)
            for record in records:
                dram.arena.erase_bytes(record)
            dram.unpin(records)
            if not scopes.wait(writes, self.parts.settings.call_s):
                raise StoreUnavailable("writes of what is to be forgotten have not ended: ask again")
            dram.wipe_free()
            number = 0 if log is None else log.forget(log_erasure.Scope.of(namespace_id, session_id))
        finally:
            erasure = scopes.end(scope, number)
        if erasure is None:
            raise StoreUnavailable("the erasure was not taken down: ask again")
        return erasure

    def ls(self, tier: Tier, skip: int, limit: int) -> list[Kept]:
        """At most `limit` records of a tier after the first `skip`, in no particular order."""
        if tier is Tier.DRAM:
            return [_in_dram(record) for record in self.parts.dram.records()[skip : skip + limit]]
        return list(itertools.islice(self._in_log(tier), skip, skip + limit))

    def verify(self, timeout_s: float) -> Checked:
        """Read and verify everything; what is damaged is quarantined. Raises `DeadlineExceeded` after `timeout_s`."""
        deadline = self.parts.clock.monotonic() + timeout_s
        good = corrupt = 0
        for record in self.parts.dram.records():
            whole = self._intact(record)
            if whole is not None:
                good, corrupt = good + whole, corrupt + (not whole)
            self._in_time(deadline, good + corrupt, "records in DRAM")
        if self.parts.log is None:
            return Checked(good, corrupt)
        below = self.parts.log.verify(lambda done, _: self._in_time(deadline, done, "segments"))
        return Checked(good, corrupt, below.good, below.corrupt, below.unreadable)

    def evict(self, tier: Tier, size: int, timeout_s: float) -> int:
        """Evict at least `size` bytes from a tier, or all that may go; how many bytes went."""
        if tier is Tier.DRAM:
            return self.parts.dram.evict(size, timeout_s)
        if tier is Tier.NVME and self.parts.log is not None:
            return self.parts.log.evict(size, timeout_s)
        raise InvalidInput(f"this store has no tier {tier}", "tier")

    def compact(self, timeout_s: float) -> int:
        """Rewrite what is left of segments that hold little; how many segments that freed."""
        return 0 if self.parts.log is None else self.parts.log.compact(timeout_s)

    def _intact(self, record: Record) -> bool | None:
        """Whether the bytes in the arena have their digests; None: it has gone meanwhile."""
        dram = self.parts.dram
        (pinned,) = dram.pin([record.key], use=False)
        if pinned is None:
            return None
        try:
            if digests_of(dram.arena.view(pinned), pinned.shape.chunk_bytes) == pinned.digests:
                return True
            return False if dram.quarantine(pinned) else None
        finally:
            dram.unpin([pinned])

    def _in_time(self, deadline: float, done: int, what: str) -> None:
        if self.parts.clock.monotonic() >= deadline:
            raise DeadlineExceeded(f"verified {done} {what}, then the time was over")

    def _in_log(self, tier: Tier) -> Iterator[Kept]:
        if tier is not Tier.NVME or self.parts.log is None:
            raise InvalidInput(f"this store has no tier {tier}", "tier")
        for one in self.parts.log.scan():
            yield Kept(
                key=one.key,
                namespace_id=one.owner.namespace_id,
                session_id=one.owner.session_id,
                tier=Tier.NVME,
                kind=one.shape.kind,
                record_bytes=one.shape.record_bytes,
                lifetime=one.lifetime,
                sequence=one.sequence,
                segment=one.segment,
            )


def _in_dram(record: Record) -> Kept:
    return Kept(
        key=record.key,
        namespace_id=record.owner.namespace_id,
        session_id=record.owner.session_id,
        tier=Tier.DRAM,
        kind=record.shape.kind,
        record_bytes=record.record_bytes,
        lifetime=record.lifetime,
        sequence=record.sequence,
        pins=record.pins,
    )
