"""A segment log on a simulated disk, stepped by the test, beside a model of what it must hold."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Lifetime, Outcome, Owner, Reason, RecordKind, Shape, Want
from isthmus.contracts.clock import ManualClock
from isthmus.contracts.errors import DiskFailed
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.log.erasure import Scope
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.log.opening import open_log
from isthmus.state.kv.log.records import LogRead, LogRecord
from isthmus.state.kv.log.settings import LogSettings

SEGMENT = 64 << 10
EXTENT = 16 << 10
ERASURE = 4096
TICK_S = 0.005
NAMESPACES = tuple(bytes([65 + number]) * 16 for number in range(3))
SESSIONS = tuple(bytes([97 + number]) * 16 for number in range(3))


class SeededEntropy:
    """Random bytes that a seed replays."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def token_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)


def small_settings(segments: int = 12, **changed: object) -> LogSettings:
    """A log of a few small segments."""
    values: dict[str, object] = {
        "capacity": 8192 + 2 * ERASURE + segments * SEGMENT,
        "segment_bytes": SEGMENT,
        "erasure_bytes": ERASURE,
        "extent_bytes": EXTENT,
        "staging_bytes": 8 * EXTENT,
        "commit_bytes": 2 * EXTENT,
        "queue_depth": 4,
        "read_bytes": 8192,
        "read_depth": 4,
        "readers": 1,
    }
    return LogSettings(**{**values, **changed})  # type: ignore[arg-type]


def opened(disk: SimDisk, settings: LogSettings, clock: ManualClock | None = None) -> SegmentLog:
    """A log that is stepped by whoever waits."""
    own = clock or ManualClock()
    return open_log(disk, settings, own, SeededEntropy(1), pass_time=lambda: own.advance(TICK_S))


def payload_of(key: bytes, size: int) -> bytes:
    """The one payload that a key has."""
    return random.Random(key).randbytes(size)


def record(
    key: bytes,
    size: int = 1000,
    *,
    chunks: int = 1,
    owner: Owner | None = None,
    parent: bytes | None = None,
    lifetime: Lifetime = Lifetime.SESSION,
) -> LogRecord:
    """A record of `chunks` chunks of `size` bytes."""
    data = memoryview(payload_of(key, size * chunks))
    shape = Shape(RecordKind.BLOCK, chunks, size)
    return LogRecord(key, parent, owner or Owner(NAMESPACES[0]), shape, lifetime, digests_of(data, size), data)


def key_of(number: int) -> bytes:
    """A key."""
    return random.Random(f"key {number}").randbytes(32)


def read(log: SegmentLog, record: LogRecord, first: int = 0, count: int | None = None) -> tuple[Outcome, bytes]:
    """Locate and read one record: how it came out, and the bytes when it is a hit."""
    where = log.locate([record.key])[0]
    if where is None:
        return Outcome(Reason.ABSENT), b""
    chunks = record.shape.chunks - first if count is None else count
    into = bytearray(chunks * record.shape.chunk_bytes)
    want = Want(BlockKey(record.key), record.shape, memoryview(into), first, count)
    outcome = log.read([LogRead(where, want)], 10.0)[0]
    return outcome, bytes(into) if outcome.reason is Reason.HIT else b""


def read_all(log: SegmentLog, records: Iterable[LogRecord]) -> dict[bytes, tuple[Outcome, bytes]]:
    """Locate and read many records in one batch, those that are located."""
    wanted = list(records)
    places = log.locate([one.key for one in wanted])
    found: dict[bytes, tuple[Outcome, bytes]] = {}
    reads, buffers, held = [], [], []
    for one, where in zip(wanted, places, strict=True):
        if where is None:
            found[one.key] = (Outcome(Reason.ABSENT), b"")
            continue
        into = bytearray(one.shape.record_bytes)
        reads.append(LogRead(where, Want(BlockKey(one.key), one.shape, memoryview(into))))
        buffers.append(into)
        held.append(one)
    for one, into, outcome in zip(held, buffers, log.read(reads, 10.0), strict=True):
        found[one.key] = (outcome, bytes(into) if outcome.reason is Reason.HIT else b"")
    return found


@dataclass(frozen=True)
class Kept:
    """What the model knows of a record: the newest time that it was taken in."""

    record: LogRecord
    sequence: int
    forgotten: bool = False


class World:
    """A disk, a clock, a log, and what was told to it."""

    def __init__(self, seed: int = 0, **settings: object) -> None:
        self.settings = small_settings(**settings)  # type: ignore[arg-type]
        self.disk = SimDisk(self.settings.capacity, seed)
        self.clock = ManualClock()
        self.log = opened(self.disk, self.settings, self.clock)
        self.kept: dict[bytes, Kept] = {}
        self.forgotten: list[Scope] = []
        self.offered: set[bytes] = set()
        self.faulty = False
        """Whether the disk is meant to fail."""
        self.doubtful: list[tuple[Scope, int]] = []

    def put(self, *records: LogRecord, timeout_s: float = 1.0) -> list[Outcome]:
        """Append, and remember what was taken in."""
        # From now on what was forgotten of these may be there again: writes begin before the call returns.
        self.offered = {one.key for one in records}
        outcomes = self.log.append(records, timeout_s)
        self.offered = set()
        for one, outcome in zip(records, outcomes, strict=True):
            if outcome.reason is Reason.STORED:
                self.kept[one.key] = Kept(one, outcome.sequence)
        return outcomes

    def forget(self, scope: Scope) -> int:
        """Forget, and remember that nothing of it may come back. 0: the disk failed meanwhile."""
        doubt = (scope, self.log.sequence)
        self.doubtful.append(doubt)
        try:
            number = self.log.forget(scope)
        except DiskFailed:
            assert self.faulty
            return 0
        self.mark_forgotten(scope)
        self.doubtful.remove(doubt)
        return number

    def in_doubt(self, kept: Kept) -> bool:
        """Whether a forget that has not ended, or failed, may have taken the record."""
        return any(covers(scope, kept.record) and kept.sequence <= last for scope, last in self.doubtful)

    def mark_forgotten(self, scope: Scope) -> None:
        """What the model thinks of everything of a scope."""
        self.forgotten.append(scope)
        for key, kept in self.kept.items():
            if covers(scope, kept.record):
                self.kept[key] = replace(kept, forgotten=True)

    def run(self, seconds: float = 1.0) -> None:
        """Let time pass."""
        until = self.clock.monotonic() + seconds
        for _ in range(100_000):
            if not self.log.step():
                self.clock.advance(TICK_S)
                if self.clock.monotonic() >= until:
                    return
        raise AssertionError("the log never comes to rest")

    def settle(self) -> None:
        """Everything put so far written and durable (survivors of evictions meanwhile get numbers of their own)."""
        before = self.log.sequence
        assert self.log.flush(5.0) >= before

    def reopened(self, image: bytes | None = None, seed: int = 0) -> SegmentLog:
        """Another log on a copy of the disk, after a crash (`image`) or as it is."""
        data = bytes(self.disk.view) if image is None else image
        return opened(SimDisk(seed=seed, image=data), self.settings)


def covers(scope: Scope, record: LogRecord) -> bool:
    """Whether a scope names a record."""
    if scope.namespace_id:
        same = scope.namespace_id == record.owner.namespace_id
        return same and scope.id[16:] in (bytes(16), record.owner.session_id)
    return scope.id == record.key


def workload(world: World, seed: int, operations: int) -> None:
    """A bit of everything."""
    chance = random.Random(seed)
    fresh = 0
    for _ in range(operations):
        what = chance.random()
        if what < 0.62:
            owner = Owner(chance.choice(NAMESPACES), chance.choice(SESSIONS))
            batch = []
            for _ in range(chance.randint(1, 6)):
                known = [key for key, kept in world.kept.items() if kept.forgotten]
                again = known and chance.random() < 0.1
                key = chance.choice(known) if again else key_of(seed * 100_000 + fresh)
                fresh += 1
                size = chance.choice((100, 700, 3000, 9000))
                batch.append(record(key, size, owner=owner, lifetime=chance.choice(list(Lifetime))))
            world.put(*{one.key: one for one in batch}.values())
        elif what < 0.75:
            world.log.flush(1.0)
        elif what < 0.9:
            alive = [kept.record for kept in world.kept.values() if not kept.forgotten]
            for outcome, data in read_all(world.log, chance.sample(alive, min(5, len(alive)))).values():
                assert outcome.reason in {Reason.HIT, Reason.ABSENT} or world.faulty
                assert outcome.reason is not Reason.HIT or data
        elif what < 0.93:
            namespace, session = chance.choice(NAMESPACES), chance.choice((*SESSIONS, bytes(16)))
            world.forget(Scope.of(namespace, session))
        elif what < 0.95:
            world.log.evict(1, 0.5)
        else:
            world.run(chance.choice((0.01, 0.3)))
        world.log.check()
