"""Forgetting: dead at once, off the disk soon, and never back."""

import errno
import itertools

import pytest
from tests.support.logs import NAMESPACES, SESSIONS, World, key_of, opened, payload_of, read, read_all, record
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Lifetime, Owner, Reason, Want
from isthmus.contracts.errors import DiskFailed, Overloaded
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.log import forgetting, scrub
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.drive import Stepped
from isthmus.state.kv.log.erasure import ENTRY_BYTES, HEADER_BYTES, Scope
from isthmus.state.kv.log.records import LogRead
from isthmus.state.kv.log.segments import State

MINE, OTHER = Owner(NAMESPACES[0], SESSIONS[0]), Owner(NAMESPACES[1], SESSIONS[0])


def mixed(world: World, count: int = 40, first: int = 0) -> None:
    """Records of two tenants, side by side."""
    for number in range(first, first + count):
        owner = MINE if number % 3 else OTHER
        world.put(record(key_of(number), 700 + number, owner=owner, lifetime=Lifetime(number % 2)))


def traces(world: World, owner: Owner, image: bytes) -> int:
    """How many records of an owner have left a piece of their payload, or their key, on a disk."""
    found = 0
    for kept in world.kept.values():
        if kept.record.owner == owner:
            data = payload_of(kept.record.key, kept.record.shape.record_bytes)
            pieces = [data[at : at + 32] for at in (0, len(data) // 2, len(data) - 32)]
            found += any(piece in image for piece in (kept.record.key, *pieces))
    return found


def test_a_session_a_tenant_a_key() -> None:
    world = World()
    for number, (namespace, session) in enumerate(itertools.product(NAMESPACES, (*SESSIONS, bytes(16)))):
        world.put(record(key_of(number), owner=Owner(namespace, session)))
    world.settle()
    assert world.forget(Scope.of(NAMESPACES[0], SESSIONS[1])) == 1
    assert world.forget(Scope.of(NAMESPACES[1])) == 2
    assert world.forget(Scope.of_key(key_of(11))) == 3
    for key, (outcome, _) in read_all(world.log, [kept.record for kept in world.kept.values()]).items():
        assert (outcome.reason is Reason.HIT) != world.kept[key].forgotten
    assert sum(kept.forgotten for kept in world.kept.values()) == 1 + 4 + 1
    assert [entry.number for entry in world.log.erasures] == [1, 2, 3]


def test_it_is_dead_at_once_wherever_it_is() -> None:
    world = World()
    mixed(world, 20)
    world.settle()
    held = world.log.locate([key_of(1)])[0]
    mixed(world, 6, 20)  # on its way to the disk
    world.forget(Scope.of(MINE.namespace_id))
    for number in range(26):
        one = world.kept[key_of(number)].record
        if one.owner == MINE:
            assert world.log.locate([one.key]) == [None]
    world.settle()
    world.run(0.1)
    assert {world.kept[entry.key].record.owner for entry in world.log.scan()} == {OTHER}
    # A location that somebody still has.
    assert held is not None
    one = world.kept[key_of(1)].record
    into = memoryview(bytearray(one.shape.record_bytes))
    outcome = world.log.read([LogRead(held, Want(BlockKey(one.key), one.shape, into))], 1.0)[0]
    assert outcome.reason in {Reason.FORGOTTEN, Reason.CORRUPT, Reason.ABSENT}


def test_a_read_that_holds_a_location_is_refused_by_the_stamp() -> None:
    world = World()
    one = record(key_of(1), owner=MINE)
    world.put(one)
    world.settle()
    where = world.log.locate([one.key])[0]
    assert where is not None
    # The books only: nothing scrubbed, the index still has it.
    world.log._ledger.erasures = world.log._ledger.erasures.forget(Scope.of(MINE.namespace_id), 4096)
    assert read(world.log, one)[0].reason is Reason.FORGOTTEN


def test_what_is_stored_afterwards_lives() -> None:
    world = World()
    mixed(world)
    world.forget(Scope.of(MINE.namespace_id))
    world.put(record(key_of(1), 701, owner=MINE))
    world.settle()
    world.run(3.0)
    assert read(world.log, world.kept[key_of(1)].record)[0].reason is Reason.HIT
    again = opened(SimDisk(image=bytes(world.disk.durable)), world.settings)
    assert read(again, world.kept[key_of(1)].record)[0].reason is Reason.HIT
    assert read(again, world.kept[key_of(4)].record)[0].reason is Reason.ABSENT


@pytest.mark.parametrize("wrapped", [False, True], ids=["fresh", "old generations below"])
def test_no_byte_of_it_is_left_on_the_disk(wrapped: bool) -> None:
    world = World(segments=9)
    if wrapped:
        for number in range(600):
            world.put(record(key_of(10_000 + number), 2500, owner=MINE if number % 2 else OTHER))
    mixed(world, 60)
    world.settle()
    assert traces(world, MINE, bytes(world.disk.durable)) > 20
    kept = {entry.key for entry in world.log.scan() if entry.owner == OTHER}
    world.forget(Scope.of(MINE.namespace_id))
    world.run(5.0)
    assert world.log.stats().erasures_pending == 0
    for seed in range(2):
        assert traces(world, MINE, world.disk.image(seed)) == 0
    assert MINE.namespace_id not in bytes(world.disk.durable)[8192 + 2 * 4096 :]
    found = read_all(world.log, [world.kept[key].record for key in kept])
    assert all(outcome.reason is Reason.HIT for outcome, _ in found.values())
    again = opened(SimDisk(image=bytes(world.disk.durable)), world.settings)
    assert {entry.key for entry in again.scan()} >= kept
    assert again.used_by(MINE.namespace_id) == world.log.used_by(MINE.namespace_id) == 0


def test_a_scrub_goes_on_after_a_crash() -> None:
    """Stopped after each of its calls in turn: the next opening finishes it, and no neighbour is lost."""
    world = World(segments=9)
    mixed(world, 60)
    world.settle()
    world.forget(Scope.of(MINE.namespace_id))
    others = {kept.record.key for kept in world.kept.values() if kept.record.owner == OTHER}
    images: list[bytes] = []
    world.disk.on_call = lambda kind: images.append(world.disk.image(len(images))) if kind != "read" else None
    world.run(5.0)
    world.disk.on_call = None
    assert len(images) > 15
    for image in images[::3]:
        half = World(segments=9)
        half.disk = SimDisk(image=image)
        half.log = opened(half.disk, half.settings, half.clock)
        assert {entry.key for entry in half.log.scan()} == others
        half.run(5.0)
        assert half.log.stats().erasures_pending == 0
        assert traces(world, MINE, bytes(half.disk.durable)) == 0
        found = read_all(half.log, [world.kept[key].record for key in others])
        assert all(outcome.reason is Reason.HIT for outcome, _ in found.values())


def test_a_scrub_makes_a_footer_without_the_dead() -> None:
    world = World(segments=9)
    mixed(world, 100)
    world.settle()
    world.run(1.0)  # sealing comes after
    assert world.log.stats().segments["sealed"] >= 1
    world.forget(Scope.of(MINE.namespace_id))
    world.run(5.0)
    again = opened(SimDisk(image=bytes(world.disk.durable)), world.settings)
    for segment in again._ledger.segments.having(State.SEALED):
        assert set(segment.usage) <= {OTHER.namespace_id}


def test_survivors_keep_their_stamp() -> None:
    world = World(segments=8)
    hot = record(key_of(0), owner=MINE)
    world.put(hot)
    world.settle()
    read(world.log, hot)
    world.forget(Scope.of(OTHER.namespace_id))  # the epoch moves on
    for number in range(1, 300):
        world.put(record(key_of(number), 3000, owner=OTHER))
        read(world.log, hot)
    assert world.log.stats().counts["survivors"] >= 1
    entry = world.log.describe([hot.key])[0]
    assert entry is not None
    assert entry.sequence > 1
    where = world.log.locate([hot.key])[0]
    assert where is not None
    directory = world.log._auditor._directories.of(world.log._ledger.segments[where.segment])
    assert directory is not None
    row = next(row for row in directory if row["key"].tobytes() == hot.key)
    assert row["stamp"] == 0
    world.forget(Scope.of(MINE.namespace_id))
    assert read(world.log, hot)[0].reason is Reason.ABSENT


def test_a_forget_that_cannot_be_made_durable_says_so() -> None:
    world = World()
    mixed(world)
    world.settle()
    world.disk.fail("sync", 1)
    with pytest.raises(DiskFailed):
        world.log.forget(Scope.of(MINE.namespace_id))
    # In force all the same, and asked for again it is durable.
    assert read(world.log, world.kept[key_of(1)].record)[0].reason is not Reason.HIT
    assert world.forget(Scope.of(MINE.namespace_id)) == 2
    for seed in range(10):
        again = opened(SimDisk(image=world.disk.image(seed)), world.settings)
        assert {entry.owner for entry in again.scan()} == {OTHER}


def refused(*_: object) -> int:
    raise DiskFailed("write", errno.EIO)


def test_what_was_refused_is_left_alone_until_it_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrubbed before, its records would be damaged after a restart, which knows of no erasure."""
    world = World()
    mixed(world)
    world.settle()
    with monkeypatch.context() as failing:
        failing.setattr(forgetting, "write_erasures", refused)
        with pytest.raises(DiskFailed):
            world.log.forget(Scope.of(MINE.namespace_id))
        world.run(3 * forgetting.RETRY_S)
        again = opened(SimDisk(image=world.disk.image(0)), world.settings)
        found = read_all(again, [kept.record for kept in world.kept.values()])
        assert {outcome.reason for outcome, _ in found.values()} == {Reason.HIT}
    world.run(2 * forgetting.RETRY_S)  # and is durable without having been asked for again
    assert world.log.stats().erasures_pending == 0
    assert traces(world, MINE, bytes(world.disk.durable)) == 0
    assert {entry.owner for entry in opened(SimDisk(image=world.disk.image(0)), world.settings).scan()} == {OTHER}


def test_too_many_at_once_are_refused() -> None:
    world = World()
    for number in range((4096 - HEADER_BYTES) // ENTRY_BYTES):
        world.log.forget(Scope.of_key(key_of(number)))
    with pytest.raises(Overloaded):
        world.log.forget(Scope.of_key(key_of(300)))
    world.run(5.0)
    assert world.log.stats().erasures_pending == 0
    world.log.forget(Scope.of_key(key_of(500)))


def test_a_segment_that_is_sealed_while_it_is_scrubbed_keeps_every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    mixed(world, 6)
    world.settle()
    driver, plain, states = world.log._driver, scrub.zero_bytes, []
    assert isinstance(driver, Stepped)

    def meanwhile(control: Control, offset: int, length: int) -> int:
        """The threads that write and commit are not the one that scrubs."""
        ledger = world.log._ledger
        segment = next(one for one in ledger.segments.all if ledger.geometry.start(one.index + 1) > offset)
        if not states:
            states.append(segment.state)
            for number in range(100, 180):
                world.put(record(key_of(number), 1500, owner=OTHER, lifetime=Lifetime(number % 2)), timeout_s=0.0)
                for _ in range(4):
                    driver._writer.step(world.clock.monotonic())
                    driver._committer.commit()
                world.clock.advance(0.05)
            states.append(segment.state)
        return plain(control, offset, length)

    monkeypatch.setattr(scrub, "zero_bytes", meanwhile)
    world.forget(Scope.of(MINE.namespace_id))
    for _ in range(2):  # what happens meanwhile takes time, too
        world.run(1.0)
    world.settle()
    assert states == [State.OPEN, State.SEALED]
    assert not world.log._ledger.erasures.pending
    assert not traces(world, MINE, bytes(world.disk.view))
    for log in (world.log, world.reopened()):
        alive = [kept for kept in world.kept.values() if kept.record.owner == OTHER]
        assert len(alive) > 50
        for key, (outcome, _) in read_all(log, [kept.record for kept in alive]).items():
            assert outcome.reason is Reason.HIT, world.kept[key]
        assert {world.kept[entry.key].record.owner for entry in log.scan()} == {OTHER}
