"""The threads of paging: they ask the store, fill blocks of the device's memory from it and write blocks behind.

Three of them: one asks where blocks are, one loads, one writes (and hears once a second what was forgotten). Each takes
jobs from a bounded queue, and every job ends with one event within the store's time limits. Blocks are read and written
where they lie, beside running steps: the scheduler leases what they touch, so no step does (policy.py). Where the
processor cannot address the device's memory, the runner copies between its steps.

A store never raises. Should anything be raised all the same, nobody knows what state it was left in, so nothing goes
on: the pager is gone. Every job that it was given ends as unavailable once nothing of it writes to the device any more,
and so does every later one.

They run in a process of their own (remote.py, serving.py), or beside the engine where memory cannot be shared
(local.py).
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from isthmus.contracts.blocks import (
    MAX_BATCH,
    BlockStore,
    Hint,
    Lease,
    Match,
    Outcome,
    Put,
    Reason,
    RecordKind,
    Tier,
    Want,
)
from isthmus.contracts.clock import Clock
from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.paging.jobs import (
    Arrived,
    Cancel,
    Erased,
    Event,
    Found,
    Job,
    Keep,
    Kept,
    Load,
    Loaded,
    Look,
    Notice,
    Told,
    unavailable,
)
from isthmus.execution.inference.paging.memory import DeviceMemory, Shapes
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


@dataclass(frozen=True, slots=True)
class _Mark:
    """Set `done` when what was queued before it is written."""

    done: threading.Event


class PagerThreads:
    """Takes jobs, from any thread, and tells what came of them, from its own. Start it by making one."""

    def __init__(
        self,
        store: BlockStore,
        memory: DeviceMemory,
        shapes: Shapes,
        settings: PagingSettings,
        clock: Clock,
        *,
        told: Told,
        gone: Callable[[], None],
        heard: int = -1,
    ) -> None:
        """`gone` is called, once, when something was raised, after the ends of the jobs were told. `heard`: the number
        of the last erasure that the engine knows of; -1: it holds no state yet.
        """
        self._store, self._memory, self._shapes = store, memory, shapes
        self._settings, self._clock, self._told, self._gone = settings, clock, told, gone
        self._looks: queue.Queue[Look | None] = queue.Queue(MAX_LOOKS)
        self._loads: queue.Queue[Load | None] = queue.Queue()  # bounded by max_loading
        self._keeps: queue.Queue[Keep | Notice | _Mark | None] = queue.Queue()  # bounded by keep_bytes and MAX_NOTICES
        forms = (shapes.block,) if shapes.state is None else (shapes.block, shapes.state)
        self._sizes = {form.kind: form.record_bytes for form in forms}
        self._wanted: dict[int, bool] = {}
        """Loads that have not ended, by their serial: False once cancelled."""
        self._heard, self._epoch = heard, b""
        self._closing = self._broken = False
        self._lock = threading.Lock()
        """Whoever queues a job holds it, so that none is queued after the last ones were taken out."""
        targets = {"look": self._look_loop, "load": self._load_loop, "keep": self._keep_loop}
        self._threads = [
            threading.Thread(target=self._run, args=(loop,), name=f"isthmus-{name}", daemon=True)
            for name, loop in targets.items()
        ]
        for thread in self._threads:
            thread.start()

    def do(self, job: Job) -> None:
        """Have a job done. With too many looks in the queue the answer is that nothing is there; with too many hints
        one is dropped: they are advice. With the pager gone nothing is done.
        """
        with self._lock:
            events = unavailable(job) if self._broken else self._queue(job)
        if events:
            self._told(events)

    def _queue(self, job: Job) -> list[Event]:
        match job:
            case Look():
                try:
                    self._looks.put_nowait(job)
                except queue.Full:
                    nowhere = [None] * len(job.keys), [None] * len(job.states)
                    return [Found(job.serial, *nowhere, Reason.FULL)]
            case Load():
                self._wanted[job.serial] = True
                self._loads.put(job)
            case Cancel():
                if job.serial in self._wanted:
                    self._wanted[job.serial] = False
            case Keep():
                self._keeps.put(job)
            case Notice():
                if self._keeps.qsize() < MAX_NOTICES:
                    self._keeps.put(job)
        return []

    @property
    def alive(self) -> bool:
        """Whether a thread of it still runs."""
        return any(thread.is_alive() for thread in self._threads)

    def close(self, timeout_s: float = WRITE_S) -> None:
        """End the threads after what they are doing; what waits is not done."""
        self._closing = True
        with self._lock:
            self._take_out()
        for thread in self._threads:
            thread.join(timeout_s)

    def settle(self, timeout_s: float) -> int:
        """Wait until what was written behind so far is durable; the store's watermark."""
        done = threading.Event()
        end = self._clock.monotonic() + timeout_s
        with self._lock:
            if not self._broken:
                self._keeps.put(_Mark(done))
        if not self._broken:
            done.wait(timeout_s)
        return self._store.flush(max(0.0, end - self._clock.monotonic()))

    # ---- a thread, and its end

    def _run(self, loop: Callable[[], None]) -> None:
        ended = False
        try:
            loop()
            ended = True
        finally:  # what was raised goes on: to standard error
            if not ended:
                self._break(())

    def _do(self, jobs: Sequence[Job], do: Callable[[], Sequence[Event]]) -> None:
        """Do `jobs` and tell what came of them."""
        events: Sequence[Event] | None = None
        try:
            events = do()
        finally:
            if events is None:
                self._break(jobs)
        if events:
            self._told(events)

    def _break(self, jobs: Sequence[Job]) -> None:
        """The pager is gone: end `jobs`, which the calling thread was doing, and those that wait. What another thread
        is doing ends by itself, within the store's limits, and that thread then ends, too.
        """
        with self._lock:
            first, self._broken = not self._broken, True
            self._closing = True
            waiting = self._take_out()
        try:
            events = [end for job in (*jobs, *waiting) for end in unavailable(job)]
            if events:
                self._told(events)
        finally:
            if first:
                self._gone()

    def _take_out(self) -> list[Job]:
        """Take out of the queues what waits, and have their threads end. The caller holds the lock."""
        waiting: list[Job] = []
        for one in (_end(self._looks), _end(self._loads), _end(self._keeps)):
            for job in one:
                if isinstance(job, _Mark):
                    job.done.set()
                else:
                    waiting.append(job)
        return waiting

    # ---- looking

    def _look_loop(self) -> None:
        for job in _jobs(self._looks):
            self._do([job], partial(self._look, job))

    def _look(self, job: Look) -> list[Event]:
        tiers = [match.tier for match in self._match([*job.keys, *job.states])]
        count = len(job.keys)
        return [Found(job.serial, tiers[:count], tiers[count:])]

    def _match(self, keys: Sequence[BlockKey]) -> list[Match]:
        found: list[Match] = []
        for start in range(0, len(keys), MAX_BATCH):
            found += self._store.match(keys[start : start + MAX_BATCH])
        return found

    # ---- loading

    def _load_loop(self) -> None:
        for job in _jobs(self._loads):
            self._do([job], partial(self._loaded, job))

    def _loaded(self, job: Load) -> list[Event]:
        try:
            return [self._load(job)]
        finally:
            self._wanted.pop(job.serial, None)  # before it is told: the same sequence may load again at once

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
                if not self._wanted.get(job.serial) or self._closing:
                    late = [Reason.LATE] * len(reasons)
                    return Loaded(job.serial, late, tiers, state, self._clock.monotonic() - begun)
                part = slice(start, min(start + batch, good))
                outcomes = self._read(job, part, (first, last), end)
                for index, outcome in enumerate(outcomes, start):
                    reasons[index], tiers[index] = outcome.reason, outcome.tier
                bad = next((i for i, one in enumerate(outcomes, start) if one.reason is not Reason.HIT), None)
                if bad is not None:
                    good = bad  # what is before it is still worth having
                    break
            self._told([Arrived(job.serial, last, good < len(job.keys))])
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
            self._do(jobs, partial(self._write, jobs))
            now = self._clock.monotonic()
            if now - heard >= POLL_S:
                heard = now
                self._do([], self._hear)

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
                case None:  # after what it has
                    self._keeps.put(None)
                    return jobs or None
                case Keep():
                    jobs.append(job)
                    size += self._sizes.get(job.kind, 0)
                case Notice():
                    self._do(jobs, partial(self._hint, job.hint))
                case _Mark():
                    try:
                        self._do(jobs, partial(self._write, jobs))
                    finally:
                        job.done.set()
                    jobs, size = [], 0
        return jobs

    def _hint(self, hint: Hint) -> list[Event]:
        self._store.hint([hint])
        return []

    def _write(self, jobs: Sequence[Keep]) -> list[Event]:
        if not jobs:
            return []
        puts = []
        for job in jobs:
            view = self._memory.view(job.kind, job.place)
            payload = memoryview(self._memory.read(job.kind, job.place)) if view is None else view
            puts.append(Put(job.key, job.parent, job.owner, self._shapes.of(job.kind), payload, job.lifetime))
        outcomes = self._store.write(puts, WRITE_S)
        return [Kept(job.kind, job.place, one.reason) for job, one in zip(jobs, outcomes, strict=True)]

    def _hear(self) -> list[Event]:
        """Learn what was forgotten since the last time."""
        stats = self._store.stats()
        known = stats.erasures
        if stats.epoch != self._epoch:
            self._epoch = stats.epoch
            numbered = any(tier.tier == Tier.NVME and tier.capacity for tier in stats.tiers)
            if not numbered or (known and known[-1].number < self._heard):
                # Another log, or a store that keeps none: its numbers began anew.
                self._heard = min(self._heard, 0)
        new = [one for one in known if one.number > self._heard]
        everything = bool(new) and 0 <= self._heard < new[0].number - 1
        self._heard = max(self._heard, new[-1].number if new else 0)
        return [Erased(new, everything)] if new else []


def _jobs(jobs: "queue.Queue[T | None]") -> Iterator[T]:
    """What comes, until None does."""
    while True:
        job = jobs.get()
        if job is None:
            return
        yield job


def _end(jobs: "queue.Queue[Any]") -> list[Any]:
    """Take out what waits, and say that nothing follows."""
    found = []
    try:
        while True:
            found.append(jobs.get_nowait())
    except queue.Empty:
        jobs.put(None)
    return [job for job in found if job is not None]
