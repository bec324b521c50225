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

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from isthmus.contracts.blocks import (
    MAX_BATCH,
    Erasure,
    Hint,
    Lease,
    Match,
    Outcome,
    Put,
    Reason,
    StoreStats,
    Tier,
    TierStats,
    Want,
)
from isthmus.contracts.clock import Clock, Entropy
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.arena import Arena
from isthmus.state.kv.arena.crew import crew_for
from isthmus.state.kv.arena.memory import create_arena
from isthmus.state.kv.attendant import Attendant
from isthmus.state.kv.counting import Counts
from isthmus.state.kv.dram import Dram
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.disk import Disk, open_disk
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.log.opening import open_log
from isthmus.state.kv.log.records import LogStats
from isthmus.state.kv.parts import Parts, capped, check_batch
from isthmus.state.kv.reading import Reader, StoreLease, own_lease
from isthmus.state.kv.scopes import Scopes
from isthmus.state.kv.settings import StoreSettings
from isthmus.state.kv.upkeep import Upkeep
from isthmus.state.kv.writing import Writer


class Store:
    """Implements `BlockStore`; `admin` is for administrators. Made by `open_store`."""

    def __init__(self, parts: Parts, disk: Disk | None, opened: ExitStack) -> None:
        self._parts = parts
        self._disk = disk
        self._opened = opened
        self._attendant = Attendant(parts)
        self._writer = Writer(parts)
        self.reader = Reader(parts, self._attendant)
        self.admin = Upkeep(parts)
        self._attendant.start(self.reader.expire)

    @property
    def arena(self) -> Arena:
        """The arena, to be shared."""
        return self._parts.dram.arena

    @property
    def counts(self) -> Counts:
        """Outcomes so far."""
        return self._parts.counts

    @property
    def settings(self) -> StoreSettings:
        """What it was made with."""
        return self._parts.settings

    def match(self, keys: Sequence[BlockKey]) -> list[Match]:
        """See `BlockStore`. What is in the log only has no size here."""
        check_batch(len(keys), MAX_BATCH, "keys")
        found = self._parts.dram.where(keys)
        matches = [Match(None) if one is None else Match(Tier.DRAM, one.record_bytes) for one in found]
        missing = [index for index, one in enumerate(found) if one is None]
        if self._parts.log is not None and missing:
            for index, place in zip(missing, self._parts.log.locate([keys[at] for at in missing]), strict=True):
                if place is not None:
                    matches[index] = Match(Tier.NVME)
        return matches

    def lease(self, keys: Sequence[BlockKey], seconds: float) -> Lease:
        """See `BlockStore`."""
        return self.reader.lease(keys, seconds)

    def lease_for(self, holder: int, keys: Sequence[BlockKey], seconds: float) -> StoreLease:
        """As `lease`, for a client of a daemon."""
        return self.reader.lease(keys, seconds, holder)

    def read(self, lease: Lease, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        """See `BlockStore`."""
        return self.reader.read(own_lease(lease), wants, timeout_s)

    def read_leased(self, number: int, holder: int, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        """As `read`, under the lease of a client."""
        lease = self.reader.find(number, holder)
        if lease is not None:
            return self.reader.read(lease, wants, timeout_s)
        outcomes = [Outcome(Reason.EXPIRED)] * len(wants)
        self._parts.counts.add_outcomes("read", outcomes)
        return outcomes

    def write(self, puts: Sequence[Put], timeout_s: float) -> list[Outcome]:
        """See `BlockStore`."""
        return self._writer.write(puts, timeout_s)

    def write_checked(self, puts: Sequence[Put], digests: Sequence[bytes], timeout_s: float) -> list[Outcome]:
        """As `write`, of payloads that somebody may change meanwhile: what has not these digests when it is here is
        `CORRUPT`, and not here.
        """
        return self._writer.write(puts, timeout_s, digests)

    def hint(self, hints: Sequence[Hint]) -> None:
        """See `BlockStore`."""
        kept, dropped = capped(hints)
        for hint in kept:
            self._parts.dram.hint(hint.kind, hint.keys, hint.seconds)
            self._attendant.hinted(hint.kind, hint.keys, hint.seconds)
        self._parts.counts.add("hint", None, "dropped", dropped)

    def flush(self, timeout_s: float) -> int:
        """See `BlockStore`."""
        log = self._parts.log
        return 0 if log is None else log.flush(min(max(0.0, timeout_s), self.settings.call_s))

    def stats(self) -> StoreStats:
        """See `BlockStore`."""
        arena, log, scopes = self.arena, self._parts.log, self._parts.scopes
        tiers = [self._parts.dram.stats()]
        gauges = {
            "leases": float(len(self.reader)),
            "arena_huge_bytes": float(arena.memory.huge_bytes),
            "arena_quarantined_bytes": float(arena.quarantined_bytes),
        }
        below = LogStats() if log is None else log.stats()
        if log is not None:
            tiers.append(TierStats(Tier.NVME, below.capacity, below.used, below.records))
            gauges |= _gauges(below)
        return StoreStats(
            epoch=arena.epoch,
            tiers=tuple(tiers),
            counts=self.counts.snapshot() | _quarantined(below),
            gauges=gauges,
            sequence=below.sequence,
            durable=below.durable,
            erasures=scopes.erasures(),
            backend=_backend(self._disk),
        )

    def watch_expiry(self, told: Callable[[StoreLease], None] | None) -> None:
        """Call `told` for every lease that ends by itself."""
        self.reader.expired = told

    def settle(self, timeout_s: float) -> bool:
        """Wait until everything that was to be brought to DRAM was; whether that came about."""
        return self._attendant.idle(timeout_s)

    def close(self) -> None:
        """Make durable what was written, and give everything back. Nothing may be called afterwards."""
        self._attendant.stop()
        self._opened.close()


def open_store(settings: StoreSettings, clock: Clock, entropy: Entropy, *, calls: Calls | None = None) -> Store:
    """A store with an empty arena, over the log of the settings (made when there is none). `calls`: what the disk is
    driven through, for tests.

    Raises `ConfigInvalid` when the arena does not fit into memory, and what `open_disk` and `open_log` raise
    (`StoreLocked`, `StoreFull`, `StoreCorrupt`, `StoreFormat`, `DiskFailed`).
    """
    counts = Counts()
    with ExitStack() as stack:
        memory = create_arena(settings.arena_bytes, settings.region_bytes)
        stack.callback(memory.close)
        crew = crew_for(len(os.sched_getaffinity(0)))
        stack.callback(crew.close)
        disk: Disk | None = None
        log: SegmentLog | None = None
        if settings.path and settings.log is not None:
            path, capacity = Path(settings.path), settings.log.capacity
            disk = open_disk(path, capacity=capacity, create=True, backend=settings.disk_backend, calls=calls)
            stack.callback(disk.close)
            log = open_log(disk, settings.log, clock, entropy, crew=crew)
            stack.callback(log.close)
        scopes = Scopes(clock, _erasures(log))
        dram = Dram(Arena(memory, entropy, crew), settings, clock, scopes=scopes, counts=counts, below=log)
        return Store(Parts(settings, clock, counts, scopes, dram, log, crew), disk, stack.pop_all())


def _erasures(log: SegmentLog | None) -> list[Erasure]:
    """Those that the log remembers, oldest first."""
    if log is None:
        return []
    return [
        Erasure(one.number, one.scope.namespace_id, one.scope.session_id if any(one.scope.session_id) else b"")
        for one in log.erasures
        if one.scope.namespace_id
    ]


def _quarantined(stats: LogStats) -> dict[str, int]:
    """Of the log, by the name that those of the arena have."""
    count = stats.counts.get("quarantined", 0)
    return {"quarantine_nvme_corrupt": count} if count else {}


def _gauges(stats: LogStats) -> dict[str, float]:
    named = {f"segments_{state}": float(count) for state, count in stats.segments.items()}
    named |= {f"class_{name}": float(count) for name, count in stats.classes.items()}
    named |= {f"log_{name}": float(count) for name, count in stats.counts.items()}
    return named | {
        "durable_lag_s": stats.lag_s,
        "durable_lag_bytes": float(stats.lag_bytes),
        "write_amplification": stats.write_amplification,
        "written_bytes": float(stats.written_bytes),
        "taken_bytes": float(stats.taken_bytes),
        "index_bytes": float(stats.index_bytes),
        "erasures_pending": float(stats.erasures_pending),
        "read_only": float(bool(stats.read_only)),
    }


def _backend(disk: Disk | None) -> str:
    """How the disk is driven, for people."""
    if disk is None:
        return "none"
    return f"{disk.backend} ({disk.backend_reason})" if disk.backend_reason else disk.backend
