"""The rules of transfers: pure."""

import errno
import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.io.transfers import (
    MAX_STALLS,
    MAX_WAIT_S,
    SECTOR,
    Flight,
    Op,
    Transfer,
    admit,
    bounded,
    past_the_end,
    progress,
)

VIEW = memoryview(mmap.mmap(-1, 8 * SECTOR))


def flight(length: int = 8 * SECTOR, op: Op = Op.READ) -> Flight:
    return Flight(1, op, 16 * SECTOR, 1 << 20, length, VIEW)


@given(st.lists(st.integers(-200, 9 * SECTOR), max_size=40))
def test_progress_ends_once_and_only_when_all_is_moved(results: list[int]) -> None:
    it = flight()
    for result in results:
        before = it.left
        ended = progress(it, result)
        assert it.offset - 16 * SECTOR == it.address - (1 << 20) == 8 * SECTOR - it.left
        assert it.left % SECTOR == 0
        if ended is None:
            assert it.left < before or result in (-errno.EINTR, -errno.EAGAIN)
            continue
        assert (ended == 0) == (it.left == 0)
        if result < 0:
            assert ended == -result
        elif ended:
            assert (ended, result // SECTOR) == (errno.EIO, 0)
        return


def test_a_part_of_a_sector_is_no_progress() -> None:
    it = flight()
    assert progress(it, 2 * SECTOR + 1) is None
    assert (it.offset, it.left) == (18 * SECTOR, 6 * SECTOR)
    assert progress(it, SECTOR - 1) == errno.EIO


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN])
def test_stalls_are_counted_in_a_row(number: int) -> None:
    it = flight()
    for _ in range(2):
        assert [progress(it, -number) for _ in range(MAX_STALLS)] == [None] * MAX_STALLS
        assert progress(it, SECTOR) is None
    for _ in range(MAX_STALLS):
        progress(it, -number)
    assert progress(it, -number) == number


def test_the_end_of_the_disk() -> None:
    assert past_the_end(flight(), 24 * SECTOR) == 0
    assert past_the_end(flight(), 23 * SECTOR) == errno.EIO
    assert past_the_end(flight(op=Op.WRITE), 23 * SECTOR) == errno.ENOSPC


def test_what_is_no_buffer_is_refused() -> None:
    released = memoryview(mmap.mmap(-1, SECTOR))
    released.release()
    for buffer in (released, VIEW[::2]):
        with pytest.raises(InvalidInput, match="memoryview") as caught:
            admit([Transfer(Op.READ, 0, buffer, 0)], 1)
        assert caught.value.field == "buffer"


def test_an_admitted_transfer_outlives_its_view() -> None:
    memory = mmap.mmap(-1, SECTOR)
    view = memoryview(memory)
    (it,) = admit([Transfer(Op.READ, SECTOR, view, 5)], 1)
    view.release()
    assert (it.tag, it.offset, it.left, it.buffer) == (5, SECTOR, SECTOR, -1)
    with pytest.raises(BufferError):
        memory.close()
    del it
    memory.close()


def test_waits_have_an_end() -> None:
    assert (bounded(-1.0), bounded(2.5), bounded(MAX_WAIT_S)) == (0.0, 2.5, MAX_WAIT_S)
    for endless in (MAX_WAIT_S * 1.01, float("inf"), float("nan")):
        with pytest.raises(InvalidInput, match="end"):
            bounded(endless)
