"""The threads of paging over a store that breaks its promise and raises: every job ends all the same, and nothing goes
on with what it left.
"""

import queue
import threading
from collections.abc import Iterator

import pytest
from tests.support.memory_store import MemoryStore

from isthmus.contracts.blocks import Hint, HintKind, Lifetime, Owner, Reason, RecordKind, Shape, Tier
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.paging.jobs import Arrived, Event, Found, Keep, Kept, Load, Loaded, Look, Notice
from isthmus.execution.inference.paging.memory import Shapes
from isthmus.execution.inference.paging.pager import PagerThreads
from isthmus.execution.inference.paging.settings import PagingSettings

WITHIN_S = 20.0
SHAPE = Shape(RecordKind.BLOCK, 2, 64)
KEYS = [BlockKey(bytes([number]) * 32) for number in range(3)]


class Memory:
    """Of a device with three blocks."""

    def __init__(self) -> None:
        self.blocks = [bytearray(SHAPE.record_bytes) for _ in KEYS]

    def view(self, kind: RecordKind, place: int) -> memoryview | None:
        return memoryview(self.blocks[place])

    def read(self, kind: RecordKind, place: int) -> bytes:
        raise NotImplementedError

    def write(self, kind: RecordKind, place: int, record: bytes) -> None:
        raise NotImplementedError


class Broken(MemoryStore):
    """Raises what nobody foresees, in the calls named; `held` are those that wait for `gate`."""

    broken: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()

    def __getattribute__(self, name: str) -> object:
        if name in ("match", "lease", "write", "hint", "stats"):
            if name in self.waiting and self.gate is not None:
                self.reached.set()
                assert self.gate.wait(WITHIN_S)
            if name in self.broken:
                raise RuntimeError(f"{name} is broken")
        return super().__getattribute__(name)

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()


class Threads:
    def __init__(self) -> None:
        self.store, self.told = Broken(), queue.SimpleQueue[Event | Arrived]()
        self.gone = queue.SimpleQueue[str]()
        self.threads = PagerThreads(
            self.store,  # type: ignore[arg-type]
            Memory(),
            Shapes(SHAPE, None),
            PagingSettings(),
            SystemClock(),
            told=lambda events: [self.told.put(event) for event in events],  # type: ignore[misc,func-returns-value]
            gone=lambda: self.gone.put("gone"),
        )

    def next_end(self) -> Event:
        while isinstance(event := self.told.get(timeout=WITHIN_S), Arrived):
            pass
        return event

    def end_of(self, job: Look | Load | Keep) -> Event:
        self.threads.do(job)
        return self.next_end()

    def ended(self) -> None:
        """Wait until no thread is left; it went once."""
        assert self.gone.get(timeout=WITHIN_S)
        for thread in self.threads._threads:
            thread.join(WITHIN_S)
        assert not self.threads.alive
        assert self.gone.empty()


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads()
    yield made
    made.threads.close()
    assert not made.threads.alive


def keep(place: int) -> Keep:
    return Keep(RecordKind.BLOCK, KEYS[place], None, Owner(bytes(16)), place, Lifetime.SESSION)


LOOK, LOAD, NOTICE = Look(7, KEYS), Load(7, KEYS, [0, 1, 2]), Notice(Hint(HintKind.DONE, KEYS))
raises = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def end(job: Look | Load | Keep) -> Event:
    match job:
        case Look():
            return Found(job.serial, [None] * 3, [], Reason.UNAVAILABLE)
        case Load():
            return Loaded(job.serial, [Reason.UNAVAILABLE] * 3, [None] * 3, None, 0.0)
        case Keep():
            return Kept(RecordKind.BLOCK, job.place, Reason.UNAVAILABLE)


def test_with_a_store_that_does_not_raise_nothing_is_gone(threads: Threads) -> None:
    assert [threads.end_of(keep(place)) for place in range(3)] == [
        Kept(RecordKind.BLOCK, place, Reason.STORED) for place in range(3)
    ]
    assert threads.end_of(LOOK) == Found(7, [Tier.NVME] * 3, [])
    loaded = threads.end_of(LOAD)
    assert isinstance(loaded, Loaded)
    assert loaded.whole
    assert threads.threads.settle(WITHIN_S) == 3
    assert threads.gone.empty()


@raises
@pytest.mark.parametrize(("call", "job"), [("match", LOOK), ("lease", LOAD), ("write", keep(1))])
def test_what_raises_ends_the_job_and_every_later_one(threads: Threads, call: str, job: Look | Load | Keep) -> None:
    threads.store.broken = (call,)
    assert threads.end_of(job) == end(job)
    threads.ended()
    # Also when the store would do it now: nobody knows what it was left with.
    threads.store.broken = ()
    for later in (LOOK, LOAD, keep(2)):
        assert threads.end_of(later) == end(later)
    threads.threads.do(NOTICE)
    threads.threads.settle(WITHIN_S)
    assert not threads.store.records


@raises
@pytest.mark.parametrize("call", ["hint", "stats"])
def test_what_raises_without_a_job_ends_them_all_the_same(threads: Threads, call: str) -> None:
    """The store is asked what was forgotten about once a second."""
    threads.store.broken = (call,)
    threads.threads.do(NOTICE)
    threads.ended()
    assert threads.end_of(keep(0)) == end(keep(0))


@raises
def test_what_waits_ends_with_what_raised(threads: Threads) -> None:
    threads.store.gate, threads.store.waiting, threads.store.broken = threading.Event(), ("match",), ("match",)
    jobs = [Look(serial, KEYS) for serial in range(5)]
    for job in jobs:
        threads.threads.do(job)
    assert threads.store.reached.wait(WITHIN_S)
    threads.store.gate.set()
    assert [threads.next_end() for _ in jobs] == [end(job) for job in jobs]
    threads.ended()


@raises
def test_what_another_thread_is_doing_ends_when_it_has_done_it(threads: Threads) -> None:
    """Its blocks must not be somebody else's while it may still write to them."""
    assert threads.end_of(keep(0)) == Kept(RecordKind.BLOCK, 0, Reason.STORED)
    store = threads.store
    store.gate, store.waiting, store.broken = threading.Event(), ("lease",), ("match",)
    threads.threads.do(Load(8, KEYS[:1], [0]))
    assert store.reached.wait(WITHIN_S)
    assert threads.end_of(LOOK) == end(LOOK)
    assert threads.gone.get(timeout=WITHIN_S)
    assert threads.told.empty()
    store.gate.set()
    loaded = threads.next_end()
    assert isinstance(loaded, Loaded)
    assert loaded.serial == 8
    for thread in threads.threads._threads:
        thread.join(WITHIN_S)
    assert not threads.threads.alive
