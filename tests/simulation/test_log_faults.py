"""Every call that the segment log makes to the disk fails in turn: once, and from then on for good.

Whatever fails: nothing reads back wrong, nothing forgotten reads back, what `durable` covers survives a crash
afterwards, every call returns, and the books agree with themselves.
"""

import errno
import random
from contextlib import suppress

import pytest
from tests.support.logs import World, opened, read_all, workload
from tests.support.scale import examples
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Reason
from isthmus.contracts.errors import Overloaded, StoreError
from isthmus.state.kv.log.ledger import SLOT_BITS

OPERATIONS = 30
KINDS = ("read", "write", "sync", "zero", "channel")


def check_live(world: World) -> None:
    """What can be read now is right."""
    world.log.check()
    for key, (outcome, data) in read_all(world.log, [kept.record for kept in world.kept.values()]).items():
        kept = world.kept[key]
        if outcome.reason is Reason.HIT:
            assert data == bytes(kept.record.payload)
            assert not kept.forgotten
            assert not world.in_doubt(kept)


def check_crashed(world: World, seed: int) -> None:
    """What was durable is there after a crash."""
    ledger, log = world.log._ledger, world.log
    image = world.disk.image(seed)
    again = opened(SimDisk(image=image), world.settings)
    found = read_all(again, [kept.record for kept in world.kept.values()])
    for key, kept in world.kept.items():
        outcome, data = found[key]
        located = bool(ledger.index.candidates(key))
        if outcome.reason is Reason.HIT:
            assert data == bytes(kept.record.payload)
            assert not kept.forgotten
        else:
            gone = kept.forgotten or world.in_doubt(kept)
            durable = kept.sequence <= log.durable and located and not gone
            assert not durable, f"{key.hex()[:8]} was durable, and is {outcome.reason}"
    again.close()


def run(seed: int, kind: str, nth: int, error: int, *, forever: bool) -> World:
    world = World(seed, segments=9)
    world.faulty = True
    start = world.disk.calls[kind]

    def on_call(called: str) -> None:
        if forever and called == kind and world.disk.calls[kind] - start + 1 == nth:
            world.disk.fail_always(kind, error)

    world.disk.on_call = on_call
    world.disk.fail(kind, nth, error)
    with suppress(Overloaded):
        workload(world, seed, OPERATIONS)
    world.log.flush(0.5)
    world.disk.on_call = None
    for image in range(examples(1, 4)):
        check_crashed(world, nth * 10 + image)
    world.disk.heal()
    check_live(world)
    return world


def calls_of(seed: int, kind: str) -> int:
    world = World(seed, segments=9)
    start = world.disk.calls[kind]
    workload(world, seed, OPERATIONS)
    world.log.flush(0.5)
    return world.disk.calls[kind] - start


@pytest.mark.timeout(examples(300, 36_000))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for good"])
def test_every_call_fails_in_turn(kind: str, forever: bool) -> None:
    for seed in range(3, 3 + examples(1, 20)):
        total = calls_of(seed, kind)
        assert total > 0 or kind in {"zero", "channel"}
        for nth in range(1, total + 1, examples(5, 1) if forever else 1):
            world = run(seed, kind, nth, random.Random(nth).choice((errno.EIO, errno.ENOSPC)), forever=forever)
            assert world.disk.failed
            world.disk.heal()


@pytest.mark.parametrize("kind", ["read", "write", "sync", "channel"])
def test_every_call_of_an_opening_fails_in_turn(kind: str) -> None:
    """Making a log, and opening one: it opens all the same, or says why not and leaves what is there as it was."""
    world = World(3)
    workload(world, 3, 30)
    world.settle()
    image = bytes(world.disk.view)
    for source in (bytes(len(image)), image):
        nth = 0
        while True:
            nth += 1
            disk = SimDisk(image=source)
            disk.fail(kind, nth)
            log = None
            with suppress(StoreError):
                log = opened(disk, world.settings)
            if not disk.failed:
                break
            if log is not None:
                for key, (outcome, data) in read_all(log, [kept.record for kept in world.kept.values()]).items():
                    assert outcome.reason is not Reason.HIT or data == bytes(world.kept[key].record.payload)
                log.close()
            if source is image:
                check_reopened(world, disk)
        assert nth > 1 or kind == "write"


def check_reopened(world: World, disk: SimDisk) -> None:
    """After the failed opening, a good one finds everything."""
    again = opened(SimDisk(image=bytes(disk.view)), world.settings)
    found = read_all(again, [kept.record for kept in world.kept.values()])
    for key, kept in world.kept.items():
        if not kept.forgotten and any(True for at in world.log._ledger.index.candidates(key) if at >> SLOT_BITS >= 0):
            assert found[key][0].reason is Reason.HIT
    again.close()
