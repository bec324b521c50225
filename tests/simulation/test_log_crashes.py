"""Crashes of the segment log at every call that it makes to the disk, in many ways each.

One workload (appends, reads, flushes, erasures, evictions) runs on a simulated disk. At every call boundary the disk
crashes several times over: images of what could be on it then are opened, and must hold

- every record that was durable, can still be found and was not forgotten, byte for byte;
- nothing that reads back wrong, and nothing that was forgotten, whether its scrub was done, under way or not begun.
Release figure: `make chaos`.
"""

import random

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from tests.support.logs import World, opened, read_all, workload
from tests.support.scale import examples
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Reason
from isthmus.state.kv.log.ledger import SLOT_BITS
from isthmus.state.kv.log.segments import READABLE

IMAGES_A_CALL = examples(1, 20)


class Crasher:
    """Crashes the world's disk at every call, and checks what is found afterwards."""

    def __init__(self, world: World, seed: int, images: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.count = images
        self.images = 0
        self.hits = 0
        self.busy = False

    def on_call(self, kind: str) -> None:
        if self.busy or kind == "read":
            return
        self.busy = True
        for _ in range(self.count):
            self.check(self.random.getrandbits(48))
        self.busy = False

    def due(self) -> dict[bytes, bool]:
        """The records that may be asked for, and whether they must be there: durable, findable and not forgotten."""
        log = self.world.log
        ledger = log._ledger
        due = {}
        for key, kept in self.world.kept.items():
            found = any(ledger.segments[at >> SLOT_BITS].state in READABLE for at in ledger.index.candidates(key))
            gone = kept.forgotten or self.world.in_doubt(kept)
            due[key] = kept.sequence <= log.durable and found and not gone
        return due

    def check(self, seed: int) -> None:
        due = self.due()
        disk = SimDisk(seed=seed, image=self.world.disk.image(seed))
        log = opened(disk, self.world.settings)
        log.check()
        kept = self.world.kept
        read = read_all(log, [kept[key].record for key in due])
        for key, must in due.items():
            outcome, data = read[key]
            if outcome.reason is Reason.HIT:
                assert data == bytes(kept[key].record.payload), f"image {seed}: {key.hex()[:8]} reads back wrong"
                again = key in self.world.offered
                assert again or not kept[key].forgotten, f"image {seed}: {key.hex()[:8]} was forgotten"
                self.hits += 1
            else:
                assert not must, f"image {seed}: {key.hex()[:8]} was durable, and is {outcome.reason}"
        assert log.durable == log.sequence
        log.close()
        self.images += 1


def crash(seed: int, operations: int) -> Crasher:
    world = World(seed, segments=8 + seed % 5)
    crasher = Crasher(world, seed, IMAGES_A_CALL)
    world.disk.on_call = crasher.on_call
    workload(world, seed, operations)
    return crasher


@settings(
    max_examples=examples(2, 400),
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.integers(0, 1 << 32))
@example(0)
@example(3)
@example(1678183153)
@pytest.mark.timeout(examples(300, 36_000))
def test_what_was_durable_survives_and_what_was_forgotten_does_not(seed: int) -> None:
    crasher = crash(seed, 60)
    assert crasher.images > 30
    assert crasher.hits > crasher.images
