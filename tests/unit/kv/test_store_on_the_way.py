"""Records on their way to the log: from their write on they are found, in DRAM or in the log, whatever needs room."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from tests.support.stores import OWNER, SOON, holds, key_of, put_of, read_one, reasons, store_all, with_log

from isthmus.contracts.blocks import Lifetime, Reason, RecordKind, Shape, Tier
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.settings import StoreSettings
from isthmus.state.kv.store import Store, open_store

WITHIN_S = 30.0
ROOM = 5
SETTINGS = StoreSettings(arena_bytes=16 * 4096, region_bytes=16 * 4096, disk_backend="threads")
"""An arena for five records of three pages, and one page more."""


class GatedCalls(Calls):
    """Writes wait for `gate`, syncs for `syncs`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.syncs = threading.Event(), threading.Event()
        self.gate.set()
        self.syncs.set()

    def fdatasync(self, fd: int) -> None:
        assert self.syncs.wait(WITHIN_S)
        super().fdatasync(fd)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert self.gate.wait(WITHIN_S)
        return super().pwritev(fd, buffers, offset)


class Site:
    """A store whose log's writes can be stopped."""

    def __init__(self, folder: Path, settings: StoreSettings) -> None:
        self.calls = GatedCalls()
        self.store: Store = open_store(with_log(folder, settings), SystemClock(), SystemEntropy(), calls=self.calls)
        self.awaited = threading.Event()
        log = self.store._parts.log
        assert log is not None
        self.log: SegmentLog = log
        awaiting = log.await_findable

        def await_findable(sequence: int, timeout_s: float) -> bool:
            self.awaited.set()
            return awaiting(sequence, timeout_s)

        log.await_findable = await_findable  # type: ignore[method-assign]
        # A segment to write to, so that what is stopped is the records' own writes.
        store_all(self.store, ["first"])
        self.settle()

    def settle(self) -> None:
        assert self.store.flush(SOON) >= self.log.sequence
        self.store.admin.evict(Tier.DRAM, 1 << 30, SOON)
        assert not len(self.store.arena)
        self.awaited.clear()

    def tiers(self, names: Sequence[object]) -> list[Tier | None]:
        return [one.tier for one in self.store.match([key_of(name) for name in names])]

    @contextmanager
    def aside(self, work: object, *values: object) -> Iterator[list[object]]:
        """`work` is done by another thread, up to where it waits for the log; the writes go on at the end."""
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.append(work(*values)))  # type: ignore[operator]
        thread.start()
        assert self.awaited.wait(WITHIN_S)
        yield found
        self.calls.gate.set()
        thread.join(WITHIN_S)
        assert found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path, SETTINGS)
    yield made
    made.calls.gate.set()
    made.calls.syncs.set()
    made.store._parts.dram.check()
    made.store.close()


NAMES = list(range(ROOM))


def test_room_is_made_of_them_when_the_log_finds_them(site: Site) -> None:
    site.calls.gate.clear()
    assert reasons(store_all(site.store, NAMES)) == [Reason.STORED] * ROOM
    with site.aside(store_all, site.store, ["one more"]) as outcomes:
        assert site.tiers(NAMES) == [Tier.DRAM] * ROOM
        assert all(holds(site.store, name) for name in NAMES)
    assert reasons(outcomes[0]) == [Reason.STORED]  # type: ignore[arg-type]
    assert None not in site.tiers([*NAMES, "one more"])
    assert all(holds(site.store, name) for name in [*NAMES, "one more"])
    assert "evict_dram_unwritten" not in site.store.stats().counts


def test_room_in_one_piece_is_made_of_them_when_the_log_finds_them(site: Site) -> None:
    """Every other page is free, and between them there is nothing else."""
    page, dram = Shape(RecordKind.STATE, 1, 4096), site.store._parts.dram

    def drop(names: Sequence[object]) -> None:
        with dram._lock:
            for name in names:
                record = dram.arena.find(key_of(name))
                assert record is not None
                dram._remove(record)

    old, new = range(100, 116), range(200, 208)
    store_all(site.store, old, shape=page)
    assert site.store.flush(SOON) >= site.log.sequence
    drop(old[::2])
    site.calls.gate.clear()
    store_all(site.store, new, shape=page)
    drop(old[1::2])
    assert site.store.arena.used == 8 * 4096
    with site.aside(store_all, site.store, ["large"]) as outcomes:
        assert site.tiers(new) == [Tier.DRAM] * 8
    assert reasons(outcomes[0]) == [Reason.STORED]  # type: ignore[arg-type]
    assert site.store.stats().counts["evict_dram_moved_over"] >= 1
    assert all(holds(site.store, name, page) for name in [*old, *new])


def test_a_quota_is_kept_by_them_when_the_log_finds_them(tmp_path: Path) -> None:
    site = Site(tmp_path, msgspec.structs.replace(SETTINGS, tenant_bytes=3 * 12288))
    site.calls.gate.clear()
    store_all(site.store, NAMES[:3], owner=OWNER)
    with site.aside(store_all, site.store, ["one more"]) as outcomes:
        assert site.tiers(NAMES[:3]) == [Tier.DRAM] * 3
    assert reasons(outcomes[0]) == [Reason.STORED]  # type: ignore[arg-type]
    assert all(holds(site.store, name) for name in [*NAMES[:3], "one more"])
    site.store.close()


@pytest.mark.parametrize("durable", [True, False])
def test_others_go_first(site: Site, durable: bool) -> None:
    if not durable:
        site.calls.syncs.clear()
    sequence = store_all(site.store, NAMES[:3])[-1].sequence
    assert site.log.await_findable(sequence, WITHIN_S)
    site.awaited.clear()
    if durable:
        assert site.store.flush(SOON) >= sequence
    site.calls.gate.clear()
    store_all(site.store, NAMES[3:], lifetime=Lifetime.SHORT)  # which would go before them, but for that
    for name in range(100, 103):
        assert reasons(site.store.write([put_of(name)], SOON)) == [Reason.STORED]
    assert not site.awaited.is_set()
    assert site.tiers(NAMES) == [Tier.NVME] * 3 + [Tier.DRAM] * 2


def test_a_disk_that_never_writes_is_not_waited_for_longer_than_a_call_may_take(site: Site) -> None:
    site.calls.gate.clear()
    store_all(site.store, NAMES)
    (outcome,) = site.store.write([put_of("one more")], 0.05)
    assert outcome.reason is Reason.STORED
    assert site.awaited.is_set()
    assert site.store.stats().counts["evict_dram_unwritten"] >= 1
    assert site.tiers(NAMES).count(None) >= 1
    site.calls.gate.set()
    assert site.store.flush(SOON) >= site.log.sequence
    assert all(holds(site.store, name) for name in NAMES)


def test_a_disk_that_cannot_be_written_to_any_more_is_not_waited_for(site: Site) -> None:
    site.calls.gate.clear()
    store_all(site.store, NAMES)
    with site.log._changed:
        site.log._ledger.refuse("as when writes have failed too often")
    assert reasons(store_all(site.store, ["one more"])) == [Reason.STORED]
    assert site.store.stats().counts["evict_dram_unwritten"] >= 1


def test_who_is_asked_to_empty_dram_waits_for_the_log(site: Site) -> None:
    site.calls.gate.clear()
    store_all(site.store, NAMES)
    assert site.store.admin.evict(Tier.DRAM, 1 << 20, 0.01) == 0
    site.awaited.clear()
    with site.aside(site.store.admin.evict, Tier.DRAM, 1 << 20, WITHIN_S) as freed:
        assert site.tiers(NAMES) == [Tier.DRAM] * ROOM
    assert freed == [ROOM * 12288]
    assert site.tiers(NAMES) == [Tier.NVME] * ROOM


def test_damage_in_dram_waits_for_the_copy_in_the_log(site: Site) -> None:
    site.calls.gate.clear()
    store_all(site.store, ["x"])
    (record,) = site.store._parts.dram.where([key_of("x")])
    assert record is not None
    site.store.arena.view(record)[99] ^= 1
    with site.aside(read_one, site.store, "x") as found:
        pass
    ((outcome, _),) = found  # type: ignore[misc]
    assert (outcome.reason, outcome.tier) == (Reason.HIT, Tier.NVME)
