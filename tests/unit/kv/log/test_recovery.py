"""Opening a log: empty, foreign, damaged, newer, half made, killed."""

import pytest
from tests.support.logs import (
    ERASURE,
    SEGMENT,
    World,
    key_of,
    opened,
    read,
    read_all,
    record,
    small_settings,
)
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Lifetime, Owner, Reason
from isthmus.contracts.errors import InvalidInput, StoreCorrupt, StoreFormat
from isthmus.state.kv.log.erasure import Scope
from isthmus.state.kv.log.format import SECTOR, SUPERBLOCKS, Geometry, Superblock, align
from isthmus.state.kv.log.segments import State

UUID = bytes(range(16))


def image_of(world: World) -> bytearray:
    world.settle()
    return bytearray(world.disk.view)


def changed(image: bytearray, offset: int, data: bytes) -> bytes:
    copy = bytearray(image)
    copy[offset : offset + len(data)] = data
    return bytes(copy)


@pytest.fixture
def world() -> World:
    made = World()
    made.put(*[record(key_of(number), 2000, lifetime=Lifetime(number % 3)) for number in range(30)])
    made.settle()
    return made


def keys(log: object) -> set[bytes]:
    return {entry.key for entry in log.scan()}  # type: ignore[attr-defined]


def test_what_was_written_is_found_again(world: World) -> None:
    again = opened(SimDisk(image=bytes(image_of(world))), world.settings)
    assert keys(again) == set(world.kept)
    assert again.sequence == again.durable == 30
    stats = again.stats()
    assert (stats.records, stats.used) == (30, world.log.stats().used)
    assert again.used_by(b"A" * 16) == world.log.used_by(b"A" * 16)
    found = read_all(again, [kept.record for kept in world.kept.values()])
    assert all(outcome.reason is Reason.HIT for outcome, _ in found.values())


def test_an_open_segment_takes_more_after_a_crash(world: World) -> None:
    again = opened(SimDisk(image=bytes(image_of(world))), world.settings)
    used = sum(world.log.stats().classes.values())
    more = [record(key_of(100 + number), 500, lifetime=Lifetime(number % 3)) for number in range(6)]
    assert {outcome.reason for outcome in again.append(more, 1.0)} == {Reason.STORED}
    assert again.flush(1.0) == 36
    assert sum(again.stats().classes.values()) == used
    third = opened(SimDisk(image=bytes(again_disk(again).durable)), world.settings)
    assert keys(third) == set(world.kept) | {one.key for one in more}


def again_disk(log: object) -> SimDisk:
    disk = log._driver._committer._disk  # type: ignore[attr-defined]
    assert isinstance(disk, SimDisk)
    return disk


def test_a_disk_that_holds_something_else_is_left_alone() -> None:
    settings = small_settings()
    image = changed(bytearray(settings.capacity), 0, b"somebody else's")
    disk = SimDisk(image=image)
    with pytest.raises(StoreCorrupt):
        opened(disk, settings)
    assert disk.view == image
    assert disk.calls["write"] == 0


def test_a_newer_format_is_left_alone(world: World) -> None:
    image = image_of(world)
    geometry = world.log._ledger.geometry
    for offset in SUPERBLOCKS:
        newer = changed(image, offset, Superblock(9, UUID, geometry, 0.0, 2, 2).encode())
        disk = SimDisk(image=newer)
        with pytest.raises(StoreFormat):
            opened(disk, world.settings)
        assert disk.view == newer


@pytest.mark.parametrize("offset", SUPERBLOCKS)
@pytest.mark.parametrize("damage", [b"\0" * SECTOR, b"\xff" * 40])
def test_one_damaged_superblock_is_mended(world: World, offset: int, damage: bytes) -> None:
    disk = SimDisk(image=changed(image_of(world), offset, damage))
    assert keys(opened(disk, world.settings)) == set(world.kept)
    for copy in SUPERBLOCKS:
        assert Superblock.decode(bytes(disk.durable[copy : copy + SECTOR])) is not None


def test_two_damaged_superblocks_are_an_error(world: World) -> None:
    image = changed(image_of(world), 0, b"\xff" * 2 * SECTOR)
    with pytest.raises(StoreCorrupt):
        opened(SimDisk(image=image), world.settings)


def test_a_damaged_erasure_table_is_mended_and_two_are_an_error(world: World) -> None:
    world.put(record(key_of(99), owner=Owner(b"Z" * 16)))
    world.forget(Scope.of(b"Z" * 16))
    image = image_of(world)
    for copy in (0, 1):
        disk = SimDisk(image=changed(image, 8192 + copy * ERASURE, b"\xff" * 100))
        log = opened(disk, world.settings)
        assert key_of(99) not in keys(log)
        assert [entry.scope for entry in log.erasures] == [Scope.of(b"Z" * 16)]
        first, second = (bytes(disk.durable[at : at + ERASURE]) for at in (8192, 8192 + ERASURE))
        assert first == second
    with pytest.raises(StoreCorrupt):
        opened(SimDisk(image=changed(image, 8192, b"\xff" * 2 * ERASURE)), world.settings)


def test_a_disk_that_is_smaller_than_its_log_is_an_error(world: World) -> None:
    with pytest.raises(StoreCorrupt):
        opened(SimDisk(image=bytes(image_of(world)[:-SEGMENT])), world.settings)


def test_settings_that_do_not_fit_the_log_are_refused(world: World) -> None:
    settings = small_settings(12, segment_bytes=4 * SEGMENT, extent_bytes=SEGMENT, staging_bytes=8 * SEGMENT,
                              capacity=8192 + 2 * ERASURE + 48 * SEGMENT)  # fmt: skip
    with pytest.raises(InvalidInput) as raised:
        opened(SimDisk(image=bytes(image_of(world))), settings)
    assert raised.value.field == "extent_bytes"
    with pytest.raises(InvalidInput):
        opened(SimDisk(capacity=4 * SEGMENT), small_settings())


def test_the_layout_on_the_disk_counts_not_the_settings(world: World) -> None:
    other = small_settings(40, extent_bytes=align(SEGMENT // 4), staging_bytes=4 * SEGMENT)
    log = opened(SimDisk(image=bytes(image_of(world))), other)
    assert keys(log) == set(world.kept)
    assert log.stats().capacity == 12 * SEGMENT


def test_a_crash_while_a_log_is_made_leaves_an_empty_disk_or_a_log() -> None:
    settings = small_settings()
    seen = set()
    for nth in range(1, 30):
        disk = SimDisk(capacity=settings.capacity, seed=nth)
        images: list[bytes] = []

        def on_call(kind: str, disk: SimDisk = disk, nth: int = nth, images: list[bytes] = images) -> None:
            if sum(disk.calls.values()) == nth:
                images.extend(disk.image(seed) for seed in range(4))

        disk.on_call = on_call
        opened(disk, settings)
        for image in images:
            log = opened(SimDisk(image=image), settings)
            one = record(key_of(1))
            log.append([one], 1.0)
            log.flush(1.0)
            assert read(log, one)[0].reason is Reason.HIT
            seen.add(any(image[: 2 * SECTOR]))
    assert seen == {True, False}


def test_a_segment_whose_header_is_lost_keeps_its_records_and_is_used_again(world: World) -> None:
    image = image_of(world)
    start = Geometry.fitting(world.settings.capacity, SEGMENT, ERASURE).start
    states = {segment.index: segment.state for segment in world.log._ledger.segments.all}
    assert State.OPEN in states.values()
    assert State.FREE in states.values()
    # One of each state, the last one: a class's newest.
    for index in {state: index for index, state in states.items()}.values():
        disk = SimDisk(image=changed(image, start(index), b"\xff" * 100))
        log = opened(disk, world.settings)
        assert keys(log) == set(world.kept)
        for number in range(250):
            assert log.append([record(key_of(1000 + number), 2500)], 1.0)[0].reason is Reason.STORED
        log.flush(1.0)
        log.check()
        again = opened(SimDisk(image=bytes(disk.durable)), world.settings)
        live = {entry.key for entry in log.scan()}
        # An evicted segment that was not written to yet may come back.
        assert keys(again) >= live


def test_sequences_go_on(world: World) -> None:
    again = opened(SimDisk(image=bytes(image_of(world))), world.settings)
    assert again.append([record(key_of(500))], 1.0)[0].sequence == 31


def test_what_was_found_is_synced_before_it_is_called_durable(world: World) -> None:
    """A killed process may have written what no sync covered: after the opening it must survive a power cut."""
    world.put(*[record(key_of(number), 2000) for number in range(40, 44)])
    world.run(0.1)
    assert world.log.durable < world.log.sequence
    disk = world.disk
    again = opened(disk, world.settings)
    assert again.durable == again.sequence == 34
    third = opened(SimDisk(image=bytes(disk.durable)), world.settings)
    assert keys(third) == keys(again) >= set(world.kept)
