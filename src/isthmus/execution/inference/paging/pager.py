"""The threads of paging: they ask the store, fill blocks of the device's memory from it and write blocks behind.

Three of them: one asks where blocks are, one loads, one writes (and hears once a second what was forgotten). Each takes
jobs from a bounded queue, and every job ends with one event within the store's time limits. Blocks are read and written
where they lie, beside running steps: the scheduler leases what they touch, so no step does (policy.py). Where the
processor cannot address the device's memory, the runner copies between its steps.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from isthmus.contracts.blocks import (
    MAX_BATCH,
    BlockStore,
    Erasure,
    Hint,
    Lease,
    Match,
    Outcome,
    Put,
    Reason,
    RecordKind,
    Shape,
    Tier,
    Want,
)
from isthmus.contracts.clock import Clock
from isthmus.contracts.events import ModelInfo
from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.batch import Runner
from isthmus.execution.inference.paging.jobs import Erased, Event, Found, Keep, Kept, Load, Loaded, Look, Notice
from isthmus.execution.inference.paging.settings import PagingSettings

MAX_LOOKS = 4096
MAX_NOTICES = 1024
BATCH_BYTES = 4 << 20
LAYERED_BYTES = 16 << 20
"""Loads over this come in layer by layer: smaller ones would only become more and smaller reads."""
LAYER_GROUPS = 4
POLL_S = 1.0
WRITE_S = 5.0

T = TypeVar("T")


class DeviceMemory(Protocol):
    """The part of a `Runner` that paging needs."""

    def view(self, kind: RecordKind, place: int) -> memoryview | None:
        """The record's own bytes, writable; None where the processor cannot address them."""
        ...

    def read(self, kind: RecordKind, place: int) -> bytes:
        """A copy of a record."""
        ...

    def write(self, kind: RecordKind, place: int, record: bytes) -> None:
        """Set a record."""
        ...


@dataclass(frozen=True, slots=True)
class Shapes:
    """The form of a block and of a state snapshot; no state in a model without."""

    block: Shape
    state: Shape | None

    def of(self, kind: RecordKind) -> Shape:
        """The form of records of `kind`. Raises `ValueError` for a state where there are none."""
        if kind is RecordKind.BLOCK:
            return self.block
        if self.state is None:
            raise ValueError("this model has no recurrent state")
        return self.state


@dataclass(frozen=True, slots=True)
class _Mark:
    """Set `done` when what was queued before it is written."""

    done: threading.Event


def shapes(info: ModelInfo) -> Shapes:
    """The forms of the records of an engine that serves this."""
    block = Shape(RecordKind.BLOCK, info.layers, info.block_bytes // info.layers)
    if info.states is None:
        return Shapes(block, None)
    layers = info.states.layers
    return Shapes(block, Shape(RecordKind.STATE, layers, info.states.state_bytes // layers))


class RunnerMemory:
    """`DeviceMemory` of a runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def view(self, kind: RecordKind, place: int) -> memoryview | None:
        """See `DeviceMemory`."""
        return self._runner.view(kind, place)

    def read(self, kind: RecordKind, place: int) -> bytes:
        """See `DeviceMemory`. Between steps."""
        return self._runner.read_block(place) if kind is RecordKind.BLOCK else self._runner.read_state(place)

    def write(self, kind: RecordKind, place: int, record: bytes) -> None:
        """See `DeviceMemory`. Between steps."""
        if kind is RecordKind.BLOCK:
            self._runner.write_block(place, record)
        else:
            self._runner.write_state(place, record)


class PagerThreads:
    """Implements `policy.Pager`. `wake` is called, from any thread, when `take` has something."""

    def __init__(
        self,
        store: BlockStore,
        memory: DeviceMemory,
        shapes: Shapes,
        settings: PagingSettings,
        clock: Clock,
        *,
        wake: Callable[[], None],
    ) -> None:
        self._store, self._memory, self._shapes = store, memory, shapes
        self._settings, self._clock, self._wake = settings, clock, wake
        self._looks: queue.Queue[Look | None] = queue.Queue(MAX_LOOKS)
        self._loads: queue.Queue[Load | None] = queue.Queue()  # bounded by max_loading
        self._keeps: queue.Queue[Keep | Notice | _Mark | None] = queue.Queue()  # bounded by keep_bytes and MAX_NOTICES
        self._events: deque[Event] = deque()
        self._heard = 0
        self._closing = False
        targets = {"look": self._look_loop, "load": self._load_loop, "keep": self._keep_loop}
        self._threads = [
            threading.Thread(target=run, name=f"isthmus-{name}", daemon=True) for name, run in targets.items()
        ]
        for thread in self._threads:
            thread.start()

    # ---- what the scheduler's side calls

    def look(self, job: Look) -> None:
        """See `policy.Pager`. With too many in the queue the answer is that nothing is there."""
        try:
            self._looks.put_nowait(job)
        except queue.Full:
            self._tell(Found(job.serial, [None] * len(job.keys), [None] * len(job.states)))

    def load(self, job: Load) -> None:
        """See `policy.Pager`."""
        self._loads.put(job)

    def keep(self, job: Keep) -> None:
        """See `policy.Pager`."""
        self._keeps.put(job)

    def notice(self, hint: Hint) -> None:
        """See `policy.Pager`. With too many in the queue it is dropped: hints are advice."""
        if self._keeps.qsize() < MAX_NOTICES:
            self._keeps.put(Notice(hint))

    def take(self) -> list[Event]:
        """What happened since the last call."""
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self, timeout_s: float = WRITE_S) -> None:
        """End the threads after what they are doing; what waits is not done."""
        self._closing = True
        _end(self._looks)
        _end(self._loads)
        _end(self._keeps)
        for thread in self._threads:
            thread.join(timeout_s)

    def settle(self, timeout_s: float) -> int:
        """Wait until what was written behind so far is durable; the store's watermark."""
        done = threading.Event()
        end = self._clock.monotonic() + timeout_s
        self._keeps.put(_Mark(done))
        done.wait(timeout_s)
        return self._store.flush(max(0.0, end - self._clock.monotonic()))

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    # ---- looking

    def _look_loop(self) -> None:
        for job in _jobs(self._looks):
            matches = self._match([*job.keys, *job.states])
            tiers = [match.tier for match in matches]
            count = len(job.keys)
            self._tell(Found(job.serial, tiers[:count], tiers[count:]))

    def _match(self, keys: Sequence[BlockKey]) -> list[Match]:
        found: list[Match] = []
        for start in range(0, len(keys), MAX_BATCH):
            found += self._store.match(keys[start : start + MAX_BATCH])
        return found

    # ---- loading

    def _load_loop(self) -> None:
        for job in _jobs(self._loads):
            self._tell(self._load(job))

    def _load(self, job: Load) -> Loaded:
        """Carry out a load: group of layers by group of layers, batch of blocks by batch of blocks."""
        begun = self._clock.monotonic()
        end = begun + self._settings.load_s
        shape = self._shapes.block
        groups = LAYER_GROUPS if shape.record_bytes * len(job.keys) >= LAYERED_BYTES else 1
        groups = min(groups, shape.chunks)
        reasons: list[Reason] = [Reason.HIT] * len(job.keys)
        tiers: list[Tier | None] = [None] * len(job.keys)
        state: Reason | None = None
        batch = max(1, min(MAX_BATCH // 2, BATCH_BYTES // max(1, shape.record_bytes // groups)))
        if job.state is not None:
            state = self._load_state(job.state, end)
        good = len(job.keys)
        cuts = [shape.chunks * group // groups for group in range(groups + 1)]
        for first, last in pairwise(cuts):
            for start in range(0, good, batch):
                if job.arrivals.failed or self._closing:
                    reasons[start:] = [Reason.LATE] * (len(reasons) - start)
                    good = min(good, start)
                    break
                part = slice(start, min(start + batch, good))
                outcomes = self._read(job, part, (first, last), end)
                for index, outcome in enumerate(outcomes, start):
                    reasons[index], tiers[index] = outcome.reason, outcome.tier
                bad = next((i for i, one in enumerate(outcomes, start) if one.reason is not Reason.HIT), None)
                if bad is not None:
                    good = bad
                    job.arrivals.fail()
                    break
            if not job.arrivals.failed:
                job.arrivals.arrived(last)
                self._wake()  # the request may be able to start
        reasons[good + 1 :] = [Reason.LATE] * len(reasons[good + 1 :])
        return Loaded(job.serial, reasons, tiers, state, self._clock.monotonic() - begun)

    def _read(self, job: Load, part: slice, layers: tuple[int, int], end: float) -> list[Outcome]:
        """Read some layers of some blocks to where they belong."""
        shape, (first, last) = self._shapes.block, layers
        keys, blocks = job.keys[part], job.blocks[part]
        low, high = first * shape.chunk_bytes, last * shape.chunk_bytes
        views = [self._memory.view(RecordKind.BLOCK, block) for block in blocks]
        buffers = [memoryview(bytearray(high - low)) if view is None else view[low:high] for view in views]
        wants = [Want(key, shape, buffer, first, last - first) for key, buffer in zip(keys, buffers, strict=True)]
        left = max(0.0, end - self._clock.monotonic())
        with self._store.lease(keys, self._settings.lease_s) as lease:
            outcomes = self._store.read(lease, wants, left)
        if any(view is None for view in views):
            for block, buffer, outcome in zip(blocks, buffers, outcomes, strict=True):
                if outcome.reason is Reason.HIT:
                    record = bytearray(self._memory.read(RecordKind.BLOCK, block))
                    record[low:high] = buffer
                    self._memory.write(RecordKind.BLOCK, block, bytes(record))
        return outcomes

    def _load_state(self, state: tuple[BlockKey, int], end: float) -> Reason:
        key, slot = state
        shape = self._shapes.of(RecordKind.STATE)
        view = self._memory.view(RecordKind.STATE, slot)
        buffer = memoryview(bytearray(shape.record_bytes)) if view is None else view
        left = max(0.0, end - self._clock.monotonic())
        lease: Lease
        with self._store.lease([key], self._settings.lease_s) as lease:
            [outcome] = self._store.read(lease, [Want(key, shape, buffer)], left)
        if view is None and outcome.reason is Reason.HIT:
            self._memory.write(RecordKind.STATE, slot, bytes(buffer))
        return outcome.reason

    # ---- writing behind

    def _keep_loop(self) -> None:
        heard = self._clock.monotonic()
        while True:
            jobs = self._next_keeps()
            if jobs is None:
                return
            self._write(jobs)
            now = self._clock.monotonic()
            if now - heard >= POLL_S:
                heard = now
                self._hear()

    def _next_keeps(self) -> list[Keep] | None:
        """The next jobs that go together, none when nothing came for a while; None at the end."""
        jobs: list[Keep] = []
        size = 0
        while size < BATCH_BYTES and len(jobs) < MAX_BATCH:
            try:
                job = self._keeps.get(timeout=POLL_S) if not jobs else self._keeps.get_nowait()
            except queue.Empty:
                return jobs
            match job:
                case None:
                    return None
                case Keep():
                    jobs.append(job)
                    size += self._shapes.of(job.kind).record_bytes
                case Notice():
                    self._store.hint([job.hint])
                case _Mark():
                    self._write(jobs)
                    jobs, size = [], 0
                    job.done.set()
        return jobs

    def _write(self, jobs: Sequence[Keep]) -> None:
        if not jobs:
            return
        puts = []
        for job in jobs:
            view = self._memory.view(job.kind, job.place)
            payload = memoryview(self._memory.read(job.kind, job.place)) if view is None else view
            puts.append(Put(job.key, job.parent, job.owner, self._shapes.of(job.kind), payload, job.lifetime))
        outcomes = self._store.write(puts, WRITE_S)
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._events.append(Kept(job.kind, job.place, outcome.reason))
        self._wake()

    def _hear(self) -> None:
        """Learn what was forgotten since the last time."""
        known: tuple[Erasure, ...] = self._store.stats().erasures
        new = [one for one in known if one.number > self._heard]
        if new:
            everything = new[0].number > self._heard + 1 and self._heard > 0
            self._heard = new[-1].number
            self._tell(Erased(new, everything))


def _jobs(jobs: "queue.Queue[T | None]") -> Iterator[T]:
    """What comes, until None does."""
    while True:
        job = jobs.get()
        if job is None:
            return
        yield job


def _end(jobs: "queue.Queue[Any]") -> None:
    """Take out what waits, and say that nothing follows."""
    try:
        while True:
            jobs.get_nowait()
    except queue.Empty:
        jobs.put(None)
