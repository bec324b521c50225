"""The segment log from outside: what it takes in, when it is visible and durable, what it evicts."""

import random
from dataclasses import replace

import pytest
from tests.support.logs import (
    EXTENT,
    NAMESPACES,
    SEGMENT,
    TICK_S,
    World,
    key_of,
    opened,
    read,
    read_all,
    record,
    small_settings,
)
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import MAX_BATCH, Lifetime, Outcome, Owner, Reason, Tier, Want
from isthmus.contracts.errors import InvalidInput, TooLarge
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.log import lookup, reader
from isthmus.state.kv.log.format import SECTOR, record_span
from isthmus.state.kv.log.records import Location, LogRead, LogRecord, Verified
from isthmus.state.kv.log.segments import State


def test_a_record_is_visible_when_written_and_durable_when_synced() -> None:
    world = World()
    one = record(key_of(1), 500, chunks=3)
    assert world.put(one) == [Outcome(Reason.STORED, Tier.NVME, 1)]
    assert world.log.locate([one.key]) == [None]
    syncs = world.disk.calls["sync"]
    world.run(0.1)
    # A sync for the segment's header, none yet for the record.
    assert world.log.locate([one.key]) != [None]
    assert world.log.durable == 0
    assert world.disk.calls["sync"] == syncs + 1
    assert read(world.log, one) == (Outcome(Reason.HIT, Tier.NVME), bytes(one.payload))
    world.run(0.6)
    assert world.log.durable == world.log.sequence == 1
    assert world.disk.calls["sync"] == syncs + 2


def test_a_flush_waits_for_all_before_it() -> None:
    world = World()
    for number in range(30):
        world.put(record(key_of(number), 3000, lifetime=Lifetime(number % 3)))
    assert world.log.flush(1.0) == world.log.sequence == 30
    before = world.disk.calls["sync"]
    assert world.log.flush(1.0) == 30
    assert world.disk.calls["sync"] == before


def test_the_commit_interval_bounds_the_lag() -> None:
    world = World(commit_s=0.2)
    world.put(record(key_of(1)))
    world.run(0.05)
    assert world.log.durable == 0
    stats = world.log.stats()
    assert stats.lag_bytes >= 1000
    assert 0.0 < stats.lag_s <= 0.1
    world.run(0.25)
    assert world.log.durable == 1
    assert world.log.stats().lag_bytes == 0


def test_many_small_records_share_a_write() -> None:
    world = World()
    world.put(*[record(key_of(number), 100) for number in range(40)])
    writes = world.disk.calls["write"]
    world.settle()
    assert world.disk.calls["write"] - writes <= 2
    assert all(outcome.reason is Reason.HIT for outcome, _ in read_all(world.log, records_of(world)).values())


def records_of(world: World) -> list[LogRecord]:
    return [kept.record for kept in world.kept.values()]


def test_a_record_larger_than_an_extent_is_one_by_itself() -> None:
    world = World()
    large = record(key_of(1), EXTENT // 2, chunks=5)
    world.put(record(key_of(0)), large, record(key_of(2)))
    world.settle()
    for one in records_of(world):
        assert read(world.log, one) == (Outcome(Reason.HIT, Tier.NVME), bytes(one.payload))
    assert read(world.log, large, 2, 2)[1] == bytes(large.payload)[EXTENT : 2 * EXTENT]


@pytest.mark.parametrize(("size", "chunks"), [(500, 1), (3000, 5), (EXTENT // 2, 5), (EXTENT + 700, 2)])
def test_digests_that_are_not_given_are_those_of_the_copy(size: int, chunks: int) -> None:
    """Also of chunks that lie in two buffers."""
    world = World()
    one = record(key_of(1), size, chunks=chunks)
    world.put(record(key_of(0)), replace(one, digests=b""), record(key_of(2)))
    world.settle()
    assert one.digests in bytes(world.disk.view)
    assert read(world.log, one) == (Outcome(Reason.HIT, Tier.NVME), bytes(one.payload))
    assert world.log.verify() == Verified(good=3)


def test_what_leaves_no_room_for_another_like_it_is_written_at_once() -> None:
    world = World()
    world.put(record(key_of(0)))
    world.settle()
    large, now = record(key_of(1), EXTENT // 2), world.clock.monotonic()
    world.put(large)
    while world.log.step():
        pass
    assert world.log.locate([large.key]) != [None]
    assert world.clock.monotonic() == now


def test_the_next_segment_is_ready_before_it_is_needed() -> None:
    world = World(commit_s=60.0, commit_bytes=SEGMENT * 8)
    size = EXTENT - 1000
    world.put(record(key_of(0), size))
    world.settle()
    world.put(*[record(key_of(number), size) for number in (1, 2)])
    world.run(0.1)
    segments = world.log.stats().segments
    assert (segments["open"], segments["ready"], segments["prepared"]) == (1, 1, 0)


@pytest.mark.parametrize("room", [0, 64])
def test_the_largest_record_is_taken_and_a_larger_one_is_not(room: int) -> None:
    world = World(extent_bytes=SEGMENT // 4, staging_bytes=SEGMENT * 4)
    size = world.log.largest_span - 192 + room
    assert record_span(1, size) == world.log.largest_span + room
    one = record(key_of(1), size)
    outcome = world.put(one)[0]
    if room:
        assert outcome == Outcome(Reason.TOO_LARGE)
        return
    assert outcome.reason is Reason.STORED
    world.settle()
    assert read(world.log, one)[1] == bytes(one.payload)


def test_digests_that_do_not_fit_an_extent_are_too_large() -> None:
    world = World()
    assert world.put(record(key_of(1), 1, chunks=2000))[0] == Outcome(Reason.TOO_LARGE)


def test_when_memory_is_short_it_waits_and_then_refuses() -> None:
    world = World()
    world.disk.fail_always("sync")
    outcomes = world.put(*[record(key_of(number), 9000) for number in range(40)], timeout_s=0.05)
    reasons = {outcome.reason for outcome in outcomes}
    assert Reason.STORED in reasons
    assert reasons <= {Reason.STORED, Reason.FULL, Reason.IO_ERROR}
    assert reasons != {Reason.STORED}


def test_a_tenant_s_quota_is_kept_and_given_back() -> None:
    span = record_span(1, 3000)
    world = World(tenant_bytes=5 * span)
    mine, other = Owner(NAMESPACES[0]), Owner(NAMESPACES[1])
    outcomes = world.put(*[record(key_of(number), 3000, owner=mine) for number in range(7)])
    assert [outcome.reason for outcome in outcomes] == [Reason.STORED] * 5 + [Reason.QUOTA] * 2
    assert world.put(record(key_of(9), 3000, owner=other))[0].reason is Reason.STORED
    assert world.log.used_by(NAMESPACES[0]) == 5 * span
    world.settle()
    world.log.flush(1.0)
    for segment in world.log._ledger.segments.having(State.OPEN):
        world.log._ledger.segments.move(segment, State.CLOSING)
    world.run(1.0)
    assert world.log.evict(SEGMENT, 5.0) == SEGMENT
    assert world.log.used_by(NAMESPACES[0]) == 0
    assert world.put(record(key_of(0), 3000, owner=mine))[0].reason is Reason.STORED


def test_what_is_not_worth_the_wear_is_not_written() -> None:
    world = World(wear_bytes_day=86_400 * 10)
    reasons = []
    for fresh in range(1, 121):
        reasons.append(world.put(record(key_of(fresh), 3000, lifetime=Lifetime.SHORT))[0].reason)
        world.run(0.05)
    assert reasons[0] is Reason.STORED
    assert reasons[-1] is Reason.WEAR
    shared = record(key_of(0), 3000, lifetime=Lifetime.SHARED)
    assert world.put(shared)[0].reason is Reason.STORED


def test_the_capacity_is_never_exceeded_and_old_segments_go() -> None:
    """The simulated disk ends where the log ends: a write past it would be an error."""
    world = World(segments=8)
    chance = random.Random(1)
    for number in range(400):
        world.put(record(key_of(number), chance.choice((500, 3000, 9000)), lifetime=Lifetime(number % 3)))
        if number % 40 == 0:
            world.log.check()
    world.settle()
    stats = world.log.stats()
    assert stats.counts["segments_evicted"] > 20
    assert stats.used <= stats.capacity == 8 * SEGMENT
    assert "write_errors" not in stats.counts
    found = read_all(world.log, records_of(world))
    hits = [key for key, (outcome, _) in found.items() if outcome.reason is Reason.HIT]
    assert len(hits) == stats.records > 30
    assert all(found[key][1] == bytes(world.kept[key].record.payload) for key in hits)
    assert stats.write_amplification >= 1.0
    # But for what making it wrote: two erasure tables, two superblocks.
    assert stats.written_bytes == world.disk.written - 4 * SECTOR


def test_what_was_read_survives_eviction() -> None:
    world = World(segments=8)
    for number in range(12):
        world.put(record(key_of(number), 3000))
    world.settle()
    hot = [key_of(number) for number in range(0, 12, 4)]
    for number in range(12, 500):
        world.put(record(key_of(number), 3000))
        if number % 3 == 0:
            found = read_all(world.log, [world.kept[key].record for key in hot])
            assert {outcome.reason for outcome, _ in found.values()} == {Reason.HIT}
    stats = world.log.stats()
    assert stats.counts["survivors"] >= len(hot)
    assert stats.classes["survivors"] >= 1
    again = world.reopened()
    found = read_all(again, [world.kept[key].record for key in hot])
    assert {outcome.reason for outcome, _ in found.values()} == {Reason.HIT}


def test_pins_keep_a_segment() -> None:
    world = World(segments=8)
    one = record(key_of(0), 3000)
    world.put(one)
    world.settle()
    (where,) = world.log.hold([one.key])
    assert where is not None
    for number in range(1, 300):
        world.put(record(key_of(number), 3000))
    assert read(world.log, one)[1] == bytes(one.payload)
    assert world.log.stats().pins == 1
    world.log.unpin(where)
    for number in range(300, 900):
        world.put(record(key_of(number), 3000, lifetime=Lifetime.SHORT if number % 2 else Lifetime.SESSION))
    assert world.log.locate([one.key]) != [where]
    assert world.log.stats().pins == 0


def test_a_location_that_is_out_of_date_still_finds_the_record() -> None:
    world = World(segments=8)
    one = record(key_of(0), 3000)
    world.put(one)
    world.settle()
    stale = world.log.locate([one.key])[0]
    assert stale is not None
    read(world.log, one)
    for number in range(1, 200):
        world.put(record(key_of(number), 3000))
        read(world.log, one)
    into = bytearray(3000)
    want = Want(BlockKey(one.key), one.shape, memoryview(into))
    assert world.log.locate([one.key])[0] != stale
    assert world.log.read([LogRead(stale, want)], 1.0)[0].reason is Reason.HIT
    assert into == one.payload
    nowhere = Location(3, 99, 1)
    absent = Want(BlockKey(key_of(9999)), one.shape, memoryview(into))
    assert world.log.read([LogRead(nowhere, absent)], 1.0)[0].reason is Reason.ABSENT


def test_another_record_with_the_same_fingerprint_is_passed_over() -> None:
    """Both are candidates of one key: the whole key decides."""
    world = World()
    mine = record(key_of(1))
    twin = record(mine.key[:31] + bytes([mine.key[31] ^ 1]), 700, chunks=2)
    for order in ((mine, twin), (twin, mine)):
        world = World()
        world.put(*order)
        world.settle()
        assert read(world.log, mine)[1] == bytes(mine.payload)
        assert read(world.log, twin)[1] == bytes(twin.payload)
        absent = record(mine.key[:31] + bytes([mine.key[31] ^ 2]))
        assert read(world.log, absent)[0].reason is Reason.ABSENT
        assert world.log.stats().records == 2


def test_another_shape_is_no_hit_and_harms_nothing() -> None:
    world = World()
    one = record(key_of(1), 1000)
    world.put(one)
    world.settle()
    assert read(world.log, record(key_of(1), 500, chunks=2))[0].reason is Reason.ABSENT
    assert read(world.log, one)[0].reason is Reason.HIT


def test_evict_and_compact() -> None:
    world = World(segments=12)
    for number in range(150):
        world.put(record(key_of(number), 3000))
    world.settle()
    evicted = world.log.stats().counts.get("segments_evicted", 0)
    assert world.log.evict(2 * SEGMENT, 5.0) == 2 * SEGMENT
    assert world.log.stats().counts["segments_evicted"] == evicted + 2
    # Make the sealed segments sparse, then merge what is left of them.
    keys = [key for key, (outcome, _) in read_all(world.log, records_of(world)).items() if outcome.reason is Reason.HIT]
    ledger = world.log._ledger
    for number, key in enumerate(keys):
        if number % 5:
            for at in ledger.index.candidates(key):
                ledger.quarantine(key, at, 1, 3000)
    left = [key for number, key in enumerate(keys) if not number % 5]
    sealed = world.log.stats().segments["sealed"]
    assert world.log.compact(5.0) >= 3
    assert world.log.stats().segments["sealed"] < sealed
    found = read_all(world.log, [world.kept[key].record for key in left])
    assert {outcome.reason for outcome, _ in found.values()} == {Reason.HIT}


def test_evicting_nothing_ends() -> None:
    world = World()
    assert world.log.evict(SEGMENT, 1.0) == 0


def test_describe_scan_and_verify() -> None:
    world = World()
    parent = key_of(0)
    one = record(key_of(1), 200, chunks=2, owner=Owner(NAMESPACES[1], b"s" * 16), parent=parent)
    world.put(record(parent), one)
    world.settle()
    found = {entry.key: entry for entry in world.log.scan()}
    assert found.keys() == {parent, one.key}
    assert (found[one.key].owner, found[one.key].shape, found[one.key].sequence) == (one.owner, one.shape, 2)
    described = world.log.describe([one.key, key_of(7)])
    assert described[1] is None
    assert described[0] is not None
    assert (described[0].parent, described[0].lifetime) == (parent, Lifetime.SESSION)
    seen: list[tuple[int, int]] = []
    result = world.log.verify(lambda done, total: seen.append((done, total)))
    assert (result.good, result.corrupt, result.unreadable) == (2, 0, 0)
    assert seen[-1] == (12, 12)
    where = world.log.locate([one.key])[0]
    assert where is not None
    world.disk.view[world.log._ledger.geometry.start(where.segment) + where.slot * 64 + 300] ^= 1
    result = world.log.verify()
    assert (result.good, result.corrupt, result.unreadable) == (1, 1, 0)
    assert world.log.locate([one.key]) == [None]


def test_bad_input_names_the_field() -> None:
    one = record(key_of(1))
    for changed, field in (({"key": b"short"}, "key"), ({"parent": b"x"}, "parent"), ({"digests": b"x"}, "digests")):
        values = {"key": one.key, "parent": None, "owner": one.owner, "shape": one.shape, "lifetime": one.lifetime}
        values |= {"digests": one.digests, "payload": one.payload, **changed}
        with pytest.raises(InvalidInput) as raised:
            LogRecord(**values)  # type: ignore[arg-type]
        assert raised.value.field in {field, "key"}
    with pytest.raises(InvalidInput):
        LogRecord(one.key, None, one.owner, one.shape, one.lifetime, one.digests, one.payload[:-1])
    world = World()
    with pytest.raises(TooLarge):
        world.log.locate([b"k" * 32] * (MAX_BATCH + 1))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"segment_bytes": 4096}, "segment_bytes"),
        ({"segment_bytes": (1 << 20) + 512}, "segment_bytes"),
        ({"extent_bytes": SEGMENT, "staging_bytes": 8 * SEGMENT}, "segment_bytes"),
        ({"staging_bytes": EXTENT}, "staging_bytes"),
        ({"erasure_bytes": 100}, "erasure_bytes"),
        ({"commit_s": -1.0}, "commit_s"),
        ({"linger_s": 2.0}, "linger_s"),
        ({"queue_depth": 0}, "queue_depth"),
        ({"readers": 0}, "readers"),
        ({"capacity": 7 * SEGMENT}, "capacity"),
        ({"tenant_bytes": -1}, "tenant_bytes"),
    ],
)
def test_settings_are_checked(changed: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        small_settings(**changed)  # type: ignore[arg-type]
    assert raised.value.field == field


def test_after_close_everything_has_an_answer() -> None:
    world = World()
    one = record(key_of(1))
    world.put(one)
    world.log.close()
    world.log.close()
    assert world.log.durable == 1
    assert world.log.append([one], 1.0) == [Outcome(Reason.UNAVAILABLE)]
    assert world.log.flush(0.1) == 1
    again = opened(SimDisk(image=bytes(world.disk.durable)), world.settings)
    assert read(again, one)[1] == bytes(one.payload)


def test_time_is_the_clock_s() -> None:
    world = World()
    before = world.clock.monotonic()
    world.run(10 * TICK_S)
    assert world.clock.monotonic() >= before + 10 * TICK_S


def test_a_read_that_raises_leaves_no_segment_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    records = [record(key_of(number)) for number in range(3)]
    world.put(*records)
    world.settle()
    made = lookup.Task

    def fail_at_the_second(want: Want, *values: int) -> object:
        if want.key == records[1].key:
            raise MemoryError
        return made(want, *values)

    monkeypatch.setattr(lookup, "Task", fail_at_the_second)
    with pytest.raises(MemoryError):
        read_all(world.log, records)
    assert world.log.stats().pins == 0


def test_a_batch_that_raises_leaves_nothing_in_flight_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    records = [record(key_of(number), 9000) for number in range(12)]
    world.put(*records)
    world.settle()
    taking = reader._take_in

    def fail(*_: object) -> None:
        raise ValueError("as of a buffer that its owner has released")

    monkeypatch.setattr(reader, "_take_in", fail)
    with pytest.raises(ValueError, match="released"):
        read_all(world.log, records)
    monkeypatch.setattr(reader, "_take_in", taking)
    world.run(0.1)
    for one, (outcome, data) in zip(records, read_all(world.log, records).values(), strict=True):
        assert outcome.reason is Reason.HIT
        assert data == bytes(one.payload)
    assert world.log.stats().pins == 0
