"""The table of segments: its picture, pins, victims."""

import numpy as np
import pytest

from isthmus.contracts.blocks import Lifetime
from isthmus.state.kv.log.format import ENTRY, ROW, SECTOR, SURVIVORS, footer_bytes, record_span
from isthmus.state.kv.log.segments import (
    RESERVED,
    Segment,
    SegmentsCorrupt,
    SegmentTable,
    State,
    class_name,
    most_records,
    usage_by_namespace,
    usage_of,
    worth,
)

SIZE = 64 << 10


def rows_of(count: int, namespace: bytes = b"n" * 16, first_slot: int = 65, stamp: int = 3) -> np.ndarray:
    packed = [
        ROW.pack(
            bytes([number]) * 32, namespace, b"s" * 16, stamp, number, first_slot + 64 * number, 1, 3000, 1, 0, 1, 0
        )
        for number in range(count)
    ]
    return np.frombuffer(b"".join(packed), ENTRY)


def table(count: int = 8) -> SegmentTable:
    return SegmentTable(count, SIZE, most_records(16_384))


def sealed(segments: SegmentTable, lane: int = 1, live: int = 40_000, opened: float = 0.0) -> Segment:
    segment = segments.take(lane)
    assert segment is not None
    segment.opened = opened
    for state in (State.READY, State.OPEN):
        segments.move(segment, state)
    segments.allocate(segment, 40_960, 4)
    segment.alive(4, live)
    for state in (State.CLOSING, State.SEALED):
        segments.move(segment, state)
    return segment


def test_a_life() -> None:
    segments = table()
    segment = sealed(segments)
    assert (segment.generation, segment.end, segment.records, segment.extents) == (1, SECTOR + 40_960, 4, 1)
    segments.release(segment)
    assert (segment.state, segment.generation, segment.end, segment.records) == (State.FREE, 1, SECTOR, 0)
    assert segment.dirty
    segments.check()
    for _ in range(8):
        again = segments.take(SURVIVORS)
        assert again is not None
    assert segments[segment.index].generation == 2
    assert segments.take(SURVIVORS) is None


def test_the_last_free_segment_is_for_survivors() -> None:
    segments = table()
    taken = [segments.take(0) for _ in range(8 - RESERVED)]
    assert all(one is not None for one in taken)
    assert segments.take(0) is None
    assert segments.take(SURVIVORS) is not None


def test_no_other_arrows() -> None:
    segments = table()
    segment = segments.take(0)
    assert segment is not None
    for state in State:
        if state not in {State.READY, State.RETIRED}:
            with pytest.raises(SegmentsCorrupt):
                segments.move(segment, state)
    segments.move(segment, State.RETIRED)
    for state in State:
        with pytest.raises(SegmentsCorrupt):
            segments.move(segment, state)


def test_room_is_kept_for_the_footer() -> None:
    segments = table()
    segment = segments.take(0)
    assert segment is not None
    segments.move(segment, State.READY)
    segments.move(segment, State.OPEN)
    room = SIZE - SECTOR - footer_bytes(10)
    assert segment.fits(room, 10, 1000)
    assert not segment.fits(room + SECTOR, 10, 1000)
    assert not segment.fits(room, 43, 1000)
    assert not segment.fits(SECTOR, 11, 10)
    with pytest.raises(SegmentsCorrupt):
        segments.allocate(segment, room + SECTOR, 10)


def test_a_pinned_segment_stays() -> None:
    segments = table()
    segment = sealed(segments)
    assert segments.pin(segment.index, 1)
    assert not segments.pin(segment.index, 2)
    assert not segments.pin(99, 1)
    assert list(segments.victims(0)) == []
    with pytest.raises(SegmentsCorrupt):
        segments.release(segment)
    segments.unpin(segment.index)
    assert list(segments.victims(0)) == [segment]
    with pytest.raises(SegmentsCorrupt):
        segments.unpin(segment.index)
    segments.release(segment)
    assert not segments.pin(segment.index, 1)


def test_the_least_worth_goes_first() -> None:
    segments = table()
    capacity = 8 * SIZE
    shared, session, short = (sealed(segments, lane) for lane in (Lifetime.SHARED, Lifetime.SESSION, Lifetime.SHORT))
    assert list(segments.victims(0)) == [short, session, shared]
    assert worth(short, 0, capacity) < worth(session, 0, capacity)
    # Read: worth more. Old: less. Little alive: less.
    short.hit(65, 20_000)
    short.hit(400, 20_000)
    assert next(iter(segments.victims(0))) is session
    assert next(iter(segments.victims(capacity))) is short
    short.born = capacity
    assert next(iter(segments.victims(capacity))) is session
    shared.alive(0, -39_000)
    assert next(iter(segments.victims(0))) is shared


def test_of_equals_the_oldest_goes() -> None:
    segments = table()
    first, second, third = (sealed(segments) for _ in range(3))
    first.born, second.born, third.born = 200_000, 100_000, 300_000
    assert list(segments.victims(400_000)) == [second, first, third]


def test_hits_are_counted_by_page_and_once() -> None:
    segment = Segment(0, SIZE)
    rows = rows_of(10)
    assert not segment.was_hit(rows).any()
    for _ in range(3):
        segment.hit(65, 3000)
        segment.hit(65 + 5 * 64, 3000)
    assert segment.was_hit(rows).tolist() == [number in (0, 5) for number in range(10)]
    assert segment.hit_bytes == 2 * 4096
    segment.end = SECTOR + 4 * 4096
    assert segment.hit_part == 0.5


def test_usage_is_by_namespace() -> None:
    segments = table()
    span = record_span(1, 3000)
    mixed = np.concatenate([rows_of(3), rows_of(2, b"m" * 15 + b"\0")])
    assert usage_by_namespace(mixed) == {b"n" * 16: 3 * span, b"m" * 15 + b"\0": 2 * span}
    assert usage_by_namespace(rows_of(0)) == {}
    segments[0].note(mixed)
    segments[1].note(rows_of(1))
    assert usage_of(segments) == {b"n" * 16: 4 * span, b"m" * 15 + b"\0": 2 * span}
    assert segments[0].lowest_stamp == 3
    segments[0].note(mixed, -1)
    assert segments[0].usage == {}


def test_the_books_are_checked() -> None:
    segments = table()
    segments.check()
    segments[3].live_bytes = -1
    with pytest.raises(SegmentsCorrupt):
        segments.check()
    segments = table()
    segments[3].pins = 1
    with pytest.raises(SegmentsCorrupt):
        segments.check()
    segments = table()
    segments[3].state = State.OPEN
    with pytest.raises(SegmentsCorrupt):
        segments.check()
    assert [class_name(lane) for lane in range(4)] == ["short", "session", "shared", "survivors"]
