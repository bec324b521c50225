"""Every byte wanted is brought exactly once, in windows of whole sectors."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from isthmus.contracts.blocks import RecordKind, Shape
from isthmus.state.kv.log.format import SECTOR, payload_offset
from isthmus.state.kv.log.plan import (
    GAP_BYTES,
    LEAST_WINDOW,
    NEAR_BYTES,
    SHARES,
    Range,
    plan,
    ranges_of,
    slack_of,
    window_of,
)


@given(
    st.lists(st.tuples(st.integers(0, 400_000), st.integers(1, 90_000)), max_size=12),
    st.sampled_from([2 * SECTOR, 8 * SECTOR, 64 * SECTOR]),
)
def test_every_byte_comes_once(wanted: list[tuple[int, int]], window_bytes: int) -> None:
    ranges = [Range(index, at, at + size) for index, (at, size) in enumerate(wanted)]
    windows = plan(ranges, window_bytes)
    brought: dict[int, list[tuple[int, int]]] = {}
    for window in windows:
        assert window.offset % SECTOR == window.end % SECTOR == 0
        assert 0 < window.end - window.offset <= window_bytes + slack_of(window_bytes)
        assert window.parts
        for part in window.parts:
            assert window.offset <= part.offset < part.end <= window.end
            brought.setdefault(part.index, []).append((part.offset, part.end))
    for one in ranges:
        parts = sorted(brought[one.index])
        assert (parts[0][0], parts[-1][1]) == (one.offset, one.end)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))


@given(st.integers(0, 1 << 31), st.sampled_from([2 * SECTOR, LEAST_WINDOW, 4 * LEAST_WINDOW]))
def test_long_batches_have_long_windows_and_several(total: int, most: int) -> None:
    window = window_of(total, most)
    assert window % SECTOR == 0
    assert 0 < window <= most
    assert window == min(most, LEAST_WINDOW) or window * SHARES <= total
    assert window_of(SHARES * most, most) == most


def test_neighbours_are_read_together() -> None:
    close = [Range(number, 5000 * number, 5000 * number + 4000) for number in range(20)]
    assert len(plan(close, 1 << 20)) == 1
    far = [Range(number, (GAP_BYTES + 50_000) * number, (GAP_BYTES + 50_000) * number + 4000) for number in range(20)]
    assert len(plan(far, 1 << 20)) == 20


def test_a_large_record_is_several_reads() -> None:
    slack = slack_of(1 << 20)
    assert [len(plan([Range(0, 100, (4 << 20) + more)], 1 << 20)) for more in (0, slack, slack + 1)] == [4, 4, 5]


def test_chunks_near_the_front_come_with_the_header() -> None:
    shape = Shape(RecordKind.BLOCK, 64, 16_384)
    head = payload_offset(64)
    assert ranges_of(0, 1000, shape, 0, 2) == [Range(0, 1000, 1000 + head + 2 * 16_384)]
    near = NEAR_BYTES // 16_384
    assert len(ranges_of(0, 0, shape, near, 1)) == 1
    assert ranges_of(0, 1000, shape, near + 1, 3) == [
        Range(0, 1000, 1000 + head),
        Range(0, 1000 + head + (near + 1) * 16_384, 1000 + head + (near + 4) * 16_384),
    ]
