"""After a crash at any moment the log not only holds what it must: it goes on taking records in, and making them
durable, however full it was. A log that waits for room that it alone could make would lose nothing and serve nobody.
"""

import random

import pytest
from tests.support.logs import NAMESPACES, World, key_of, opened, read_all, record, workload
from tests.support.scale import examples
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Lifetime, Owner, Reason
from isthmus.state.kv.log.segments import State


class Reopener:
    """At some calls: opens what is on the disk now, and has it take in more than it has room for."""

    def __init__(self, world: World, seed: int, stride: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.stride = stride
        self.opened = 0
        self.crammed = 0
        self.busy = False

    def on_call(self, kind: str) -> None:
        full = not self.world.log._ledger.segments.count(State.FREE)
        if self.busy or kind == "read" or (not full and self.random.randrange(self.stride)):
            return
        self.busy = True
        self.check()
        self.busy = False

    def check(self) -> None:
        log = opened(SimDisk(image=bytes(self.world.disk.view)), self.world.settings)
        self.opened += 1
        self.crammed += not log._ledger.segments.count(State.FREE)
        # What was read is to outlive the segment it lies in: making room takes room.
        read_all(log, [kept.record for kept in self.world.kept.values()])
        for number in range(24):
            lifetime = self.random.choice(list(Lifetime))
            owner = Owner(self.random.choice(NAMESPACES))
            one = record(key_of(self.random.getrandbits(40)), 9000, owner=owner, lifetime=lifetime)
            (outcome,) = log.append([one], 20.0)
            assert outcome.reason is Reason.STORED, f"record {number}: {outcome.reason}"
        last = log.sequence
        assert log.flush(20.0) >= last, "and they become durable"
        log.check()
        log.close()


@pytest.mark.parametrize("seed", range(examples(3, 60)))
def test_a_log_that_was_full_when_it_crashed_goes_on(seed: int) -> None:
    world = World(seed, segments=8)
    reopener = Reopener(world, seed, 40)
    world.disk.on_call = reopener.on_call
    workload(world, seed, 60)
    assert reopener.opened
