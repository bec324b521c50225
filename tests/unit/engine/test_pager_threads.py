"""The threads of paging over a store that breaks its promise and raises: every job ends all the same."""

import queue
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
    """Raises what nobody foresees, while `broken`."""

    broken = True

    def __getattribute__(self, name: str) -> object:
        if name in ("match", "lease", "write", "hint", "stats") and self.broken:
            raise RuntimeError(f"{name} is broken")
        return super().__getattribute__(name)


class Threads:
    def __init__(self) -> None:
        self.store, self.told = Broken(), queue.SimpleQueue[Event | Arrived]()
        self.threads = PagerThreads(
            self.store,  # type: ignore[arg-type]
            Memory(),
            Shapes(SHAPE, None),
            PagingSettings(),
            SystemClock(),
            told=lambda events: [self.told.put(event) for event in events],  # type: ignore[misc,func-returns-value]
        )

    def end_of(self, job: Look | Load | Keep) -> Event:
        self.threads.do(job)
        while isinstance(event := self.told.get(timeout=WITHIN_S), Arrived):
            pass
        return event


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads()
    yield made
    made.threads.close()
    assert not made.threads.alive


def keep(place: int) -> Keep:
    return Keep(RecordKind.BLOCK, KEYS[place], None, Owner(bytes(16)), place, Lifetime.SESSION)


def test_jobs_end_when_the_store_raises_and_are_done_when_it_does_not_any_more(threads: Threads) -> None:
    load = Load(7, KEYS, [0, 1, 2])
    for _ in range(2):
        assert threads.end_of(Look(7, KEYS)) == Found(7, [None] * 3, [], Reason.UNAVAILABLE)
        assert threads.end_of(load) == Loaded(7, [Reason.UNAVAILABLE] * 3, [None] * 3, None, 0.0)
        threads.threads.do(Notice(Hint(HintKind.DONE, KEYS)))
        assert threads.end_of(keep(1)) == Kept(RecordKind.BLOCK, 1, Reason.UNAVAILABLE)
    threads.store.broken = False
    assert [threads.end_of(keep(place)) for place in range(3)] == [
        Kept(RecordKind.BLOCK, place, Reason.STORED) for place in range(3)
    ]
    assert threads.end_of(Look(8, KEYS)) == Found(8, [Tier.NVME] * 3, [])
    loaded = threads.end_of(load)
    assert isinstance(loaded, Loaded)
    assert loaded.whole
