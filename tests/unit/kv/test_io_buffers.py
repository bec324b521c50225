"""Buffers for transfers: bounds, alignment, who has them, memory that is missing."""

import errno
import mmap
import os
import threading

import numpy as np
import pytest
from tests.support.disk import FailingCalls

from isthmus.contracts.errors import DiskFailed, InvalidInput
from isthmus.state.kv.io.buffers import MAX_BUFFER_BYTES, MAX_BUFFERS, AlignedBuffers
from isthmus.state.kv.io.transfers import SECTOR, Flight, Op, address_of

HUGE = 2 << 20


def taken(buffers: AlignedBuffers) -> memoryview:
    view = buffers.take()
    assert view is not None
    return view


def test_buffers_are_apart_aligned_and_bounded() -> None:
    buffers = AlignedBuffers(3, 2 * SECTOR)
    views = [taken(buffers) for _ in range(3)]
    assert (buffers.count, buffers.size, buffers.free) == (3, 2 * SECTOR, 0)
    assert sorted(map(address_of, views)) == [buffers.address + n * 2 * SECTOR for n in range(3)]
    assert buffers.address % SECTOR == 0
    assert buffers.take() is None
    assert buffers.take(0.01) is None
    for view in views:
        buffers.give(view)
    assert buffers.free == 3


def test_large_ones_begin_at_a_huge_page() -> None:
    buffers = AlignedBuffers(3, 1 << 20)
    assert buffers.address % HUGE == 0
    views = [taken(buffers) for _ in range(3)]
    views[2][-1] = 7
    views[0][0] = 7


@pytest.mark.parametrize(
    ("count", "size", "field"),
    [
        (0, SECTOR, "count"),
        (MAX_BUFFERS + 1, SECTOR, "count"),
        (1, 0, "size"),
        (1, SECTOR + 512, "size"),
        (1, MAX_BUFFER_BYTES + SECTOR, "size"),
    ],
)
def test_other_numbers_are_refused(count: int, size: int, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        AlignedBuffers(count, size)
    assert caught.value.field == field


def test_only_what_was_taken_is_taken_back_and_once() -> None:
    buffers, others = AlignedBuffers(2, SECTOR), AlignedBuffers(1, SECTOR)
    view = taken(buffers)
    for foreign in (taken(others), view[:10], memoryview(view), memoryview(bytearray(SECTOR))):
        with pytest.raises(InvalidInput, match="taken"):
            buffers.give(foreign)
    buffers.give(view)
    with pytest.raises(InvalidInput, match="taken"):
        buffers.give(view)
    # A view that was given back is dead: who kept it cannot write into the next one's bytes.
    with pytest.raises(ValueError, match="released"):
        view[0] = 1


def test_an_array_over_a_buffer_does_not_stop_it_from_being_given_back() -> None:
    buffers = AlignedBuffers(1, SECTOR)
    view = taken(buffers)
    array = np.frombuffer(view, np.uint8)
    buffers.give(view)
    assert (buffers.free, array[0]) == (1, 0)


def test_taking_waits_for_one_that_is_given_back() -> None:
    buffers = AlignedBuffers(1, SECTOR)
    view = taken(buffers)
    waiter_found: list[memoryview | None] = []
    waiter = threading.Thread(target=lambda: waiter_found.append(buffers.take(20.0)))
    waiter.start()
    buffers.give(view)
    waiter.join(20)
    assert waiter_found[0] is not None


def test_a_buffer_in_flight_is_put_aside_until_the_last_transfer_ends() -> None:
    buffers = AlignedBuffers(2, 4 * SECTOR)
    first, second = taken(buffers), taken(buffers)
    inside = [Flight(n, Op.READ, 0, address_of(first) + n * SECTOR, SECTOR, first) for n in range(2)]
    outside = [
        Flight(2, Op.READ, 0, buffers.address - SECTOR, SECTOR, first),
        Flight(3, Op.READ, 0, buffers.address + 8 * SECTOR, SECTOR, first),
        Flight(4, Op.READ, 0, buffers.address + 3 * SECTOR, 2 * SECTOR, first),
    ]
    buffers.hold(inside + outside)
    assert [flight.buffer for flight in outside] == [-1] * 3
    buffers.give(first)
    buffers.give(second)
    assert (buffers.free, buffers.aside) == (1, 1)
    buffers.let_go(inside[:1])
    assert (buffers.free, buffers.aside) == (1, 1)
    buffers.let_go(inside[1:] + outside)
    assert (buffers.free, buffers.aside) == (2, 0)


def test_memory_goes_with_the_last_reference() -> None:
    buffers = AlignedBuffers(1, SECTOR)
    memory = buffers._memory
    slice_ = taken(buffers)[:10]
    buffers.close()
    buffers.close()
    assert buffers.take() is None
    slice_[0] = 1
    assert not memory.closed
    slice_.release()
    buffers.close()
    assert memory.closed is (not buffers._taken)


def test_no_memory_is_told() -> None:
    calls = FailingCalls(lambda name, _: errno.ENOMEM if name == "map_memory" else 0)
    with pytest.raises(DiskFailed, match="mmap"):
        AlignedBuffers(1, SECTOR, calls)
    calls = FailingCalls(lambda _, number: errno.ENOMEM if number == 3 else 0)
    with pytest.raises(DiskFailed, match="madvise"):
        AlignedBuffers(1, HUGE, calls)
    assert calls.made == ["map_memory", "advise", "advise", "advise"]


def test_kernels_without_advice_get_the_pages_touched() -> None:
    buffers = AlignedBuffers(2, HUGE, FailingCalls(lambda name, _: errno.EINVAL if name == "advise" else 0))
    assert resident(buffers) == 2 * HUGE // mmap.PAGESIZE
    assert resident(AlignedBuffers(2, HUGE)) == 2 * HUGE // mmap.PAGESIZE


def resident(buffers: AlignedBuffers) -> int:
    """Pages of it that are in memory (/proc/self/pagemap: bit 63)."""
    with open("/proc/self/pagemap", "rb", 0) as file:
        data = os.pread(
            file.fileno(), buffers.count * buffers.size // mmap.PAGESIZE * 8, buffers.address // mmap.PAGESIZE * 8
        )
    return int((np.frombuffer(data, np.uint64) >> np.uint64(63)).sum())
