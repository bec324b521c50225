"""The store beyond the conformance suite: tiers, quotas, room in pieces, bringing ahead, erasure, restarts."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from tests.support.disk import FailingCalls
from tests.support.faults import Hasty
from tests.support.stores import (
    BACKENDS,
    LOG,
    OTHER,
    OWNER,
    SHAPE,
    SOON,
    Opened,
    holds,
    key_of,
    payload_of,
    put_of,
    read_one,
    read_under,
    reasons,
    store_all,
    with_log,
)

from isthmus.contracts.blocks import Hint, HintKind, Lifetime, Owner, Reason, RecordKind, Shape, Tier, Want
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.errors import DeadlineExceeded, InvalidInput, StoreCorrupt, StoreUnavailable
from isthmus.state.kv import upkeep
from isthmus.state.kv.arena.arena import Arena
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.uring import refusal
from isthmus.state.kv.log.format import SLOT, payload_offset
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.scopes import Scope
from isthmus.state.kv.settings import StoreSettings
from isthmus.state.kv.store import Store, open_store

SETTINGS = StoreSettings(arena_bytes=1 << 20, region_bytes=1 << 19)
PAGE = Shape(RecordKind.BLOCK, 1, 4096)


@pytest.fixture
def over_log(tmp_path: Path) -> Iterator[Opened]:
    with BACKENDS["library_over_log"](tmp_path, SETTINGS) as opened:
        yield opened


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Opened]:
    with BACKENDS["library"](tmp_path, SETTINGS) as opened:
        yield opened


def small(folder: Path, **how: object) -> StoreSettings:
    return msgspec.structs.replace(SETTINGS, **how)


def to_log_only(opened: Opened) -> None:
    """Everything is durable, and nothing in DRAM."""
    opened.store.flush(SOON)
    opened.inner.admin.evict(Tier.DRAM, 1 << 30, 1.0)
    assert opened.store.stats().tiers[0].records == 0


def test_what_leaves_dram_is_read_from_the_log(over_log: Opened) -> None:
    outcomes = store_all(over_log.store, list(range(20)))
    assert {(one.reason, one.tier) for one in outcomes} == {(Reason.STORED, Tier.NVME)}
    assert [one.sequence for one in outcomes] == sorted({one.sequence for one in outcomes})
    to_log_only(over_log)
    keys = [key_of(name) for name in range(21)]
    assert [one.tier for one in over_log.store.match(keys)] == [Tier.NVME] * 20 + [None]
    with over_log.store.lease(keys, 10.0) as lease:
        assert list(lease.granted) == [Tier.NVME] * 20 + [None]
        outcome, data = read_under(over_log.store, lease, 7, first=1, count=2)
        assert (outcome.reason, outcome.tier) == (Reason.HIT, Tier.NVME)
        assert data == payload_of(7, SHAPE.record_bytes)[3000:9000]
    assert over_log.store.stats().counts["read_nvme_hit"] == 1
    assert over_log.store.stats().tiers[1].records == 20


def test_damage_in_dram_costs_nothing_when_the_log_has_a_copy(over_log: Opened) -> None:
    store_all(over_log.store, ["x"])
    over_log.store.flush(SOON)
    over_log.flip("x")
    outcome, data = read_one(over_log.store, "x")
    assert (outcome.reason, outcome.tier) == (Reason.HIT, Tier.NVME)
    assert data == payload_of("x", SHAPE.record_bytes)
    stats = over_log.store.stats()
    assert stats.counts["quarantine_dram_corrupt"] == 1
    assert stats.gauges["arena_quarantined_bytes"] == 3 * 4096


def damage_on_disk(opened: Opened, name: object) -> None:
    """Change one bit of a record's bytes in the log's file."""
    log, path = opened.inner._parts.log, opened.inner.settings.path
    assert log is not None
    (place,) = log.locate([key_of(name)])
    assert place is not None
    at = log._ledger.geometry.start(place.segment) + place.slot * SLOT + payload_offset(SHAPE.chunks)
    with Path(path).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())


def test_damage_in_the_log_costs_nothing_when_dram_has_a_copy(over_log: Opened) -> None:
    """The lease was granted when the log alone had it."""
    store_all(over_log.store, ["x"])
    to_log_only(over_log)
    with over_log.store.lease([key_of("x")], 30.0) as lease:
        assert list(lease.granted) == [Tier.NVME]
        over_log.store.hint([Hint(HintKind.PREFETCH, [key_of("x")])])
        assert over_log.inner.settle(SOON)
        damage_on_disk(over_log, "x")
        for _ in range(2):
            outcome, data = read_under(over_log.store, lease, "x")
            assert (outcome.reason, outcome.tier) == (Reason.HIT, Tier.DRAM)
            assert data == payload_of("x", SHAPE.record_bytes)
    stats = over_log.store.stats()
    assert (stats.counts["quarantine_nvme_corrupt"], stats.counts["read_dram_hit"]) == (1, 2)
    assert stats.gauges["leases"] == 0
    over_log.inner._parts.dram.check()
    over_log.inner.admin.evict(Tier.DRAM, 1 << 30, 1.0)
    assert over_log.store.stats().tiers[0].used == 0, "no pin was left on it"


def test_damage_everywhere_is_corrupt_then_a_miss_and_can_be_written_again(over_log: Opened) -> None:
    store_all(over_log.store, ["x"])
    over_log.store.flush(SOON)
    over_log.flip("x")
    damage_on_disk(over_log, "x")
    assert read_one(over_log.store, "x")[0].reason is Reason.CORRUPT
    counts = over_log.store.stats().counts
    assert (counts["quarantine_dram_corrupt"], counts["quarantine_nvme_corrupt"]) == (1, 1)
    assert [one.tier for one in over_log.store.match([key_of("x")])] == [None]
    assert reasons(store_all(over_log.store, ["x"])) == [Reason.STORED]
    assert holds(over_log.store, "x")


def test_what_is_forgotten_while_it_is_verified_is_no_damage(alone: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    store_all(alone.store, ["x", "y"])

    def late(data: memoryview, chunk_bytes: int) -> bytes:
        alone.inner.admin.forget(OWNER.namespace_id)
        return digests_of(data, chunk_bytes)

    monkeypatch.setattr(upkeep, "digests_of", late)
    checked = alone.inner.admin.verify(SOON)
    assert (checked.dram_good, checked.dram_corrupt) == (0, 0)
    assert "quarantine_dram_corrupt" not in alone.store.stats().counts


def test_quarantined_memory_is_never_used_again(alone: Opened) -> None:
    store_all(alone.store, ["bad"])
    (record,) = alone.inner._parts.dram.where([key_of("bad")])
    assert record is not None
    alone.flip("bad")
    assert read_one(alone.store, "bad")[0].reason is Reason.CORRUPT
    for name in range(300):
        store_all(alone.store, [name])
    taken = {page for one in alone.inner._parts.dram.records() for page in range(one.page, one.page + 3)}
    assert not taken & set(range(record.page, record.page + 3))
    assert not any(alone.inner.arena.view(record)), "and nothing is left in it"


def test_a_late_quarantine_touches_nobody_elses_memory(alone: Opened) -> None:
    """Whoever found damage was too slow: the record has left, and its pages are another's."""
    dram = alone.inner._parts.dram
    store_all(alone.store, ["old"])
    (record,) = dram.where([key_of("old")])
    assert record is not None
    alone.inner.admin.evict(Tier.DRAM, 1, 1.0)
    store_all(alone.store, ["new"])
    (new,) = dram.where([key_of("new")])
    assert new is not None
    assert new.page == record.page
    dram.quarantine(record)
    assert holds(alone.store, "new")
    assert alone.store.stats().gauges["arena_quarantined_bytes"] == 0


def test_a_lease_that_ends_during_the_copy_reads_nothing(alone: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    store_all(alone.store, ["x"])
    lease = alone.store.lease([key_of("x")], 10.0)
    copy = Arena.fetch

    def slow(arena: Arena, *how: object) -> bool:
        good = copy(arena, *how)  # type: ignore[arg-type]
        alone.clock.advance(11.0)
        return good

    monkeypatch.setattr(Arena, "fetch", slow)
    assert read_under(alone.store, lease, "x")[0].reason is Reason.EXPIRED
    assert alone.store.stats().counts["read_dram_expired"] == 1


def test_reads_that_take_too_long_are_late_not_lost(alone: Opened) -> None:
    store_all(alone.store, [1, 2])
    with alone.store.lease([key_of(1), key_of(2)], 10.0) as lease:
        wants = [Want(key_of(name), SHAPE, memoryview(bytearray(SHAPE.record_bytes))) for name in (1, 2)]
        assert reasons(alone.store.read(lease, wants, 0.0)) == [Reason.LATE] * 2
        assert reasons(alone.store.read(lease, wants, SOON)) == [Reason.HIT] * 2
    assert reasons(alone.store.write([put_of(3)], 0.0)) == [Reason.LATE]
    assert alone.store.match([key_of(3)])[0].tier is None


def test_a_tenant_over_its_quota_pays_for_itself(tmp_path: Path) -> None:
    with BACKENDS["library"](tmp_path, small(tmp_path, tenant_bytes=10 * 12288)) as opened:
        store_all(opened.store, [("other", index) for index in range(5)], owner=OTHER)
        for index in range(40):
            assert reasons(store_all(opened.store, [index])) == [Reason.STORED]
        kept = [holds(opened.store, index) for index in range(40)]
        assert kept.count(True) == 10
        assert all(holds(opened.store, ("other", index)) for index in range(5))
        held = [key_of(index) for index in range(40) if kept[index]]
        with opened.store.lease(held, 10.0):
            assert reasons(store_all(opened.store, ["more"])) == [Reason.QUOTA]
            assert reasons(store_all(opened.store, ["theirs"], owner=OTHER)) == [Reason.STORED]
        large = Shape(RecordKind.BLOCK, 1, 11 * 12288)
        assert reasons(store_all(opened.store, ["large"], shape=large)) == [Reason.QUOTA]


def test_room_that_is_scattered_is_put_together(alone: Opened) -> None:
    """A full arena of single pages: a record of 64 pages fits only where neighbours give way."""
    store_all(alone.store, list(range(256)), shape=PAGE)
    big = Shape(RecordKind.STATE, 1, 64 * 4096)
    assert reasons(store_all(alone.store, ["big"], shape=big)) == [Reason.STORED]
    assert holds(alone.store, "big", big)
    left = alone.store.stats().tiers[0].records
    assert left >= 256 - 64 - 64 + 1, "not much more was evicted than it needed"


def test_a_leased_page_in_the_way_is_gone_around(alone: Opened) -> None:
    names = list(range(256))
    store_all(alone.store, names, shape=PAGE)
    big = Shape(RecordKind.STATE, 1, 100 * 4096)
    with alone.store.lease([key_of(name) for name in names[::90]], 10.0) as lease:
        assert reasons(store_all(alone.store, ["big"], shape=big)) == [Reason.FULL]
        lease.release()
    with alone.store.lease([key_of(0)], 10.0) as lease:
        assert reasons(store_all(alone.store, ["big"], shape=big)) == [Reason.STORED]
        assert read_under(alone.store, lease, 0, PAGE)[0].reason is Reason.HIT


def test_what_is_on_its_way_to_the_log_is_spared(over_log: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    store_all(over_log.store, list(range(40)))
    over_log.store.flush(SOON)
    log = over_log.inner._parts.log
    assert log is not None
    durable = log.durable
    store_all(over_log.store, list(range(40, 60)))
    monkeypatch.setattr(SegmentLog, "durable", property(lambda _: durable))
    over_log.inner._parts.dram._make_way(20 * 12288, SystemClock().monotonic())
    found = over_log.store.match([key_of(name) for name in range(60)])
    assert all(one.tier is Tier.DRAM for one in found[40:])
    assert sum(one.tier is Tier.DRAM for one in found[:40]) == 20
    over_log.inner._parts.dram._make_way(30 * 12288, SystemClock().monotonic())
    assert over_log.store.stats().tiers[0].records == 10, "unless nothing else would do"


def test_what_must_not_go_yet_is_not_met_again_for_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = 16 << 20
    with BACKENDS["library_over_log"](tmp_path, msgspec.structs.replace(SETTINGS, arena_bytes=arena)) as opened:
        dram = opened.inner._parts.dram
        # What would go first (it was said to be done) is on its way to the log, and what is older is there.
        monkeypatch.setattr(SegmentLog, "durable", property(lambda _: 0))
        outcomes = store_all(opened.store, range(256), shape=PAGE)
        store_all(opened.store, range(256, arena // 4096), shape=PAGE, lifetime=Lifetime.SHORT)
        monkeypatch.setattr(SegmentLog, "durable", property(lambda _: outcomes[-1].sequence))
        find, met = dram.arena.find, list[bytes]()
        monkeypatch.setattr(dram.arena, "find", lambda key: met.append(key) or find(key))  # type: ignore[func-returns-value]
        assert reasons(store_all(opened.store, range(10_000, 10_128), shape=PAGE)) == [Reason.STORED] * 128
        assert len(dram.arena) == arena // 4096, "no more have left than had to"
        assert len(met) < 16 * arena // 4096, "eight searches, not one for each"


def test_wear_keeps_a_record_in_dram_until_it_proves_its_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = msgspec.structs.replace(LOG, wear_bytes_day=1)
    with BACKENDS["library"](tmp_path, small(tmp_path, path=str(tmp_path / "log"), log=log)) as opened:
        outcomes = []
        for name in range(150):
            outcomes += store_all(opened.store, [name])
            opened.store.flush(SOON)
        assert {one.reason for one in outcomes} == {Reason.STORED, Reason.WEAR}
        worn = max(name for name, one in enumerate(outcomes) if one.reason is Reason.WEAR)
        assert (outcomes[worn].tier, outcomes[worn].sequence) == (Tier.DRAM, 0)
        assert opened.store.stats().counts["append_nvme_wear"] >= 1
        log_ = opened.inner._parts.log
        assert log_ is not None
        assert holds(opened.store, worn)
        assert opened.inner.settle(SOON)
        assert not log_.locate([key_of(worn)])[0], "still not worth it"
        monkeypatch.setattr(log_._intake._admission, "admits", lambda *_: True)
        assert [holds(opened.store, worn) for _ in range(3)] == [True] * 3
        assert opened.inner.settle(SOON)
        assert opened.store.stats().counts["append_nvme_stored"] == 1, "it was used again and again, and offered again"
        to_log_only(opened)
        assert read_one(opened.store, worn)[0].tier is Tier.NVME


# Bringing ahead


def in_dram(opened: Opened, *names: object) -> list[bool]:
    assert opened.inner.settle(SOON)
    return [one.tier is Tier.DRAM for one in opened.store.match([key_of(name) for name in names])]


def test_a_prefetch_hint_brings_records_up(over_log: Opened) -> None:
    store_all(over_log.store, list(range(30)))
    to_log_only(over_log)
    over_log.store.hint([Hint(HintKind.PREFETCH, [key_of(name) for name in (3, 4, 99)])])
    assert in_dram(over_log, 3, 4, 5, 99) == [True, True, False, False]
    assert holds(over_log.store, 3)
    stats = over_log.store.stats()
    assert stats.counts["prefetch_nvme_hit"] == 2
    assert stats.counts["read_dram_hit"] == 1
    over_log.flip(4)
    assert holds(over_log.store, 4), "what was brought is verified like everything else"


def test_who_waits_is_brought_back_shortly_before(over_log: Opened) -> None:
    store_all(over_log.store, [1])
    to_log_only(over_log)
    over_log.store.hint([Hint(HintKind.WAITING, [key_of(1)], 60.0)])
    over_log.clock.advance(53.0)
    attendant = over_log.inner._attendant
    with attendant._changed:
        attendant._take_due()
        assert not attendant._queue
    over_log.clock.advance(1.5)
    with attendant._changed:
        attendant._take_due()
        attendant._changed.notify_all()
    assert in_dram(over_log, 1) == [True]


def test_what_is_read_from_the_log_twice_is_brought_up(over_log: Opened) -> None:
    store_all(over_log.store, [1, 2])
    to_log_only(over_log)
    assert holds(over_log.store, 1)
    assert in_dram(over_log, 1) == [False]
    assert holds(over_log.store, 1)
    assert in_dram(over_log, 1, 2) == [True, False]


def test_what_waits_to_be_brought_is_bounded(tmp_path: Path) -> None:
    with BACKENDS["library_over_log"](tmp_path, small(tmp_path, prefetch_keys=8)) as opened:
        attendant = opened.inner._attendant
        with attendant._changed:
            attendant._queue.extend([key_of(0)] * 6)
        opened.store.hint([Hint(HintKind.PREFETCH, [key_of(name) for name in range(50)])])
        opened.store.hint([Hint(HintKind.WAITING, [key_of(name) for name in range(50)], 900.0)])
        assert len(attendant._queue) <= 8
        assert attendant._due_keys <= 8
        assert opened.store.stats().counts["prefetch_none_dropped"] >= 42 + 50
        assert opened.inner.settle(SOON)


# Erasure


def test_a_write_under_way_cannot_bring_back_what_is_forgotten(alone: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eraser comes while the bytes are being copied: it waits, and the record does not appear."""
    began, go_on = threading.Event(), threading.Event()
    fill = Arena.fill

    def slow(arena: Arena, *how: object) -> bytes:
        began.set()
        assert go_on.wait(10)
        return fill(arena, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(Arena, "fill", slow)
    outcomes: list[Reason] = []
    writing = threading.Thread(target=lambda: outcomes.extend(reasons(store_all(alone.store, ["x"]))))
    writing.start()
    assert began.wait(10)
    erasing = threading.Thread(target=alone.inner.admin.forget, args=[OWNER.namespace_id])
    erasing.start()
    while not alone.inner._parts.scopes.refuses(OWNER):
        pass
    assert reasons(store_all(alone.store, ["y"])) == [Reason.FORGOTTEN]
    go_on.set()
    writing.join(10)
    erasing.join(10)
    assert outcomes == [Reason.FORGOTTEN]
    assert not any(bytes(region.view).strip(b"\0") for region in alone.inner.arena.memory.regions)
    assert reasons(store_all(alone.store, ["x"])) == [Reason.STORED]


def test_an_erasure_that_cannot_finish_says_so(tmp_path: Path) -> None:
    with BACKENDS["library"](tmp_path, small(tmp_path, call_s=0.05)) as opened:
        number = opened.inner._parts.scopes.start_write({OWNER})
        with pytest.raises(StoreUnavailable, match="ask again"):
            opened.inner.admin.forget(OWNER.namespace_id)
        opened.inner._parts.scopes.end_write(number)
        assert opened.inner.admin.forget(OWNER.namespace_id).number == 1


def test_no_byte_of_what_is_forgotten_stays_in_memory(alone: Opened) -> None:
    """Also not of what had been evicted before."""
    store_all(alone.store, list(range(300)))
    with alone.store.lease([key_of(299)], 10.0):
        alone.inner.admin.forget(OWNER.namespace_id)
        assert not any(bytes(region.view).strip(b"\0") for region in alone.inner.arena.memory.regions)
    assert alone.store.stats().tiers[0].used == 0


def test_what_is_forgotten_stays_so_after_a_restart(tmp_path: Path) -> None:
    session = Owner(OWNER.namespace_id, b"session-a-000000")
    with BACKENDS["library_over_log"](tmp_path, SETTINGS) as opened:
        store_all(opened.store, ["mine"], owner=session)
        store_all(opened.store, ["ours"])
        opened.store.flush(SOON)
        assert opened.inner.admin.forget(session.namespace_id, session.session_id).number == 1
        assert not holds(opened.store, "mine")
    with BACKENDS["library_over_log"](tmp_path, SETTINGS) as opened:
        assert [holds(opened.store, name) for name in ("mine", "ours")] == [False, True]
        (erasure,) = opened.store.stats().erasures
        assert (erasure.number, erasure.session_id) == (1, session.session_id)
        assert opened.inner.admin.forget(OWNER.namespace_id).number == 2


# Restarts and upkeep


def test_what_was_durable_outlives_the_store(tmp_path: Path) -> None:
    with BACKENDS["library_over_log"](tmp_path, SETTINGS) as opened:
        store_all(opened.store, list(range(50)))
        watermark = opened.store.flush(SOON)
        first = opened.store.stats()
        assert (first.durable, watermark) == (50, 50)
    with BACKENDS["library_over_log"](tmp_path, SETTINGS) as opened:
        second = opened.store.stats()
        assert second.epoch != first.epoch
        assert second.tiers[0].records == 0
        assert all(holds(opened.store, name) for name in range(50))
        assert reasons(store_all(opened.store, [3, 50])) == [Reason.PRESENT, Reason.STORED]


def test_list_verify_evict_compact(over_log: Opened) -> None:
    store_all(over_log.store, list(range(12)))
    over_log.store.flush(SOON)
    admin = over_log.inner.admin
    assert len(admin.ls(Tier.DRAM, 0, 100)) == len(admin.ls(Tier.NVME, 0, 100)) == 12
    assert {one.key for one in admin.ls(Tier.DRAM, 2, 5)} < {key_of(name) for name in range(12)}
    assert len(admin.ls(Tier.NVME, 10, 5)) == 2
    (one,) = admin.ls(Tier.DRAM, 0, 1)
    assert (one.namespace_id, one.record_bytes, one.tier) == (OWNER.namespace_id, SHAPE.record_bytes, Tier.DRAM)
    with pytest.raises(InvalidInput, match="tier"):
        admin.ls(Tier.REMOTE, 0, 1)
    over_log.flip(3)
    checked = admin.verify(30.0)
    assert (checked.dram_good, checked.dram_corrupt) == (11, 1)
    assert (checked.nvme_good, checked.nvme_corrupt, checked.nvme_unreadable) == (12, 0, 0)
    assert holds(over_log.store, 3)
    with pytest.raises(DeadlineExceeded):
        admin.verify(0.0)
    assert admin.evict(Tier.DRAM, 12288, 1.0) == 12288
    assert admin.evict(Tier.NVME, 1, 5.0) >= 0
    assert admin.compact(5.0) >= 0


def test_a_store_without_a_log_says_what_it_has_not(alone: Opened) -> None:
    store_all(alone.store, [1])
    assert alone.store.flush(SOON) == 0
    assert alone.inner.admin.verify(SOON).dram_good == 1
    assert alone.inner.admin.compact(SOON) == 0
    with pytest.raises(InvalidInput):
        alone.inner.admin.evict(Tier.NVME, 1, 1.0)
    assert alone.store.stats().backend == "none"


def test_a_lease_of_another_store_is_refused(alone: Opened, tmp_path: Path) -> None:
    class Foreign:
        granted = ()

    with pytest.raises(InvalidInput, match="lease"):
        alone.store.read(Foreign(), [], SOON)  # type: ignore[arg-type]


def test_the_table_of_leases_is_bounded(tmp_path: Path) -> None:
    with BACKENDS["library"](tmp_path, small(tmp_path, max_leases=2)) as opened:
        store_all(opened.store, [1])
        first, second = (opened.store.lease([key_of(1)], 10.0) for _ in range(2))
        third = opened.store.lease([key_of(1)], 10.0)
        assert list(third.granted) == [None]
        assert read_under(opened.store, third, 1)[0].reason is Reason.EXPIRED
        third.release()
        first.release()
        assert holds(opened.store, 1)
        second.release()
        assert opened.store.stats().counts["lease_none_full"] == 1


def test_a_read_that_is_given_up_costs_neither_memory_nor_the_disk(tmp_path: Path) -> None:
    settings, calls = with_log(tmp_path, SETTINGS), FailingCalls()
    store = open_store(settings, SystemClock(), SystemEntropy(), calls=calls)
    store_all(store, list(range(20)))
    store.flush(SOON)
    store.admin.evict(Tier.DRAM, 1 << 30, 1.0)
    mine, waits = threading.get_ident(), itertools.count()

    def once(name: str, _: int) -> int:
        waiting = name in ("uring_enter", "preadv") and (threading.get_ident() == mine or name == "preadv")
        return errno.EIO if waiting and next(waits) == 1 else 0

    calls.plan = once
    for _ in range(3):  # a read may wait once only
        read_one(store, 0)
    assert next(waits) > 1
    assert store._parts.log is not None
    readers, deadline = store._parts.log._lookup._readers, time.monotonic() + SOON
    while readers._broken:
        assert time.monotonic() < deadline, "it is closed by who keeps house"
        threading.Event().wait(0.01)
    assert all(holds(store, name) for name in range(20))
    store.close()
    assert store._disk is not None
    assert store._disk.lost == 0
    open_store(settings, SystemClock(), SystemEntropy()).close()


@pytest.mark.skipif(bool(refusal(Calls())), reason=f"NOT RUN: {refusal(Calls())}")
@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR])
def test_a_ring_that_is_refused_for_ever_is_given_up(tmp_path: Path, number: int) -> None:
    """Whoever waits may do so for much longer; what the kernel says to try again is tried for some seconds."""
    settings = msgspec.structs.replace(with_log(tmp_path, SETTINGS), disk_backend="io_uring")
    calls = FailingCalls(clock=Hasty())
    store = open_store(settings, SystemClock(), SystemEntropy(), calls=calls)
    store_all(store, [1, 2, 3])
    sequence = store.flush(SOON)
    store.admin.evict(Tier.DRAM, 1 << 30, SOON)
    calls.plan = lambda name, _: number if name == "uring_enter" else 0
    (outcome,) = store_all(store, [4])
    assert store.flush(60.0) == sequence < outcome.sequence
    stats = store.stats()
    assert stats.gauges["read_only"]
    assert stats.gauges["log_write_errors"] >= 1
    into = memoryview(bytearray(SHAPE.record_bytes))
    with store.lease([key_of(1)], 60.0) as lease:
        assert store.read(lease, [Want(key_of(1), SHAPE, into)], 60.0)[0].reason is Reason.IO_ERROR
    assert store.stats().counts["read_nvme_io_error"] == 1
    assert holds(store, 4), "what DRAM has is read from there"
    calls.plan = lambda *_: 0
    assert all(holds(store, name) for name in (1, 2, 3, 4)), "and what the disk has, when it can be had again"
    store.close()
    assert store._disk is not None
    assert store._disk.lost == 0
    with _reopened(settings) as again:
        assert all(holds(again, name) for name in (1, 2, 3))


@contextmanager
def _reopened(settings: StoreSettings) -> Iterator[Store]:
    store = open_store(settings, SystemClock(), SystemEntropy())
    yield store
    store.close()


def test_closing_leaves_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    def state() -> tuple[int, set[str]]:
        return len(list(Path("/proc/self/fd").iterdir())), {thread.name for thread in threading.enumerate()}

    before = state()
    for _ in range(2):
        store: Store = open_store(with_log(tmp_path, SETTINGS), SystemClock(), SystemEntropy())
        store_all(store, [1])
        store.close()
        del store
    assert state() == before


def test_a_failed_opening_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * LOG.capacity)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreCorrupt):
        open_store(with_log(tmp_path, SETTINGS), SystemClock(), SystemEntropy())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_scopes_cover_what_they_name() -> None:
    session = Owner(OWNER.namespace_id, b"session-a-000000")
    assert Scope(OWNER.namespace_id).covers(session)
    assert Scope(OWNER.namespace_id, session.session_id).covers(session)
    assert not Scope(OWNER.namespace_id, session.session_id).covers(OWNER)
    assert not Scope(OTHER.namespace_id).covers(session)
