"""The block store as a library: the arena, and under it the segment log when there is one.

Promises, besides those of `contracts.blocks.BlockStore`

- a record is in DRAM after `write`, and in the log as well when that admits it;
- what a read under an ended lease found is `EXPIRED`, also when the lease ended while the bytes were being copied;
- bytes whose digest does not match are in nobody's hands: the record is quarantined (its memory is not used again
before a restart) and the log's copy is tried;
- `forget` returns when nothing of its scope is left in any tier, and no write that was under way can bring it back;
- every outcome is counted by operation, tier and reason.

Safe to call from several threads. No lock is held while bytes are copied, hashed, read or written.
"""

from collections.abc import Sequence

from isthmus.contracts.blocks import (
    MAX_BATCH,
    NO_SESSION,
    Erasure,
    Hint,
    Lease,
    Match,
    Outcome,
    Put,
    Reason,
    StoreStats,
    Tier,
    Want,
)
from isthmus.contracts.clock import Clock, Entropy
from isthmus.contracts.errors import StoreUnavailable
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.arena import Arena
from isthmus.state.kv.arena.memory import create_arena
from isthmus.state.kv.counting import Counts
from isthmus.state.kv.dram import Dram
from isthmus.state.kv.parts import Parts, check_batch
from isthmus.state.kv.reading import LOCAL, Reader, StoreLease, own_lease
from isthmus.state.kv.scopes import Scope, Scopes
from isthmus.state.kv.settings import StoreSettings
from isthmus.state.kv.writing import Writer

MOST_HINTED = 4 * MAX_BATCH
"""Keys in all hints of one call; those beyond it are dropped."""


class Store:
    """Implements `BlockStore`, and what an administrator needs. Made by `open_store`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._reader = Reader(parts)
        self._writer = Writer(parts)

    def match(self, keys: Sequence[BlockKey]) -> list[Match]:
        """See `BlockStore`."""
        check_batch(len(keys), MAX_BATCH, "keys")
        found = self._parts.dram.where(keys)
        return [Match(None) if one is None else Match(Tier.DRAM, one.record_bytes) for one in found]

    def lease(self, keys: Sequence[BlockKey], seconds: float) -> Lease:
        """See `BlockStore`."""
        return self._reader.lease(keys, seconds)

    def read(self, lease: Lease, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        """See `BlockStore`."""
        return self._reader.read(own_lease(lease), wants, timeout_s)

    def write(self, puts: Sequence[Put], timeout_s: float) -> list[Outcome]:
        """See `BlockStore`."""
        return self._writer.write(puts, timeout_s)

    def hint(self, hints: Sequence[Hint]) -> None:
        """See `BlockStore`."""
        room = MOST_HINTED
        for hint in hints[:MAX_BATCH]:
            keys = hint.keys[:room]
            room -= len(keys)
            if keys:
                self._parts.dram.hint(hint.kind, keys, hint.seconds)
        self._parts.counts.add("hint", None, Reason.FULL, sum(len(hint.keys) for hint in hints) - MOST_HINTED + room)

    def flush(self, timeout_s: float) -> int:
        """See `BlockStore`."""
        return 0

    def stats(self) -> StoreStats:
        """See `BlockStore`."""
        arena = self._parts.dram.arena
        gauges = {
            "leases": float(len(self._reader)),
            "arena_huge_bytes": float(arena.memory.huge_bytes),
        }
        return StoreStats(
            epoch=arena.epoch,
            tiers=(self._parts.dram.stats(),),
            counts=self._parts.counts.snapshot(),
            gauges=gauges,
            erasures=self._parts.scopes.erasures(),
        )

    def forget(self, namespace_id: bytes, session_id: bytes = NO_SESSION) -> Erasure:
        """Erase everything of a namespace, or of one session of it, from every tier.

        Raises `StoreUnavailable` when writes under way do not end within the store's limit: nothing is promised then.
        """
        scope = Scope(namespace_id, session_id)
        scopes, dram = self._parts.scopes, self._parts.dram
        number: int | None = None
        scopes.begin(scope)
        try:
            records = dram.take_out(scope)
            for record in records:
                dram.arena.erase_bytes(record)
            dram.unpin(records)
            if not scopes.wait(scope, self._parts.settings.call_s):
                raise StoreUnavailable("writes of what is to be forgotten have not ended")
            dram.wipe_free()
            number = 0
        finally:
            erasure = scopes.end(scope, number)
        if erasure is None:
            raise StoreUnavailable("the erasure was not taken down")
        return erasure

    def close(self) -> None:
        """Give the memory back. Nothing may be called afterwards."""
        self._parts.dram.arena.memory.close()


def open_store(settings: StoreSettings, clock: Clock, entropy: Entropy) -> Store:
    """A store with an empty arena. Raises `ConfigInvalid` when the arena does not fit into memory."""
    counts, scopes = Counts(), Scopes(clock)
    arena = Arena(create_arena(settings.arena_bytes, settings.region_bytes), entropy)
    dram = Dram(arena, settings, clock, scopes=scopes, counts=counts, durable=lambda: 0)
    return Store(Parts(settings, clock, counts, scopes, dram))
