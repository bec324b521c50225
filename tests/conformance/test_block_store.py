"""The conformance suite of `contracts.blocks.BlockStore`: every way to reach a store passes it.

To add one, add an opener to `tests.support.stores.BACKENDS`.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.stores import (
    BACKENDS,
    OTHER,
    OWNER,
    SHAPE,
    SOON,
    Opened,
    Opener,
    holds,
    key_of,
    payload_of,
    put_of,
    read_one,
    read_under,
    reasons,
    store_all,
)

from isthmus.contracts.blocks import (
    MAX_BATCH,
    Hint,
    HintKind,
    Lifetime,
    Owner,
    Put,
    Reason,
    RecordKind,
    Shape,
    Tier,
    Want,
)
from isthmus.contracts.errors import InvalidInput, IsthmusError
from isthmus.state.kv.settings import StoreSettings

SETTINGS = StoreSettings(arena_bytes=1 << 20, region_bytes=1 << 19, lease_s=60.0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Opener:
    return BACKENDS[request.param]


@pytest.fixture
def opened(backend: Opener, tmp_path: Path) -> Iterator[Opened]:
    with backend(tmp_path, SETTINGS) as opened:
        yield opened


def test_what_is_written_is_found_and_read_back(opened: Opened) -> None:
    names = [("a", index) for index in range(20)]
    outcomes = store_all(opened.store, names)
    assert reasons(outcomes) == [Reason.STORED] * 20
    keys = [key_of(name) for name in [*names, "absent"]]
    found = opened.store.match(keys)
    assert [one.tier for one in found] == [Tier.DRAM] * 20 + [None]
    assert found[0].record_bytes == SHAPE.record_bytes
    with opened.store.lease(keys, 10.0) as lease:
        assert list(lease.granted) == [Tier.DRAM] * 20 + [None]
        buffers = [bytearray(SHAPE.record_bytes) for _ in keys]
        wants = [Want(key, SHAPE, memoryview(into)) for key, into in zip(keys, buffers, strict=True)]
        outcomes = opened.store.read(lease, wants, SOON)
    assert [(one.reason, one.tier) for one in outcomes[:20]] == [(Reason.HIT, Tier.DRAM)] * 20
    assert outcomes[20].reason is Reason.ABSENT
    assert [bytes(one) for one in buffers[:20]] == [payload_of(name, SHAPE.record_bytes) for name in names]


def test_results_are_in_the_order_of_what_was_asked(opened: Opened) -> None:
    store_all(opened.store, [1, 3])
    found = opened.store.match([key_of(name) for name in (3, 2, 1, 3)])
    assert [one.tier is not None for one in found] == [True, False, True, True]
    with opened.store.lease([key_of(3), key_of(2), key_of(1)], 10.0) as lease:
        assert [one is not None for one in lease.granted] == [True, False, True]
        assert read_under(opened.store, lease, 1)[1] == payload_of(1, SHAPE.record_bytes)
        assert read_under(opened.store, lease, 3)[1] == payload_of(3, SHAPE.record_bytes)


@pytest.mark.parametrize("chunk", [1, 64, 4096, 5000, 150_000])
def test_any_size_of_chunk_comes_back(opened: Opened, chunk: int) -> None:
    shape = Shape(RecordKind.STATE, 3, chunk)
    assert reasons(store_all(opened.store, ["x"], shape=shape)) == [Reason.STORED]
    assert holds(opened.store, "x", shape)


def test_parts_of_a_record_are_read_chunk_by_chunk(opened: Opened) -> None:
    store_all(opened.store, ["x"])
    whole = payload_of("x", SHAPE.record_bytes)
    with opened.store.lease([key_of("x")], 10.0) as lease:
        for first, count in ((0, 1), (1, 2), (3, 1), (2, None), (0, 4)):
            outcome, data = read_under(opened.store, lease, "x", first=first, count=count)
            end = SHAPE.chunks if count is None else first + count
            assert outcome.reason is Reason.HIT
            assert data == whole[first * SHAPE.chunk_bytes : end * SHAPE.chunk_bytes]


def test_any_buffer_of_bytes_may_be_written_and_read_into(opened: Opened) -> None:
    shape = Shape(RecordKind.BLOCK, 2, 4096)
    data = memoryview(payload_of("x", 8192)).cast("f", (2, 1024))
    put = put_of("x", shape)
    put = type(put)(put.key, None, OWNER, shape, data)
    assert reasons(opened.store.write([put], SOON)) == [Reason.STORED]
    into = memoryview(bytearray(8192)).cast("i", (2, 1024))
    with opened.store.lease([put.key], 10.0) as lease:
        assert reasons(opened.store.read(lease, [Want(put.key, shape, into)], SOON)) == [Reason.HIT]
    assert bytes(into) == payload_of("x", 8192)


def test_the_payload_is_the_callers_again_when_write_returns(opened: Opened) -> None:
    data = bytearray(payload_of("x", SHAPE.record_bytes))
    opened.store.write([type(put := put_of("x"))(put.key, None, OWNER, SHAPE, memoryview(data))], SOON)
    data[:] = bytes(len(data))
    assert holds(opened.store, "x")


def test_a_key_that_is_here_is_not_written_again(opened: Opened) -> None:
    store_all(opened.store, ["x"])
    again = opened.store.write([put_of("x", payload=bytes(SHAPE.record_bytes)), put_of("y"), put_of("y")], SOON)
    assert reasons(again) == [Reason.PRESENT, Reason.STORED, Reason.PRESENT]
    assert holds(opened.store, "x")


def test_another_shape_of_a_key_is_no_hit(opened: Opened) -> None:
    store_all(opened.store, ["x"])
    for shape in (Shape(RecordKind.BLOCK, 2, 6000), Shape(RecordKind.STATE, 4, 3000), Shape(RecordKind.BLOCK, 4, 2999)):
        assert read_one(opened.store, "x", shape)[0].reason is Reason.ABSENT
    assert holds(opened.store, "x"), "asking wrongly takes nothing away from others"


def test_changed_bytes_are_never_a_hit(opened: Opened) -> None:
    for at in (0, SHAPE.chunk_bytes, SHAPE.record_bytes - 1):
        store_all(opened.store, [at])
        opened.flip(at, at)
        outcome, data = read_one(opened.store, at)
        assert outcome.reason is Reason.CORRUPT or (opened.has_log and data == payload_of(at, SHAPE.record_bytes))
        assert opened.store.stats().counts["quarantine_dram_corrupt"] >= 1
    if not opened.has_log:
        assert [one.tier for one in opened.store.match([key_of(0)])] == [None], "it is not offered again"
    assert reasons(store_all(opened.store, [0]))[0] in (Reason.STORED, Reason.PRESENT)
    assert holds(opened.store, 0), "the memory under it is not used again, the key is"


def test_only_the_chunks_that_are_wanted_must_be_whole(opened: Opened) -> None:
    store_all(opened.store, ["x"])
    opened.flip("x", 3 * SHAPE.chunk_bytes + 5)
    with opened.store.lease([key_of("x")], 10.0) as lease:
        assert read_under(opened.store, lease, "x", first=0, count=3)[0].reason is Reason.HIT


def test_a_lease_ends_at_its_deadline(opened: Opened) -> None:
    store_all(opened.store, ["x"])
    lease = opened.store.lease([key_of("x")], 10.0)
    opened.clock.advance(9.9)
    assert read_under(opened.store, lease, "x")[0].reason is Reason.HIT
    opened.clock.advance(0.2)
    assert read_under(opened.store, lease, "x")[0].reason is Reason.EXPIRED
    lease.release()
    assert holds(opened.store, "x")


def test_the_store_caps_a_lease(opened: Opened) -> None:
    store_all(opened.store, ["x"])
    lease = opened.store.lease([key_of("x")], 1e9)
    opened.clock.advance(SETTINGS.lease_s + 1)
    assert read_under(opened.store, lease, "x")[0].reason is Reason.EXPIRED


def test_a_released_lease_reads_nothing(opened: Opened) -> None:
    store_all(opened.store, ["x"])
    lease = opened.store.lease([key_of("x")], 10.0)
    lease.release()
    lease.release()
    assert read_under(opened.store, lease, "x")[0].reason is Reason.EXPIRED


def test_a_read_needs_a_lease_on_the_key(opened: Opened) -> None:
    store_all(opened.store, ["x", "y"])
    with opened.store.lease([key_of("x")], 10.0) as lease:
        assert read_under(opened.store, lease, "y")[0].reason is Reason.ABSENT


def test_what_is_leased_is_not_evicted_and_what_is_not_is(opened: Opened) -> None:
    store_all(opened.store, ["kept", "goes"])
    with opened.store.lease([key_of("kept")], 30.0) as lease:
        for index in range(200):
            assert reasons(store_all(opened.store, [index])) == [Reason.STORED]
        outcome, data = read_under(opened.store, lease, "kept")
        assert (outcome.reason, outcome.tier) == (Reason.HIT, Tier.DRAM)
        assert data == payload_of("kept", SHAPE.record_bytes)
    in_dram = [one.tier is Tier.DRAM for one in opened.store.match([key_of(index) for index in range(200)])]
    assert 10 < in_dram.count(True) < 90
    assert opened.store.stats().tiers[0].used <= SETTINGS.arena_bytes


def test_a_store_whose_memory_is_all_leased_says_so_and_recovers(opened: Opened) -> None:
    names = list(range(84))
    assert reasons(store_all(opened.store, names)) == [Reason.STORED] * 84
    with opened.store.lease([key_of(name) for name in names], 30.0):
        outcome = store_all(opened.store, ["more"])[0]
        assert outcome.reason is Reason.FULL
    assert reasons(store_all(opened.store, ["more"])) == [Reason.STORED]
    assert holds(opened.store, "more")


def test_expiry_frees_what_a_lost_lease_held(opened: Opened) -> None:
    names = list(range(84))
    store_all(opened.store, names)
    opened.store.lease([key_of(name) for name in names], 5.0)
    opened.clock.advance(5.1)
    opened.store.lease([], 1.0).release()
    assert reasons(store_all(opened.store, ["more"])) == [Reason.STORED]


def test_a_record_larger_than_a_region_is_refused(opened: Opened) -> None:
    outcome = store_all(opened.store, ["x"], shape=Shape(RecordKind.BLOCK, 1, (1 << 19) + 1))[0]
    assert outcome.reason is Reason.TOO_LARGE


def test_batches_over_the_limit_are_refused(opened: Opened) -> None:
    keys = [key_of(0)] * (MAX_BATCH + 1)
    store_all(opened.store, [0])
    with pytest.raises(InvalidInput):
        opened.store.match(keys)
    with pytest.raises(InvalidInput):
        opened.store.lease(keys, 1.0)
    with pytest.raises(InvalidInput):
        opened.store.write([put_of(0)] * (MAX_BATCH + 1), SOON)
    with opened.store.lease(keys[:1], 10.0) as lease, pytest.raises(InvalidInput):
        opened.store.read(lease, [Want(keys[0], SHAPE, memoryview(bytearray(12000)))] * (MAX_BATCH + 1), SOON)
    assert len(opened.store.match(keys[:MAX_BATCH])) == MAX_BATCH
    opened.store.hint([Hint(HintKind.DONE, keys)] * 50)


def test_hints_never_fail(opened: Opened) -> None:
    store_all(opened.store, ["x"])
    for kind in HintKind:
        for seconds in (0.0, -1.0, 1e12, float("inf"), float("nan")):
            opened.store.hint([Hint(kind, [key_of("x"), key_of("absent")], seconds)])
    assert holds(opened.store, "x")


def test_done_leaves_first_and_pinned_stays(opened: Opened) -> None:
    for name in range(60):
        store_all(opened.store, [name])
    opened.store.hint([Hint(HintKind.DONE, [key_of(50)]), Hint(HintKind.PIN, [key_of(0)], 100.0)])
    store_all(opened.store, [("more", index) for index in range(26)])
    found = opened.store.match([key_of(0), key_of(50)])
    assert found[0].tier is Tier.DRAM
    assert found[1].tier is not Tier.DRAM


def test_flush_and_stats(opened: Opened) -> None:
    outcomes = store_all(opened.store, ["x"])
    watermark = opened.store.flush(SOON)
    assert watermark >= outcomes[0].sequence
    assert holds(opened.store, "x")
    stats = opened.store.stats()
    assert stats.durable >= outcomes[0].sequence
    assert stats.tiers[0].tier == Tier.DRAM
    assert (stats.tiers[0].records, stats.tiers[0].capacity) == (1, SETTINGS.arena_bytes)
    assert stats.counts["read_dram_hit"] == 1
    assert len(stats.epoch) == 16


def test_nothing_forgotten_is_read_again(opened: Opened) -> None:
    session = Owner(OWNER.namespace_id, b"session-a-000000")
    store_all(opened.store, ["a"], owner=session)
    store_all(opened.store, ["b"], owner=OWNER)
    store_all(opened.store, ["c"], owner=OTHER)
    lease = opened.store.lease([key_of("a"), key_of("b")], 20.0)
    erasure = opened.inner.admin.forget(session.namespace_id, session.session_id)
    assert (erasure.number, erasure.namespace_id, erasure.session_id) == (1, session.namespace_id, session.session_id)
    assert read_under(opened.store, lease, "a")[0].reason is Reason.FORGOTTEN
    assert read_under(opened.store, lease, "b")[0].reason is Reason.HIT
    lease.release()
    assert [holds(opened.store, name) for name in "abc"] == [False, True, True]
    assert opened.inner.admin.forget(OWNER.namespace_id).number == 2
    assert [holds(opened.store, name) for name in "abc"] == [False, False, True]
    assert [one.number for one in opened.store.stats().erasures] == [1, 2]
    assert reasons(store_all(opened.store, ["a"], owner=session)) == [Reason.STORED], "the key may come again"
    assert holds(opened.store, "a")


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_no_time_that_is_asked_for_lasts_for_ever_or_raises(opened: Opened, seconds: float) -> None:
    store, into = opened.store, memoryview(bytearray(SHAPE.record_bytes))
    store_all(store, ["x"])
    lease = store.lease([key_of("x")], seconds)
    store.hint([Hint(kind, [key_of("x")], seconds) for kind in HintKind])
    (outcome,) = store.read(lease, [Want(key_of("x"), SHAPE, into)], seconds)
    assert (outcome.reason is Reason.HIT) == (seconds > 0)
    (outcome,) = store.write([put_of("y")], seconds)
    assert (outcome.reason is Reason.STORED) == (seconds > 0)
    store.flush(seconds)
    opened.clock.advance(61.0)
    opened.inner.reader.expire()
    assert not len(opened.inner.reader)


def test_bytes_that_do_not_lie_in_a_row_are_refused() -> None:
    apart = memoryview(bytearray(2 * SHAPE.record_bytes))[::2]
    with pytest.raises(InvalidInput, match="in a row"):
        Want(key_of("x"), SHAPE, apart)
    with pytest.raises(InvalidInput, match="in a row"):
        Put(key_of("x"), None, OWNER, SHAPE, apart)


def test_short_lived_records_leave_first(opened: Opened) -> None:
    store_all(opened.store, list(range(40)))
    store_all(opened.store, ["short"], lifetime=Lifetime.SHORT)
    opened.store.flush(SOON)  # what is on its way to a log goes last
    store_all(opened.store, [("more", index) for index in range(44)])
    found = opened.store.match([key_of("short"), key_of(0)])
    assert (found[0].tier is Tier.DRAM, found[1].tier is Tier.DRAM) == (False, True)


def test_many_threads_at_once_never_see_wrong_bytes(opened: Opened) -> None:
    """Readers, writers and an eraser over few keys and an arena that is always full."""
    failures: list[Exception] = []
    hits = [0]

    def work(seed: int) -> None:
        try:
            for turn in range(90):
                name = (turn // 3 * 7 + seed * 13) % 150
                if turn % 3 < 2:
                    outcome = store_all(opened.store, [name])[0]
                    assert outcome.reason in (Reason.STORED, Reason.PRESENT, Reason.FULL, Reason.FORGOTTEN), outcome
                else:
                    hits[0] += holds(opened.store, name)
                    if turn == 30 and seed == 0:
                        opened.inner.admin.forget(OWNER.namespace_id)
        except (AssertionError, IsthmusError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert hits[0] > 0
