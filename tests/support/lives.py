"""What a store goes through before it is killed, and what must hold afterwards.

A *life* is one log from its making on, through many deaths. `Worker` is a process's part: it works on a store and
tells over a pipe, before anything can depend on it, what it offers, what was taken in, what is durable, what was
forgotten and what left. `Known` is the survivor's part: from what it was told it knows what must be there, what may be,
and what must never be read again, and holds a recovered store to that.

Whatever happened:

- a record that was told to be durable reads back equal, unless it was told to have left (evicted) or to be forgotten;
- a hit has the bytes of its key, always;
- what was forgotten is never a hit again, unless it was offered again afterwards. A forget that was not answered is in
force or not, by what the log itself says, and then entirely.
"""

import enum
import hashlib
import os
import random
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec

from isthmus.contracts.blocks import (
    NO_SESSION,
    BlockStore,
    Hint,
    HintKind,
    Lifetime,
    Outcome,
    Owner,
    Put,
    Reason,
    RecordKind,
    Shape,
    StoreStats,
    Tier,
    Want,
)
from isthmus.contracts.errors import StoreError
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena import memory
from isthmus.state.kv.log.format import SLOT, Rows
from isthmus.state.kv.log.ledger import Ledger, segment_and_slot
from isthmus.state.kv.log.segments import Segment
from isthmus.state.kv.log.settings import LogSettings
from isthmus.state.kv.settings import StoreSettings
from isthmus.state.kv.store import Store

SEGMENT = 64 << 10
EXTENT = 16 << 10
ERASURE = 4096
ARENA = 256 << 10
LEASE_S = 30.0
BATCH = 64
NAMESPACES = tuple(bytes([65 + number]) * 16 for number in range(3))
SESSIONS = (NO_SESSION, *(bytes([97 + number]) * 16 for number in range(3)))

Message = list[Any]
Told = Callable[[Message], None]


def settings_of(path: os.PathLike[str], seed: int, backend: str = "auto") -> StoreSettings:
    """A small store with a life's geometry and pace."""
    chance = random.Random(f"settings {seed}")
    segments = chance.choice((8, 12, 24))
    log = LogSettings(
        capacity=8192 + 2 * ERASURE + segments * SEGMENT,
        segment_bytes=SEGMENT,
        erasure_bytes=ERASURE,
        extent_bytes=EXTENT,
        staging_bytes=chance.choice((8, 16)) * EXTENT,
        linger_s=chance.choice((0.0, 0.001, 0.003)),
        commit_s=chance.choice((0.001, 0.005, 0.02)),
        commit_bytes=chance.choice((1, 2, 6)) * EXTENT,
        queue_depth=4,
        read_bytes=SEGMENT,
        read_depth=4,
        readers=1,
    )
    return StoreSettings(
        arena_bytes=ARENA,
        region_bytes=ARENA,
        policy=chance.choice(("lru", "s3fifo", "arc")),
        lease_s=LEASE_S,
        path=str(path),
        log=log,
        disk_backend=backend,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Piece:
    """A record of a life, the same whenever it is made: its number says everything."""

    key: BlockKey
    shape: Shape
    owner: Owner
    lifetime: Lifetime

    @property
    def payload(self) -> bytes:
        return hashlib.shake_128(self.key).digest(self.shape.record_bytes)

    def put(self) -> Put:
        return Put(self.key, None, self.owner, self.shape, memoryview(self.payload), self.lifetime)


@cache
def piece(life: int, number: int) -> Piece:
    key = hashlib.sha256(f"{life} {number}".encode()).digest()
    chance = random.Random(key)
    shape = Shape(RecordKind.BLOCK, chance.randint(1, 4), chance.choice((60, 300, 300, 900, 900, 3000)))
    owner = Owner(chance.choice(NAMESPACES), chance.choice(SESSIONS))
    return Piece(BlockKey(key), shape, owner, chance.choice(list(Lifetime)))


def covers(namespace: bytes, session: bytes, owner: Owner) -> bool:
    """Whether a scope names an owner's records."""
    return namespace == owner.namespace_id and session in (NO_SESSION, owner.session_id)


class Pipe:
    """Messages from a process that may die at any moment. Safe to use from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def __call__(self, message: Message) -> None:
        data = msgspec.msgpack.encode(message)
        left = memoryview(struct.pack("<I", len(data)) + data)
        with self._lock:
            while left:
                left = left[os.write(self._descriptor, left) :]


class Heard:
    """The other end: whole messages only, the last one may have been cut off."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __call__(self, data: bytes) -> Iterator[Message]:
        self._data += data
        while len(self._data) >= 4:
            (size,) = struct.unpack_from("<I", self._data)
            if len(self._data) < 4 + size:
                return
            message: Message = msgspec.msgpack.decode(bytes(self._data[4 : 4 + size]))
            del self._data[: 4 + size]
            yield message


@contextmanager
def telling_what_leaves(told: Told) -> Iterator[None]:
    """Logs that are opened meanwhile tell of every record that is not durable any more (nobody finds it, or only a copy
    that is still to be synced), before its segment can be used anew.
    """
    plain = Ledger.unindex

    def durable(self: Ledger, location: int) -> bool:
        index, slot = segment_and_slot(location)
        return not any(
            extent.at <= slot * SLOT < extent.at + extent.size for extent in self.pending(self.segments[index])
        )

    def unindex(self: Ledger, segment: Segment, rows: Rows) -> int:
        count = plain(self, segment, rows)
        keys = [(row["key"].tobytes(), int(row["sequence"])) for row in rows] if count else []
        left = [
            (key, sequence) for key, sequence in keys if not any(durable(self, at) for at in self.index.candidates(key))
        ]
        if left:
            told(["left", left])
        return count

    Ledger.unindex = unindex  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ledger.unindex = plain  # type: ignore[method-assign]


@contextmanager
def uncounted_pages() -> Iterator[None]:
    """Arenas that are made meanwhile do not ask which of their pages are huge: among all that a test has mapped that
    takes as long as a small log's recovery, and nothing that is tried here depends on it.
    """
    plain = memory.huge_bytes
    memory.huge_bytes = lambda *_: 0
    try:
        yield
    finally:
        memory.huge_bytes = plain


def read_pieces(store: BlockStore, pieces: Sequence[Piece]) -> list[tuple[Outcome, bytes]]:
    """Read records, some at a time, as a client does."""
    found: list[tuple[Outcome, bytes]] = []
    for first in range(0, len(pieces), BATCH):
        part = pieces[first : first + BATCH]
        buffers = [bytearray(one.shape.record_bytes) for one in part]
        wants = [Want(one.key, one.shape, memoryview(into)) for one, into in zip(part, buffers, strict=True)]
        with store.lease([one.key for one in part], LEASE_S) as lease:
            outcomes = store.read(lease, wants, 10.0)
        found += [(outcome, bytes(into)) for outcome, into in zip(outcomes, buffers, strict=True)]
    return found


def forgets_of(stats: StoreStats) -> dict[tuple[bytes, bytes], int]:
    """The numbers of the forgets that a store remembers, by scope."""
    return {(one.namespace_id, one.session_id or NO_SESSION): one.number for one in stats.erasures}


class State(enum.Enum):
    MUST = "must be there"
    HELD = "taken in, not durable yet"
    MAY = "may be there"
    NEVER = "must never be read again"


@dataclass
class Status:
    state: State
    sequence: int = 0


@dataclass
class Doubt:
    """A forget that was not answered, or whose answer nobody heard. `covered`: what it forgot if it is in force;
    `again`: what was offered once more since, so that it may be there either way. `refused`: the disk had failed; then
    it was in force until the process ended (as `Forgetting.forget` says), and some of it may be gone even if it is not
    in force any more.
    """

    scope: tuple[bytes, bytes]
    covered: set[int]
    again: set[int] = field(default_factory=set)
    refused: bool = False


@dataclass
class Known:
    """What is known of a life. `acknowledged` counts records that were told to be durable."""

    life: int
    status: dict[int, Status] = field(default_factory=dict)
    numbers: dict[bytes, int] = field(default_factory=dict)
    forgets: dict[tuple[bytes, bytes], int] = field(default_factory=dict)
    doubts: list[Doubt] = field(default_factory=list)
    durable: int = 0
    acknowledged: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _gone: dict[int, int] = field(default_factory=dict)
    _held: set[int] = field(default_factory=set)
    _cut: bool = False

    @property
    def fresh(self) -> int:
        """A number that was not used yet."""
        return len(self.status)

    def hear(self, message: Message) -> None:
        """Take in what a worker told."""
        match message:
            case ["offer", numbers]:
                for number in numbers:
                    status = self.status.setdefault(number, Status(State.MAY))
                    self.numbers[piece(self.life, number).key] = number
                    if status.state is State.NEVER:
                        status.state = State.MAY
                    for doubt in self.doubts:
                        if number in doubt.covered:
                            doubt.covered.discard(number)
                            doubt.again.add(number)
            case ["take", taken]:
                for number, sequence in taken:
                    self._take(number, sequence)
            case ["cut"]:
                self._cut = True
            case ["durable" | "forgotten", *_] if self._cut:
                # Nobody hears anything after a real cut, and a sync that this one interrupts may still say success.
                pass
            case ["durable", sequence]:
                self.durable = max(self.durable, sequence)
                for number in [one for one in self._held if self.status[one].sequence <= self.durable]:
                    self._settle(number)
            case ["left", left]:
                for key, sequence in left:
                    self._left(key, sequence)
            case ["forgetting", namespace, session]:
                self.doubts.append(Doubt((namespace, session), self._covered(namespace, session)))
            case ["forgotten", namespace, session, number]:
                self.forgets[namespace, session] = number
                self.doubts = [one for one in self.doubts if one.scope != (namespace, session)]
                self._never(self._covered(namespace, session))
            case ["held" | "amiss", *_] if self._cut:
                # Whoever looked without power found nothing, whatever is there.
                pass
            case ["held", forgets, found]:
                self._resolve({(namespace, session): number for namespace, session, number in forgets})
                try:
                    self._judge(dict(found))
                except AssertionError as wrong:
                    self.wrong.append(str(wrong))
            case ["refused"]:
                self.counts["refused"] += 1
                self.doubts[-1].refused = True
            case ["wrong" | "amiss", text]:
                self.wrong.append(text)
            case [name, *_]:
                self.counts[name] += 1

    def begin(self) -> None:
        """The log is about to be opened anew: what was not durable may be there, and sequences may go on from a lower
        one. What is told to leave from now on, while it is being opened already, is heard.
        """
        for number in self._held:
            self.status[number].state = State.MAY
        self._held.clear()
        self._gone.clear()
        self._cut = False
        self.durable = 0

    def _take(self, number: int, sequence: int) -> None:
        status = self.status[number]
        if status.state is State.NEVER or self._gone.get(number, 0) >= sequence:
            return
        status.state, status.sequence = State.HELD, sequence
        self._held.add(number)
        for doubt in self.doubts:
            doubt.again.discard(number)
        if sequence <= self.durable:
            self._settle(number)

    def _settle(self, number: int) -> None:
        self._held.discard(number)
        self.status[number].state = State.MUST
        self.acknowledged += 1

    def _left(self, key: bytes, sequence: int) -> None:
        number = self.numbers.get(key)
        if number is None:
            return
        self._gone[number] = max(self._gone.get(number, 0), sequence)
        status = self.status[number]
        if status.state in (State.MUST, State.HELD):
            status.state = State.MAY
            self._held.discard(number)

    def _covered(self, namespace: bytes, session: bytes) -> set[int]:
        return {one for one in self.status if covers(namespace, session, piece(self.life, one).owner)}

    def _never(self, numbers: set[int]) -> None:
        for number in numbers:
            self.status[number].state = State.NEVER
        self._held -= numbers

    def recovered(self, store: Store) -> Message:
        """Hold a store that was opened after `begin`, while it told us what leaves, to what is known. What was seen, as
        somebody else may `hear` it who knows the same. Raises AssertionError.
        """
        log = store._parts.log
        assert log is not None
        seen = self.hold(store, store.stats())
        corrupt = self.counts["read_corrupt"] + log.stats().counts.get("quarantined", 0)
        assert not corrupt, f"{corrupt} records turned out to be corrupt"
        log.check()
        return seen

    def hold(self, store: BlockStore, stats: StoreStats) -> Message:
        """As `recovered`, through a store's port alone. `stats`: from when it was opened."""
        assert not self.wrong, "; ".join(self.wrong)
        forgets = forgets_of(stats)
        self._resolve(forgets)
        numbers = sorted(self.status)
        found: dict[int, str] = {}
        pieces = [piece(self.life, number) for number in numbers]
        for number, one, (outcome, data) in zip(numbers, pieces, read_pieces(store, pieces), strict=True):
            found[number] = outcome.reason.value
            assert outcome.reason is not Reason.HIT or data == one.payload, f"record {number} reads back wrong"
        self._judge(found)
        return ["held", [[*scope, number] for scope, number in forgets.items()], list(found.items())]

    def _judge(self, found: dict[int, str]) -> None:
        """What was found of each record is what may be. Raises AssertionError."""
        assert len(found) == len(self.status), "all that was ever offered is looked for"
        missing = []
        for number, reason in found.items():
            status = self.status[number]
            self.counts[f"read_{reason}"] += 1
            if reason == Reason.HIT.value:
                assert status.state is not State.NEVER, f"record {number} was forgotten and is back"
                if status.state is State.MAY and number not in self._gone:
                    status.state = State.MUST  # what recovery found is durable
            elif status.state is State.MUST:
                missing.append(f"{number} ({reason})")
        assert not missing, f"durable records that are gone: {', '.join(missing)}"

    def _resolve(self, now: dict[tuple[bytes, bytes], int]) -> None:
        """Forgets that were not answered: the log says which are in force."""
        for doubt in self.doubts:
            if now.get(doubt.scope, 0) > self.forgets.get(doubt.scope, 0):
                self.counts["forgets_in_force"] += 1
                self._never(doubt.covered)
                for number in doubt.again:
                    if self.status[number].state is not State.NEVER:
                        self.status[number].state = State.MAY
                        self._held.discard(number)
            elif doubt.refused:
                for number in doubt.covered:
                    if self.status[number].state is State.MUST:
                        self.status[number].state = State.MAY
        self.doubts.clear()
        self.forgets = now


class Worker:
    """Works on a store: everything that can be asked of one, in an order that a seed says."""

    def __init__(self, store: Store, known: Known, seed: int, told: Told) -> None:
        self._store = store
        self._known = known
        self._random = random.Random(seed)
        self._told = told
        self._durable = 0

    def run(self, operations: int) -> None:
        """Work."""
        weights = {
            self._put: 60,
            self._flush: 12,
            self._read: 12,
            self._rest: 6,
            self._forget: 3,
            self._evict: 3,
            self._hint: 4,
        }
        for _ in range(operations):
            (operation,) = self._random.choices(list(weights), list(weights.values()))
            operation()
            self._look()

    def _look(self) -> None:
        log = self._store._parts.log
        if log is not None and log.durable > self._durable:
            self._durable = log.durable
            self._told(["durable", self._durable])

    def _tell(self, message: Message) -> None:
        """To the survivor, and to what this process knows itself."""
        self._known.hear(message)
        self._told(message)

    def _put(self) -> None:
        chance, known = self._random, self._known
        first = known.fresh
        numbers = list(range(first, first + chance.randint(1, 12)))
        if first and chance.random() < 0.3:
            numbers += chance.sample(range(first), min(3, first))
        self._tell(["offer", numbers])
        outcomes = self._store.write([piece(known.life, number).put() for number in numbers], 0.5)
        taken = [
            [number, outcome.sequence]
            for number, outcome in zip(numbers, outcomes, strict=True)
            if outcome.reason is Reason.STORED and outcome.tier is Tier.NVME
        ]
        self._tell(["take", taken])

    def _flush(self) -> None:
        self._told(["durable", self._store.flush(0.2)])

    def _read(self) -> None:
        known = self._known
        numbers = self._random.sample(range(known.fresh), min(12, known.fresh))
        self._judge(numbers)

    def _judge(self, numbers: Iterable[int]) -> None:
        known = self._known
        wanted = list(numbers)
        found = read_pieces(self._store, [piece(known.life, number) for number in wanted])
        for number, (outcome, data) in zip(wanted, found, strict=True):
            one = piece(known.life, number)
            if outcome.reason is Reason.HIT and data != one.payload:
                self._told(["wrong", f"record {number} was read wrong by the worker"])
            if outcome.reason is Reason.HIT and known.status[number].state is State.NEVER:
                self._told(["wrong", f"record {number} was forgotten and read by the worker"])

    def _rest(self) -> None:
        threading.Event().wait(self._random.choice((0.0005, 0.002, 0.006)))

    def _forget(self) -> None:
        namespace, session = self._random.choice(NAMESPACES), self._random.choice(SESSIONS)
        self._tell(["forgetting", namespace, session])
        try:
            erasure = self._store.admin.forget(namespace, session)
        except StoreError:
            self._tell(["refused"])  # the disk has failed: in doubt, as after a death
            return
        self._tell(["forgotten", namespace, session, erasure.number])

    def _evict(self) -> None:
        what = self._random.randrange(3)
        if what == 0:
            self._store.admin.evict(Tier.NVME, 1, 0.05)
        elif what == 1:
            self._store.admin.evict(Tier.DRAM, ARENA, 0.05)
        else:
            self._store.admin.compact(0.05)

    def _hint(self) -> None:
        known = self._known
        kind = self._random.choice((HintKind.PREFETCH, HintKind.DONE, HintKind.TURN_ENDED, HintKind.PIN))
        numbers = self._random.sample(range(known.fresh), min(8, known.fresh))
        self._store.hint([Hint(kind, [piece(known.life, number).key for number in numbers], 0.01)])
