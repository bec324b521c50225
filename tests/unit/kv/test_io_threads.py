"""What is particular to the threads of a channel: how many there are, what they do when they are given up."""

import errno
import mmap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.disk import SECTOR, Disk, Op, Transfer, open_disk
from isthmus.state.kv.io.threads import MAX_WORKERS, ThreadChannel

CAPACITY = 64 * SECTOR


class Slow(Calls):
    """Reads wait for `gate` while there is one, and are then short."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: threading.Event | None = None
        self.began = threading.Semaphore(0)
        self.reads = 0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.reads += 1
        self.began.release()
        if self.gate is not None:
            self.gate.wait(30)
        return super().preadv(fd, [buffers[0][:SECTOR]], offset)


@pytest.fixture
def slow() -> Iterator[Slow]:
    calls = Slow()
    yield calls
    if calls.gate is not None:
        calls.gate.set()


def opened(folder: Path, calls: Calls) -> tuple[Disk, ThreadChannel]:
    disk = open_disk(folder / "log", capacity=CAPACITY, create=True, backend="threads", calls=calls, close_s=0.1)
    channel = disk.channel(32)
    assert isinstance(channel, ThreadChannel)
    return disk, channel


def reads(count: int, sectors: int = 1) -> list[Transfer]:
    return [Transfer(Op.READ, 0, memoryview(mmap.mmap(-1, sectors * SECTOR)), number) for number in range(count)]


def disk_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "disk"]


def test_threads_are_few_come_when_needed_and_go(tmp_path: Path, slow: Slow) -> None:
    before = disk_threads()
    disk, channel = opened(tmp_path, slow)
    assert disk_threads() == before
    channel.submit(reads(1))
    assert len(disk_threads()) == len(before) + 1
    channel.submit(reads(31))
    assert len(disk_threads()) == len(before) + MAX_WORKERS
    assert len(channel.wait(32, 20.0)) == 32
    disk.close()
    assert disk_threads() == before


def test_what_has_not_begun_is_taken_back_when_the_threads_are_stuck(tmp_path: Path, slow: Slow) -> None:
    disk, channel = opened(tmp_path, slow)
    slow.gate, slow.began = threading.Event(), threading.Semaphore(0)
    channel.submit(reads(MAX_WORKERS + 4))
    assert all(slow.began.acquire(timeout=20) for _ in range(MAX_WORKERS))
    channel.close()
    assert (channel.lost, disk.lost) == (MAX_WORKERS, MAX_WORKERS)


def test_a_thread_that_was_given_up_begins_nothing_more(tmp_path: Path, slow: Slow) -> None:
    before = disk_threads()
    disk, channel = opened(tmp_path, slow)
    slow.gate, slow.began, slow.reads = threading.Event(), threading.Semaphore(0), 0
    channel.submit(reads(1, sectors=4))
    assert slow.began.acquire(timeout=20)
    disk.close()
    assert disk.lost == 1
    slow.gate.set()
    for thread in set(disk_threads()) - set(before):
        thread.join(20)
    assert slow.reads == 1


def test_no_thread_at_all_is_told_and_fewer_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = 0
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        nonlocal started
        if started >= allowed:
            raise RuntimeError("can't start new thread")
        started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    disk, channel = opened(tmp_path, Calls())
    allowed = 0
    with pytest.raises(DiskFailed) as caught:
        channel.submit(reads(4))
    assert caught.value.errno == errno.EAGAIN
    assert channel.in_flight == 0
    allowed = 1
    channel.submit(reads(4))
    assert len(channel.wait(4, 20.0)) == 4
    disk.close()
