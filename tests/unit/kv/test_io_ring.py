"""What is particular to io_uring: kernels that have less of it, refusals, threads, memory that stays."""

import ctypes
import errno
import gc
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.disk import FailingCalls, StuckCalls

from isthmus.contracts.errors import DiskFailed, InvalidInput, StoreUnavailable
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.disk import SECTOR, AlignedBuffers, Backend, Disk, Op, Transfer, open_disk
from isthmus.state.kv.io.ring import REFUSED_S, RingChannel
from isthmus.state.kv.io.transfers import address_of
from isthmus.state.kv.io.uring import Ring, refusal

pytestmark = pytest.mark.skipif(bool(refusal(Calls())), reason=f"NOT RUN: {refusal(Calls())}")

CAPACITY = 16 * SECTOR
OWNED, COOP = 1 << 12, 1 << 8

LIMITED = """
import os, resource, sys
from pathlib import Path
from isthmus.state.kv.io.disk import AlignedBuffers, Op, Transfer, open_disk
os.chown(sys.argv[1], 65534, 65534)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
os.setgid(65534)
os.setuid(65534)
os.chdir(sys.argv[1])
disk = open_disk(Path("log"), capacity=1 << 20, create=True)
buffers = AlignedBuffers(4, 1 << 20)
channel, view = disk.channel(4, buffers), buffers.take()
channel.submit([Transfer(Op.WRITE, 0, view, 0)])
print(disk.backend, [done.error for done in channel.wait(1, 20.0)], disk.backend_reason)
"""


def opened(folder: Path, calls: Calls | None = None, backend: Backend = "io_uring", close_s: float = 5.0) -> Disk:
    path = folder / "log"
    return open_disk(path, capacity=CAPACITY, create=True, backend=backend, calls=calls, close_s=close_s)


def channel_of(disk: Disk, depth: int = 4, buffers: AlignedBuffers | None = None) -> RingChannel:
    channel = disk.channel(depth, buffers)
    assert isinstance(channel, RingChannel)
    return channel


def read(channel: RingChannel, view: memoryview | None = None) -> int:
    channel.submit([Transfer(Op.READ, 0, view or memoryview(mmap.mmap(-1, SECTOR)), 0)])
    (completion,) = channel.wait(1, 20.0)
    return completion.error


class OlderKernel(Calls):
    """Does not know some flags, or lacks some features."""

    def __init__(self, unknown: int = 0, lacking: int = 0) -> None:
        super().__init__()
        self.unknown, self.lacking = unknown, lacking

    def uring_setup(self, entries: int, params: bytearray) -> int:
        if struct.unpack_from("<I", params, 8)[0] & self.unknown:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = super().uring_setup(entries, params)
        struct.pack_into("<I", params, 20, struct.unpack_from("<I", params, 20)[0] & ~self.lacking)
        return fd


@pytest.mark.parametrize("unknown", [OWNED, OWNED | COOP])
def test_older_kernels_have_rings_for_any_thread(tmp_path: Path, unknown: int) -> None:
    disk = opened(tmp_path, OlderKernel(unknown))
    channel = channel_of(disk)
    ring = channel._ring
    assert not ring.owned
    errors = [read(channel)]
    thread = threading.Thread(target=lambda: errors.append(read(channel)))
    thread.start()
    thread.join(20)
    assert errors == [0, 0]
    assert channel._ring is ring
    disk.close()


@pytest.mark.parametrize("feature", [1 << 0, 1 << 1, 1 << 8])
def test_kernels_too_old_are_served_by_threads(tmp_path: Path, feature: int) -> None:
    calls = OlderKernel(lacking=feature)
    disk = opened(tmp_path, calls, "auto")
    assert (disk.backend, disk.backend_reason) == ("threads", "io_uring: io_uring lacks features of Linux 5.11")
    disk.close()
    with pytest.raises(StoreUnavailable, match=r"5\.11"):
        opened(tmp_path, calls)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EMFILE, errno.ENOMEM])
def test_a_kernel_that_refuses_is_served_by_threads(tmp_path: Path, number: int) -> None:
    calls = FailingCalls(lambda name, _: number if name == "uring_setup" else 0)
    disk = opened(tmp_path, calls, "auto")
    assert (disk.backend, disk.backend_reason) == ("threads", f"io_uring: {os.strerror(number)}")
    disk.close()
    with pytest.raises(StoreUnavailable, match=os.strerror(number)):
        opened(tmp_path, calls)


def test_other_processors_are_served_by_threads(tmp_path: Path) -> None:
    class Arm(Calls):
        def machine(self) -> str:
            return "aarch64"

    disk = opened(tmp_path, Arm(), "auto")
    assert disk.backend == "threads"
    assert "aarch64, whose memory order" in disk.backend_reason
    disk.close()


@pytest.mark.parametrize("call", ["uring_setup", "uring_map", "uring_register"])
def test_a_channel_that_cannot_be_had_is_told(tmp_path: Path, call: str) -> None:
    calls = FailingCalls()
    disk = opened(tmp_path, calls)
    calls.plan = lambda name, _: errno.EMFILE if name == call else 0
    with pytest.raises(DiskFailed, match="io_uring_setup") as caught:
        disk.channel(4)
    assert caught.value.errno == errno.EMFILE
    calls.plan = lambda *_: 0
    assert read(channel_of(disk)) == 0
    disk.close()


def test_buffers_over_the_limit_are_used_unregistered(tmp_path: Path) -> None:
    # The first registration of a ring is of its file.
    calls = FailingCalls(lambda name, _: errno.ENOMEM if name == "uring_register" and calls.made[-2] == name else 0)
    disk = opened(tmp_path, calls)
    buffers = AlignedBuffers(1, SECTOR)
    view = buffers.take()
    assert view is not None
    channels = [channel_of(disk, 4, buffers) for _ in range(2)]
    assert disk.backend_reason == ("buffers not registered: Cannot allocate memory within the limit of locked memory")
    calls.plan = lambda *_: 0
    assert [read(channel, view) for channel in channels] == [0, 0]
    disk.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT RUN: only root can become somebody else")
def test_the_limit_of_locked_memory() -> None:
    # Not in the test's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", LIMITED, folder]
        environment = {**os.environ, "PYTHONPATH": str(Path("src").resolve())}
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert result.stdout == (
        "io_uring [0] buffers not registered: Cannot allocate memory within the limit of locked memory\n"
    ), result.stderr


def test_large_memory_is_registered_in_regions_between_buffers() -> None:
    class Sized:
        address, size, count = 1 << 40, 384 << 20, 7

    class Taking:
        def register(self, regions: list[tuple[int, int]]) -> None:
            self.regions = regions

    taking, channel = Taking(), object.__new__(RingChannel)
    channel._closed = True
    assert channel._registered(taking, Sized()) == 768 << 20
    assert [length >> 20 for _, length in taking.regions] == [768, 768, 768, 384]
    assert [begin for begin, _ in taking.regions] == [(1 << 40) + n * (768 << 20) for n in range(4)]


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[tuple[Disk, RingChannel, StuckCalls]]:
    calls = StuckCalls(b"s" * SECTOR)
    disk = opened(tmp_path, calls, close_s=0.1)
    channel = channel_of(disk)
    calls.stuck = True
    yield disk, channel, calls
    calls.release()
    disk.close()
    calls.close_pipe()


def test_transfers_in_flight_stay_with_their_thread(stuck: tuple[Disk, RingChannel, StuckCalls]) -> None:
    _, channel, calls = stuck
    caught: list[Exception] = []

    def other() -> None:
        for call in (lambda: channel.submit([]), lambda: channel.wait(1, 0.1)):
            try:
                call()
            except InvalidInput as error:
                caught.append(error)

    channel.submit([Transfer(Op.READ, 0, memoryview(mmap.mmap(-1, SECTOR)), 0)])
    thread = threading.Thread(target=other)
    thread.start()
    thread.join(20)
    assert [str(error) for error in caught] == [
        "with transfers in flight a channel stays with the thread that began them"
    ] * 2
    calls.release()
    assert [completion.error for completion in channel.wait(1, 20.0)] == [0]


def test_closing_after_the_thread_has_ended_sees_its_completions(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    channel = channel_of(disk, 8)
    memory = memoryview(mmap.mmap(-1, 8 * SECTOR))
    parts = [memory[n * SECTOR : (n + 1) * SECTOR] for n in range(8)]
    transfers = [Transfer(Op.READ, n * SECTOR, part, n) for n, part in enumerate(parts)]
    thread = threading.Thread(target=lambda: channel.submit(transfers))
    thread.start()
    thread.join(20)
    channel.close()
    assert (channel.in_flight, channel.lost) == (0, 0)
    disk.close()


def test_a_disk_closed_by_another_thread_can_be_opened_at_once(tmp_path: Path) -> None:
    """Its rings are taken down by the kernel later, and hold the file until then: the lock must not wait for that."""
    for _ in range(5):
        disk = opened(tmp_path)
        channel = channel_of(disk)
        done, read_once = threading.Event(), threading.Event()

        def owner(
            channel: RingChannel = channel, read_once: threading.Event = read_once, done: threading.Event = done
        ) -> None:
            read(channel)
            read_once.set()
            done.wait(20)

        thread = threading.Thread(target=owner)
        thread.start()
        assert read_once.wait(20)
        disk.close()
        opened(tmp_path).close()
        done.set()
        thread.join(20)


def test_a_ring_that_is_handed_on_becomes_one_for_all(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    channel = channel_of(disk)
    rings: list[Ring] = [channel._ring]
    for _ in range(3):
        thread = threading.Thread(target=lambda: rings.append(channel._ring) if not read(channel) else None)
        thread.start()
        thread.join(20)
    assert [ring.owned for ring in rings] == [True, True, False, False]
    assert rings[2] is rings[3]
    disk.close()


def test_entering_that_fails_fails_what_the_kernel_did_not_take(tmp_path: Path) -> None:
    calls = FailingCalls()
    disk = opened(tmp_path, calls)
    channel = channel_of(disk)
    calls.plan = lambda name, _: errno.EPERM if name == "uring_enter" else 0
    assert read(channel) == errno.EPERM
    calls.plan = lambda *_: 0
    assert read(channel) == 0
    disk.close()


def test_a_wait_that_fails_loses_nothing(stuck: tuple[Disk, RingChannel, StuckCalls]) -> None:
    _, channel, calls = stuck
    view = memoryview(mmap.mmap(-1, SECTOR))
    channel.submit([Transfer(Op.READ, 0, view, 0)])
    broken, entering = OSError(errno.EBADF, "x"), calls.uring_enter

    def fail(*_: object, **__: object) -> int:
        raise broken

    calls.uring_enter = fail  # type: ignore[method-assign]
    with pytest.raises(DiskFailed, match="io_uring_enter"):
        channel.wait(1, 1.0)
    assert channel.in_flight == 1
    calls.uring_enter = entering  # type: ignore[method-assign]
    calls.release()
    assert [completion.error for completion in channel.wait(1, 20.0)] == [0]
    assert view == b"s" * SECTOR


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY, errno.EINTR])
def test_a_kernel_without_room_is_asked_until_the_time_is_over(tmp_path: Path, number: int) -> None:
    calls = FailingCalls()
    disk = opened(tmp_path, calls)
    channel = channel_of(disk)
    calls.plan = lambda name, _: number if name == "uring_enter" else 0
    channel.submit([Transfer(Op.READ, 0, memoryview(mmap.mmap(-1, SECTOR)), 0)])
    assert channel.wait(1, 0.02) == []
    assert (channel.in_flight, channel._ring.queued) == (1, 1)
    calls.plan = lambda *_: 0
    assert [completion.error for completion in channel.wait(1, 20.0)] == [0]
    # What the kernel never took is taken back.
    calls.plan = lambda name, _: number if name == "uring_enter" else 0
    channel.submit([Transfer(Op.READ, 0, memoryview(mmap.mmap(-1, SECTOR)), 0)])
    channel.close()
    assert channel.lost == 0
    disk.close()


class PausingCalls(FailingCalls):
    """A clock that only pauses move on, and calls of `uring_enter` that fail as long as `error` is not 0."""

    def __init__(self) -> None:
        super().__init__(lambda name, _: self.error if name == "uring_enter" else 0)
        self.error, self.now, self.pauses = 0, 1000.0, 0

    def monotonic(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.pauses += 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY, errno.EINTR])
def test_a_kernel_that_never_has_room_fails_what_it_did_not_take(tmp_path: Path, number: int) -> None:
    calls = PausingCalls()
    disk = opened(tmp_path, calls)
    channel = channel_of(disk)
    calls.error = number
    reads = [Transfer(Op.READ, 0, memoryview(mmap.mmap(-1, SECTOR)), tag) for tag in range(3)]
    channel.submit(reads)
    assert [one.error for one in channel.wait(3, 3600.0)] == [number] * 3
    assert REFUSED_S <= calls.now - 1000.0 < REFUSED_S + 0.1
    assert (channel.in_flight, channel._ring.queued) == (0, 0)
    # Nobody waits for it again, until it has been of use.
    begun = calls.pauses
    channel.submit(reads)
    assert [one.error for one in channel.wait(3, 3600.0)] == [number] * 3
    assert calls.pauses == begun
    calls.error = 0
    assert read(channel) == 0
    for _ in range(3):
        calls.error = number
        channel.submit(reads)
        assert channel.wait(1, 0.6 * REFUSED_S) == []
        calls.error = 0
        assert [one.error for one in channel.wait(3, 3600.0)] == [0] * 3
    disk.close()


def test_refusals_with_long_pauses_between_are_not_taken_together(tmp_path: Path) -> None:
    calls = PausingCalls()
    disk = opened(tmp_path, calls)
    channel = channel_of(disk)
    for _ in range(3):
        calls.error = errno.EAGAIN
        channel.submit([Transfer(Op.READ, 0, memoryview(mmap.mmap(-1, SECTOR)), 0)])
        assert channel.wait(1, 0.0) == []
        calls.now += 10 * REFUSED_S
        assert channel.wait(1, 0.0) == []
        calls.error = 0
        assert [one.error for one in channel.wait(1, 3600.0)] == [0]
    disk.close()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR, errno.EBADF])
def test_a_kernel_that_never_tells_of_ends_is_waited_for_within_a_bound(
    stuck: tuple[Disk, RingChannel, StuckCalls], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, channel, calls = stuck
    channel.submit([Transfer(Op.READ, 0, memoryview(mmap.mmap(-1, SECTOR)), 0)])
    entering, now = calls.uring_enter, [0.0]

    def fail(*_: object, **__: object) -> int:
        raise OSError(number, "x")

    def pause(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(calls, "monotonic", lambda: now[0])
    monkeypatch.setattr(calls, "pause", pause)
    calls.uring_enter = fail  # type: ignore[method-assign]
    with pytest.raises(DiskFailed, match="io_uring_enter"):
        channel.wait(1, 3600.0)
    assert 0 < now[0] <= REFUSED_S + 0.1
    assert channel.in_flight == 1
    calls.uring_enter = entering  # type: ignore[method-assign]
    calls.release()
    assert [completion.error for completion in channel.wait(1, 20.0)] == [0]


@pytest.mark.parametrize("closed", [True, False])
def test_a_dropped_channel_keeps_what_the_kernel_has(tmp_path: Path, closed: bool) -> None:
    calls = StuckCalls(b"s" * SECTOR)
    disk = opened(tmp_path, calls, close_s=0.05)
    channel = channel_of(disk)
    ring = channel._ring.fd
    calls.stuck = True
    memory = memoryview(mmap.mmap(-1, SECTOR))
    address = address_of(memory)
    channel.submit([Transfer(Op.READ, 0, memory, 0)])
    if closed:
        disk.close()
    del channel, disk, memory
    gc.collect()
    assert mapped(address)
    calls.release()
    calls.uring_enter(ring, 0, 1, flags=1)
    assert ctypes.string_at(address, SECTOR) == b"s" * SECTOR
    calls.close_pipe()


def mapped(address: int) -> bool:
    """Neighbouring mappings are told as one."""
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def test_the_queue_of_completions_has_room_for_all(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    for depth in (1, 3, 64, 4096):
        channel = channel_of(disk, depth)
        assert channel._ring.entries >= depth
        assert channel._ring._done_mask + 1 >= 2 * depth
        channel.close()
    disk.close()


def test_indexes_wrap(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    channel, view = channel_of(disk, 1), memoryview(mmap.mmap(-1, SECTOR))
    assert {read(channel, view) for _ in range(20)} == {0}
    disk.close()


def test_a_struct_is_as_long_as_the_kernels() -> None:
    from isthmus.state.kv.io import uring

    assert (uring._PARAMS.size, uring._ENTRY.size, uring._COMPLETION.size) == (120, 64, 16)
    assert ctypes.sizeof(ctypes.c_long) == 8
