"""The conformance suite of `Disk` and `Channel`: every backend passes it. To add one, add its name to `BACKENDS`."""

import errno
import gc
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.support.disk import FailingCalls, StuckCalls, TamperingCalls, descriptors

from isthmus.contracts.errors import DiskFailed, InvalidInput, StoreError, StoreFull, StoreLocked, StoreUnavailable
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.disk import SECTOR, AlignedBuffers, Backend, Channel, Completion, Disk, Op, Transfer, open_disk
from isthmus.state.kv.io.ring import RingChannel
from isthmus.state.kv.io.transfers import MAX_STALLS
from isthmus.state.kv.io.uring import refusal

BACKENDS: tuple[Backend, ...] = ("io_uring", "threads")
CAPACITY = 64 * SECTOR
WAIT_S = 20.0

Opener = Callable[..., Disk]

HOLDER = """
import sys
from pathlib import Path
from isthmus.contracts.errors import StoreLocked
from isthmus.state.kv.io.disk import open_disk
try:
    disk = open_disk(Path(sys.argv[1]), backend=sys.argv[2])
except StoreLocked:
    print("locked", flush=True)
else:
    channel = disk.channel(1)
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name: Backend = request.param
    if name == "io_uring" and (reason := refusal(Calls())):
        pytest.skip(f"NOT RUN: {reason}")
    return name


@pytest.fixture
def opened(backend: Backend, tmp_path: Path) -> Iterator[Opener]:
    """Opens disks in the test's folder; closes them in the end."""
    disks: list[Disk] = []

    def open_one(name: str = "log", capacity: int = CAPACITY, calls: Calls | None = None, close_s: float = 10) -> Disk:
        path = tmp_path / name
        disk = open_disk(path, capacity=capacity, create=True, backend=backend, calls=calls, close_s=close_s)
        disks.append(disk)
        assert disk.backend == backend
        return disk

    yield open_one
    for disk in disks:
        disk.close()


def pattern(number: int, length: int) -> bytes:
    return random.Random(number).randbytes(length)


def taken(buffers: AlignedBuffers) -> memoryview:
    view = buffers.take()
    assert view is not None
    return view


def all_of(channel: Channel) -> dict[int, int]:
    """Wait for everything: errors by tag."""
    done: list[Completion] = []
    while channel.in_flight:
        found = channel.wait(1, WAIT_S)
        assert found, "nothing came within the time"
        done += found
    assert len({completion.tag for completion in done}) == len(done)
    return {completion.tag: completion.error for completion in done}


def moved(channel: Channel, op: Op, offset: int, view: memoryview) -> int:
    channel.submit([Transfer(op, offset, view, 7)])
    return all_of(channel)[7]


@dataclass
class Stuck:
    """A disk with one buffer, and a read into it (tag 3) that does not end before the calls are released."""

    disk: Disk
    channel: Channel
    buffers: AlignedBuffers
    view: memoryview
    calls: StuckCalls


@contextmanager
def stuck(opened: Opener) -> Iterator[Stuck]:
    calls = StuckCalls(pattern(1, SECTOR))
    disk = opened(calls=calls, close_s=0.1)
    buffers = AlignedBuffers(1, SECTOR)
    channel = disk.channel(2, buffers)
    view = taken(buffers)
    view[:] = pattern(1, SECTOR)
    assert moved(channel, Op.WRITE, 0, view) == 0
    view[:] = bytes(SECTOR)
    calls.stuck = True
    channel.submit([Transfer(Op.READ, 0, view, 3)])
    assert calls.entered.wait(WAIT_S)
    yield Stuck(disk, channel, buffers, view, calls)
    calls.release()
    calls.close_pipe()


# Moving bytes


@pytest.mark.parametrize("registered", [True, False])
def test_what_was_written_is_read_back(opened: Opener, registered: bool) -> None:
    disk = opened()
    buffers = AlignedBuffers(16, 4 * SECTOR)
    channel = disk.channel(16, buffers if registered else None)
    assert (disk.capacity, channel.depth, channel.in_flight) == (CAPACITY, 16, 0)
    written = [taken(buffers) for _ in range(16)]
    for number, view in enumerate(written):
        view[:] = pattern(number, 4 * SECTOR)
    channel.submit([Transfer(Op.WRITE, n * 4 * SECTOR, view, n) for n, view in enumerate(written)])
    assert channel.in_flight == 16
    assert all_of(channel) == dict.fromkeys(range(16), 0)
    disk.sync()
    for view in written:
        view[:] = bytes(len(view))
    channel.submit([Transfer(Op.READ, n * 4 * SECTOR, view, n) for n, view in enumerate(written)])
    assert all_of(channel) == dict.fromkeys(range(16), 0)
    assert [bytes(view) for view in written] == [pattern(n, 4 * SECTOR) for n in range(16)]
    channel.close()
    disk.close()
    again = opened()
    view = written[0]
    assert moved(again.channel(1), Op.READ, 5 * 4 * SECTOR, view) == 0
    assert view == pattern(5, 4 * SECTOR)


def test_memory_that_can_only_be_read_can_be_written_from(opened: Opener) -> None:
    channel = opened().channel(2)
    memory = mmap.mmap(-1, SECTOR)
    memory[:] = pattern(9, SECTOR)
    assert moved(channel, Op.WRITE, SECTOR, memoryview(memory).toreadonly()) == 0
    memory[:] = bytes(SECTOR)
    assert moved(channel, Op.READ, SECTOR, memoryview(memory)) == 0
    assert memory[:] == pattern(9, SECTOR)
    with pytest.raises(InvalidInput, match="written to"):
        channel.submit([Transfer(Op.READ, 0, memoryview(memory).toreadonly(), 0)])


def test_items_of_any_size_are_bytes(opened: Opener) -> None:
    channel = opened().channel(1)
    memory = mmap.mmap(-1, 2 * SECTOR)
    wide = memoryview(memory).cast("Q")
    wide[1023] = 77
    assert moved(channel, Op.WRITE, 0, wide) == 0
    wide[1023] = 0
    assert moved(channel, Op.READ, 0, wide) == 0
    assert wide[1023] == 77


def test_a_random_mix_agrees_with_a_model(opened: Opener) -> None:
    draw = random.Random(20)
    disk = opened()
    buffers = AlignedBuffers(24, 4 * SECTOR)
    channel, free = disk.channel(12, buffers), [taken(buffers) for _ in range(24)]
    model = bytearray(CAPACITY)
    flying: dict[int, tuple[Op, range, memoryview, memoryview]] = {}
    for tag in range(1500):
        batch = []
        for part in range(draw.randrange(4)):
            count = draw.randint(1, 4)
            first = draw.randrange(CAPACITY // SECTOR - count + 1)
            sectors, op = range(first, first + count), draw.choice(list(Op))
            busy = any(set(sectors) & set(other) and Op.WRITE in (op, kind) for kind, other, _, _ in flying.values())
            if busy or channel.in_flight + len(batch) >= channel.depth:
                continue
            whole = free.pop()
            view = whole[: count * SECTOR]
            if op is Op.WRITE:
                view[:] = model[first * SECTOR : first * SECTOR + len(view)] = draw.randbytes(len(view))
            flying[tag * 4 + part] = (op, sectors, view, whole)
            batch.append(Transfer(op, first * SECTOR, view, tag * 4 + part))
        channel.submit(batch)
        for completion in channel.wait(draw.randrange(channel.in_flight + 1), WAIT_S):
            op, sectors, view, whole = flying.pop(completion.tag)
            assert completion.error == 0
            assert op is Op.WRITE or view == model[sectors.start * SECTOR : sectors.stop * SECTOR]
            free.append(whole)
        if not draw.randrange(100):
            disk.sync()
        first = draw.randrange(CAPACITY // SECTOR)
        if not draw.randrange(20) and not any(first in sectors for _, sectors, _, _ in flying.values()):
            disk.zero(first * SECTOR, SECTOR)
            model[first * SECTOR : (first + 1) * SECTOR] = bytes(SECTOR)
    assert set(all_of(channel).values()) <= {0}


# What a transfer may be


def test_a_transfer_that_is_not_aligned_begins_nothing_of_its_batch(opened: Opener) -> None:
    channel = opened().channel(8)
    memory = memoryview(mmap.mmap(-1, 4 * SECTOR))
    memory[:SECTOR] = pattern(1, SECTOR)
    good = Transfer(Op.WRITE, 0, memory[:SECTOR], 0)
    for offset, view, field in [
        (512, memory[:SECTOR], "transfer"),
        (0, memory[: SECTOR + 512], "transfer"),
        (0, memory[512 : 512 + SECTOR], "transfer"),
        (-SECTOR, memory[:SECTOR], "offset"),
        (1 << 63, memory[:SECTOR], "offset"),
        (0, memory[:0], "buffer"),
        (0, memory[: 2 * SECTOR : 2], "buffer"),
    ]:
        with pytest.raises(InvalidInput) as caught:
            channel.submit([good, Transfer(Op.WRITE, offset, view, 1)])
        assert caught.value.field == field
        assert channel.in_flight == 0
    assert moved(channel, Op.READ, 0, memory[SECTOR : 2 * SECTOR]) == 0
    assert memory[SECTOR : 2 * SECTOR] == bytes(SECTOR)


def test_over_depth_is_refused(opened: Opener) -> None:
    disk = opened()
    buffers = AlignedBuffers(4, SECTOR)
    channel = disk.channel(3, buffers)
    views = [taken(buffers) for _ in range(4)]
    some = [Transfer(Op.READ, 0, view, n) for n, view in enumerate(views)]
    with pytest.raises(InvalidInput, match="room for 3"):
        channel.submit(some)
    assert channel.in_flight == 0
    channel.submit(some[:2])
    with pytest.raises(InvalidInput, match="room for 1"):
        channel.submit(some[2:])
    assert sorted(all_of(channel)) == [0, 1]
    channel.submit(some[:3])
    assert sorted(all_of(channel)) == [0, 1, 2]
    for depth in (0, 5000):
        with pytest.raises(InvalidInput, match="depth"):
            disk.channel(depth)


def test_past_the_end_is_an_error_and_the_file_does_not_grow(opened: Opener, tmp_path: Path) -> None:
    channel = opened().channel(8)
    memory = memoryview(mmap.mmap(-1, 2 * SECTOR))
    for offset in (CAPACITY - SECTOR, CAPACITY, CAPACITY + SECTOR):
        assert moved(channel, Op.READ, offset, memory) == errno.EIO
        assert moved(channel, Op.WRITE, offset, memory) == errno.ENOSPC
    assert moved(channel, Op.WRITE, CAPACITY - 2 * SECTOR, memory) == 0
    assert (tmp_path / "log").stat().st_size == CAPACITY


@pytest.mark.parametrize("left", [0, 2 * SECTOR, 2 * SECTOR + 100])
def test_a_file_cut_behind_our_back_reads_as_an_error(opened: Opener, tmp_path: Path, left: int) -> None:
    channel = opened().channel(1)
    os.truncate(tmp_path / "log", left)
    assert moved(channel, Op.READ, 0, memoryview(mmap.mmap(-1, 4 * SECTOR))) == errno.EIO


# What the kernel may answer


def test_an_error_is_of_its_transfer_alone(opened: Opener) -> None:
    calls = TamperingCalls()
    buffers = AlignedBuffers(8, SECTOR)
    channel = opened(calls=calls).channel(8, buffers)
    answers = iter([0, -errno.EIO, 0, 0, -errno.ENOSPC, 0, 0, 0])
    calls.answer = lambda result: next(answers) or result
    channel.submit([Transfer(Op.WRITE, n * SECTOR, taken(buffers), n) for n in range(8)])
    assert sorted(all_of(channel).values()) == [0] * 6 + sorted([errno.EIO, errno.ENOSPC])


@pytest.mark.parametrize("unaligned", [0, 100, SECTOR - 1])
def test_short_transfers_are_continued(opened: Opener, unaligned: int) -> None:
    calls = TamperingCalls(longest=2 * SECTOR)
    calls.answer = lambda result: result - unaligned if result == 2 * SECTOR else result
    buffers = AlignedBuffers(2, 8 * SECTOR)
    channel = opened(calls=calls).channel(4, buffers)
    one, other = taken(buffers), taken(buffers)
    one[:], other[:] = pattern(1, 8 * SECTOR), pattern(2, 8 * SECTOR)
    channel.submit([Transfer(Op.WRITE, 0, one, 1), Transfer(Op.WRITE, 8 * SECTOR, other, 2)])
    assert all_of(channel) == {1: 0, 2: 0}
    channel.submit([Transfer(Op.READ, 8 * SECTOR, one, 1), Transfer(Op.READ, 0, other, 2)])
    assert all_of(channel) == {1: 0, 2: 0}
    assert (one, other) == (pattern(2, 8 * SECTOR), pattern(1, 8 * SECTOR))


@pytest.mark.parametrize("answer", [0, 100])
def test_no_progress_is_an_error(opened: Opener, answer: int) -> None:
    channel = opened(calls=TamperingCalls(answer=lambda _: answer)).channel(4)
    assert moved(channel, Op.READ, 0, memoryview(mmap.mmap(-1, 4 * SECTOR))) == errno.EIO


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN])
@pytest.mark.parametrize("times", [3, MAX_STALLS + 1])
def test_not_now_is_tried_again_and_not_for_ever(opened: Opener, number: int, times: int) -> None:
    answers = iter([-number] * times)
    calls = TamperingCalls()
    channel = opened(calls=calls).channel(4)
    calls.answer = lambda result: next(answers, result)
    view = memoryview(mmap.mmap(-1, SECTOR))
    view[:] = pattern(3, SECTOR)
    assert moved(channel, Op.WRITE, 0, view) == (number if times > MAX_STALLS else 0)


def test_a_sync_that_fails_is_told_and_made_once(opened: Opener) -> None:
    calls = FailingCalls(lambda name, _: errno.EIO if name == "fdatasync" else 0)
    disk = opened(calls=calls)
    with pytest.raises(DiskFailed, match="fdatasync") as caught:
        disk.sync()
    assert caught.value.errno == errno.EIO
    assert calls.failed == ["fdatasync"]


# Waiting, memory, closing


def test_waiting_ends_with_its_time(opened: Opener) -> None:
    with stuck(opened) as it:
        assert it.channel.wait(1, 0.05) == []
        assert it.channel.wait(0, 0.0) == []
        assert it.channel.wait(1, -1.0) == []
        assert it.channel.in_flight == 1
        for endless in (float("inf"), float("nan")):
            with pytest.raises(InvalidInput, match="end"):
                it.channel.wait(1, endless)
        it.calls.release()
        # More than there are in flight: all of them.
        assert it.channel.wait(2, WAIT_S) == [Completion(3, 0)]
        assert it.view == pattern(1, SECTOR)
        assert it.channel.wait(1, WAIT_S) == []


def test_a_buffer_given_back_in_flight_is_not_handed_out(opened: Opener) -> None:
    with stuck(opened) as it:
        it.buffers.give(it.view)
        assert (it.buffers.free, it.buffers.aside, it.buffers.take(0.02)) == (0, 1, None)
        it.calls.release()
        assert it.channel.wait(1, WAIT_S) == [Completion(3, 0)]
        assert (it.buffers.free, it.buffers.aside) == (1, 0)
        # It held the bytes that came although its view was gone.
        assert taken(it.buffers) == pattern(1, SECTOR)


def test_memory_stays_while_a_transfer_is_in_flight(opened: Opener) -> None:
    with stuck(opened) as it:
        memory = mmap.mmap(-1, SECTOR)
        view = memoryview(memory)
        it.channel.submit([Transfer(Op.READ, 0, view, 4)])
        view.release()
        gc.collect()
        with pytest.raises(BufferError):
            memory.close()
        it.calls.release()
        assert all_of(it.channel) == {3: 0, 4: 0}
        assert memory[:] == pattern(1, SECTOR)
        memory.close()


def test_views_may_be_dropped_after_submit(opened: Opener) -> None:
    channel = opened().channel(32)

    def transfer(number: int) -> Transfer:
        memory = mmap.mmap(-1, SECTOR)
        memory[:] = pattern(number, SECTOR)
        return Transfer(Op.WRITE, number * SECTOR, memoryview(memory), number)

    channel.submit([transfer(number) for number in range(32)])
    gc.collect()
    others = [bytearray(SECTOR) for _ in range(64)]
    assert set(all_of(channel).values()) == {0}
    view = memoryview(mmap.mmap(-1, 32 * SECTOR))
    assert moved(channel, Op.READ, 0, view) == 0
    assert view == b"".join(pattern(number, SECTOR) for number in range(32))
    assert not any(map(any, others))


def test_closing_waits_for_what_is_in_flight(opened: Opener) -> None:
    disk = opened()
    buffers = AlignedBuffers(16, 4 * SECTOR)
    channel = disk.channel(16, buffers)
    views = [taken(buffers) for _ in range(16)]
    for number, view in enumerate(views):
        view[:] = pattern(number, 4 * SECTOR)
    channel.submit([Transfer(Op.WRITE, n * 4 * SECTOR, view, n) for n, view in enumerate(views)])
    channel.close()
    channel.close()
    assert (channel.in_flight, channel.lost, disk.lost) == (0, 0, 0)
    for view in views:
        buffers.give(view)
    assert (buffers.free, buffers.aside) == (16, 0)
    for call in (lambda: channel.submit([]), lambda: channel.wait(0, 0)):
        with pytest.raises(StoreUnavailable, match="closed"):
            call()
    # What had reached the kernel is there: with threads not all of it need have.
    view = taken(buffers)
    again = disk.channel(1)
    for number in range(16):
        assert moved(again, Op.READ, number * 4 * SECTOR, view) == 0
        assert bytes(view) in (pattern(number, 4 * SECTOR), bytes(4 * SECTOR))


def test_closing_gives_up_on_a_disk_that_does_not_answer(opened: Opener, tmp_path: Path) -> None:
    with stuck(opened) as it:
        it.disk.close()
        assert (it.channel.lost, it.disk.lost) == (1, 1)
        it.buffers.give(it.view)
        it.buffers.close()
        assert (it.buffers.free, it.buffers.aside) == (0, 1)
        # The transfer may still write there, so the pages are; and it may reach the disk, so nobody else has that.
        with pytest.raises(BufferError):
            it.buffers._memory.close()
        with pytest.raises(StoreLocked):
            open_disk(tmp_path / "log")
        memory = np.frombuffer(it.buffers._memory, np.uint8, SECTOR)
        it.calls.release()
        if isinstance(it.channel, RingChannel):
            it.channel._ring.enter(1, WAIT_S)
        assert eventually(lambda: memory.tobytes() == pattern(1, SECTOR))


def test_dropping_everything_unclosed_is_safe(backend: Backend, tmp_path: Path) -> None:
    for number in range(3):
        disk = open_disk(tmp_path / f"log{number}", capacity=CAPACITY, create=True, backend=backend)
        channel = disk.channel(8)
        memory = mmap.mmap(-1, 8 * SECTOR)
        channel.submit([Transfer(Op.READ, n * SECTOR, memoryview(memory)[:SECTOR], n) for n in range(8)])
        del disk, channel, memory
        gc.collect()
    assert not any(bytearray(8 * SECTOR))


def test_a_closed_disk_does_nothing(opened: Opener) -> None:
    disk = opened()
    channel = disk.channel(1)
    disk.close()
    disk.close()
    view = memoryview(mmap.mmap(-1, SECTOR))
    for call in (
        lambda: disk.channel(1),
        disk.sync,
        lambda: disk.zero(0, SECTOR),
        lambda: channel.submit([Transfer(Op.READ, 0, view, 0)]),
    ):
        with pytest.raises(StoreUnavailable, match="closed"):
            call()


def test_a_channel_goes_from_thread_to_thread_with_nothing_in_flight(opened: Opener) -> None:
    buffers = AlignedBuffers(2, SECTOR)
    channel, view = opened().channel(2, buffers), taken(buffers)
    results: list[int] = []
    for number in range(6):
        thread = threading.Thread(target=lambda: results.append(moved(channel, Op.READ, 0, view)))
        if number == 3:
            results.append(moved(channel, Op.READ, SECTOR, view))
        thread.start()
        thread.join(WAIT_S)
    assert results == [0] * 7


def test_what_is_lost_counts_also_when_somebody_asks_while_a_channel_is_closed(opened: Opener) -> None:
    with stuck(opened) as it:
        thread = threading.Thread(target=it.channel.close)
        thread.start()
        while thread.is_alive():
            assert it.disk.lost in (0, 1)
        assert it.disk.lost == 1


def test_a_shared_channel_is_closed_by_another_thread_with_transfers_in_flight(opened: Opener) -> None:
    disk = opened(capacity=256 * SECTOR)
    buffers = AlignedBuffers(8, 32 * SECTOR)
    channel, views = disk.channel(8, buffers, shared=True), [taken(buffers) for _ in range(8)]
    channel.submit([Transfer(Op.READ, number * 32 * SECTOR, view, number) for number, view in enumerate(views)])
    thread = threading.Thread(target=channel.close)
    thread.start()
    thread.join(WAIT_S)  # whoever began them does nothing about it meanwhile
    assert not thread.is_alive()
    assert channel.lost == disk.lost == 0
    for view in views:
        buffers.give(view)
    assert (buffers.free, buffers.aside) == (8, 0)


def test_channels_work_beside_each_other(opened: Opener) -> None:
    disk = opened(capacity=256 * SECTOR)
    buffers = AlignedBuffers(16, SECTOR)
    errors: list[object] = []

    def work(part: int) -> None:
        channel, view = disk.channel(4, buffers), taken(buffers)
        for number in range(64):
            view[:] = bytes([part, number]) * (SECTOR // 2)
            errors.append(moved(channel, Op.WRITE, (part * 64 + number) * SECTOR, view))
        for number in range(64):
            errors.append(moved(channel, Op.READ, (part * 64 + number) * SECTOR, view))
            errors.append(0 if view == bytes([part, number]) * (SECTOR // 2) else "mixed up")
        channel.close()
        buffers.give(view)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert set(errors) == {0}
    assert buffers.free == 16


def test_opening_and_closing_leaves_no_descriptor(opened: Opener) -> None:
    opened().close()
    before = descriptors()
    for _ in range(10):
        disk = opened()
        channels = [disk.channel(4, AlignedBuffers(4, SECTOR)) for _ in range(3)]
        moved(channels[0], Op.READ, 0, memoryview(mmap.mmap(-1, SECTOR)))
        channels[1].close()
        disk.close()
    assert descriptors() == before


# One at a time


def test_a_second_opening_is_refused(opened: Opener, backend: Backend, tmp_path: Path) -> None:
    disk = opened()
    with pytest.raises(StoreLocked, match="open already"):
        open_disk(tmp_path / "log", backend=backend)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "log"), backend]
    environment = {**os.environ, "PYTHONPATH": "src"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert result.stdout == "locked\n", result.stderr
    disk.channel(4, AlignedBuffers(4, SECTOR))
    disk.close()
    # At once: the lock does not wait for the kernel to take the rings down.
    open_disk(tmp_path / "log", backend=backend).close()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked):
            open_disk(tmp_path / "log", backend=backend)
        process.kill()
    # The death of a holder is over when the kernel has taken its rings down, a little after the process.
    assert eventually(lambda: can_open(tmp_path / "log", backend))


def eventually(true: Callable[[], bool]) -> bool:
    """For what the kernel does in its own time."""
    return any(true() or threading.Event().wait(0.02) for _ in range(500))


def can_open(path: Path, backend: Backend) -> bool:
    try:
        open_disk(path, backend=backend).close()
    except StoreLocked:
        return False
    return True


# Zeroing


@pytest.mark.parametrize("unsupported", [False, True])
def test_zeros(opened: Opener, unsupported: bool) -> None:
    def plan(name: str, _: int) -> int:
        return errno.EOPNOTSUPP if unsupported and disks and name == "fallocate" else 0

    disks: list[Disk] = []
    disks.append(opened(calls=FailingCalls(plan)))
    disk, view = disks[0], memoryview(mmap.mmap(-1, CAPACITY))
    channel = disk.channel(1)
    view[:] = data = pattern(5, CAPACITY)
    assert moved(channel, Op.WRITE, 0, view) == 0
    disk.zero(3 * SECTOR, 7 * SECTOR)
    disk.zero(0, 0)
    disk.sync()
    assert moved(channel, Op.READ, 0, view) == 0
    assert view == data[: 3 * SECTOR] + bytes(7 * SECTOR) + data[10 * SECTOR :]
    disk.zero(0, CAPACITY)
    assert moved(channel, Op.READ, 0, view) == 0
    assert not any(view)
    for offset, length in [(512, SECTOR), (0, 512), (-SECTOR, SECTOR), (0, CAPACITY + SECTOR), (CAPACITY, SECTOR)]:
        with pytest.raises(InvalidInput, match="whole sectors"):
            disk.zero(offset, length)


# No room, and every call failing in turn


def test_no_room_leaves_no_file(backend: Backend, small_filesystem: Path) -> None:
    path = small_filesystem / "log"
    free = os.statvfs(small_filesystem).f_bavail
    with pytest.raises(StoreFull, match="No space left"):
        open_disk(path, capacity=64 << 20, create=True, backend=backend)
    assert not path.exists()
    assert os.statvfs(small_filesystem).f_bavail == free
    disk = open_disk(path, capacity=1 << 20, create=True, backend=backend)
    # The rest of the filesystem is filled up: what was reserved can be written all the same.
    with (small_filesystem / "other").open("wb", 0) as other, suppress(OSError):
        while True:
            other.write(b"x" * SECTOR)
    assert os.statvfs(small_filesystem).f_bavail == 0
    channel, view = disk.channel(1), memoryview(mmap.mmap(-1, 1 << 20))
    view[:] = pattern(1, 1 << 20)
    assert moved(channel, Op.WRITE, 0, view) == 0
    disk.zero(SECTOR, 100 * SECTOR)
    disk.sync()
    disk.close()


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    for command in (["mkfs.ext4", "-qF", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"NOT RUN: no small filesystem is to be had: {error}")
    yield folder
    # A descriptor that a failed test left would keep it busy: detached then, and gone with the process.
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


ERRNOS = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EINTR, errno.EAGAIN)
LATE = {"pwritev", "preadv", "uring_enter", "fdatasync", "fsync", "ftruncate", "fallocate"}


def work_through(path: Path, backend: Backend, calls: Calls) -> None:
    """Everything once; raises an error of the store's, or comes out right."""
    disk = open_disk(path, capacity=16 * SECTOR, create=True, backend=backend, calls=calls, close_s=2.0)
    try:
        buffers = AlignedBuffers(8, SECTOR, calls)
        channel = disk.channel(4, buffers)
        wrong = set()
        for first in (0, 4):
            views = [taken(buffers) for _ in range(4)]
            for number, view in enumerate(views, first):
                view[:] = pattern(number, SECTOR)
            channel.submit([Transfer(Op.WRITE, n * SECTOR, v, n) for n, v in enumerate(views, first)])
            wrong |= {tag for tag, error in all_of(channel).items() if error}
            for view in views:
                buffers.give(view)
        disk.sync()
        disk.zero(2 * SECTOR, SECTOR)
        views = [taken(buffers) for _ in range(8)]
        for first in (0, 4):
            channel.submit([Transfer(Op.READ, n * SECTOR, views[n], n) for n in range(first, first + 4)])
            unread = {tag for tag, error in all_of(channel).items() if error}
            for number in set(range(first, first + 4)) - unread - wrong:
                assert views[number] == (bytes(SECTOR) if number == 2 else pattern(number, SECTOR))
        channel.close()
        assert channel.lost == 0
    finally:
        disk.close()


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where syncing takes no time; the test's own where there is none."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.__getitem__)
def test_every_call_failing_in_turn(backend: Backend, tmp_path: Path, quick: Path, number: int) -> None:
    folder = tmp_path if number == errno.EIO else quick
    clean = FailingCalls()
    work_through(folder / "clean", backend, clean)
    assert len(clean.made) > 20
    survived = failed = 0
    for late in (False, True):
        for at, expected in enumerate(clean.made):
            if late and expected not in LATE:
                continue
            calls = FailingCalls(lambda _, count, at=at: number if count == at else 0, late)
            path = folder / f"log{at}{late}"
            before = descriptors()
            try:
                work_through(path, backend, calls)
                survived += 1
            except StoreError:
                failed += 1
            # How often a ring is entered depends on the disk's pace: the last calls may not have been reached.
            assert calls.failed or at >= len(calls.made)
            if calls.failed != ["close"]:
                assert descriptors() == before, f"{calls.failed} {at}"
            # Whatever went wrong, the next opening finds a whole disk or none.
            open_disk(path, capacity=16 * SECTOR, create=True, backend=backend).close()
            path.unlink()
    assert survived > 0
    assert failed > 0
