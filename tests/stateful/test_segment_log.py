"""A Hypothesis state machine of the segment log, against a dictionary: appends, reads, pins, erasures, evictions, syncs
that fail, crashes, recoveries.

Promises: a hit is byte for byte what was put; what is pinned and found stays; what was forgotten stays away, over every
crash; what was durable is there after one; the books agree. Release figure (`make chaos`): 1,000 examples of 50 steps.
"""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.logs import NAMESPACES, SESSIONS, Kept, World, covers, key_of, opened, read, record
from tests.support.scale import examples
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Lifetime, Owner, Reason
from isthmus.state.kv.log.erasure import Scope
from isthmus.state.kv.log.records import Location

OWNERS = [Owner(namespace, session) for namespace in NAMESPACES[:2] for session in (*SESSIONS[:2], bytes(16))]


class LogMachine(RuleBasedStateMachine):
    """One log after another on one disk."""

    @initialize(seed=st.integers(0, 1 << 30))
    def start(self, seed: int) -> None:
        self.world = World(seed, segments=8)
        self.fresh = 0
        self.pinned: list[tuple[Location, bytes]] = []

    @rule(
        sizes=st.lists(st.sampled_from([60, 900, 4000, 12_000]), min_size=1, max_size=8),
        owner=st.sampled_from(OWNERS),
        lifetime=st.sampled_from(list(Lifetime)),
    )
    def append(self, sizes: list[int], owner: Owner, lifetime: Lifetime) -> None:
        batch = []
        for size in sizes:
            self.fresh += 1
            batch.append(record(key_of(self.fresh), size, owner=owner, lifetime=lifetime))
        for outcome in self.world.put(*batch):
            assert outcome.reason in {Reason.STORED, Reason.FULL}

    @precondition(lambda self: self.world.kept)
    @rule(data=st.data())
    def put_again(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.kept)))
        self.world.put(self.world.kept[key].record)

    @precondition(lambda self: self.world.kept)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        for key in data.draw(st.lists(st.sampled_from(sorted(self.world.kept)), min_size=1, max_size=4)):
            self.check(self.world.kept[key])

    def check(self, kept: Kept) -> bool:
        outcome, data = read(self.world.log, kept.record)
        if outcome.reason is Reason.HIT:
            assert data == bytes(kept.record.payload)
            assert not kept.forgotten
            return True
        assert outcome.reason is Reason.ABSENT
        return False

    @precondition(lambda self: self.world.kept)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.kept)))
        (where,) = self.world.log.hold([key])
        if where is not None and len(self.pinned) < 2:
            self.pinned.append((where, key))
        elif where is not None:
            self.world.log.unpin(where)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        where, key = self.pinned.pop()
        assert self.check(self.world.kept[key]) or self.world.kept[key].forgotten
        self.world.log.unpin(where)

    @rule(owner=st.sampled_from(OWNERS), whole=st.booleans())
    def forget(self, owner: Owner, whole: bool) -> None:
        scope = Scope.of(owner.namespace_id) if whole else Scope.of(owner.namespace_id, owner.session_id)
        self.world.forget(scope)
        for kept in self.world.kept.values():
            if covers(scope, kept.record):
                assert self.world.log.locate([kept.record.key]) == [None]

    @rule()
    def flush(self) -> None:
        # Survivors of a segment that is evicted meanwhile get numbers of their own.
        before = self.world.log.sequence
        assert self.world.log.flush(2.0) >= before

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0]))
    def wait(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule()
    def evict(self) -> None:
        self.world.log.evict(1, 0.2)

    @rule()
    def compact(self) -> None:
        self.world.log.compact(0.5)

    @rule()
    def a_sync_fails(self) -> None:
        """At most two in a row: what is written three times in vain is lost, which is another test's."""
        if self.world.log.stats().segments["retired"] < 2:
            self.world.disk.fail("sync", 1)
            self.world.run(1.0)
            self.world.disk.heal()

    @rule(seed=st.integers(0, 1 << 40))
    def crash(self, seed: int) -> None:
        world = self.world
        due = {
            key
            for key, kept in world.kept.items()
            if kept.sequence <= world.log.durable and not kept.forgotten and world.log.locate([key]) != [None]
        }
        world.disk = SimDisk(seed=seed, image=world.disk.image(seed))
        world.log = opened(world.disk, world.settings, world.clock)
        self.pinned = []
        found = {key for key, kept in world.kept.items() if self.check(kept)}
        assert due <= found
        # A sequence that was lost is given out again: what was not found again is as good as never put.
        chance = random.Random(seed)
        for key in list(world.kept):
            if key not in found and not world.kept[key].forgotten and chance.random() < 0.9:
                del world.kept[key]

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "world"):
            self.world.log.check()
            stats = self.world.log.stats()
            assert stats.pins == len(self.pinned)
            assert stats.durable <= stats.sequence
            assert not stats.read_only
            assert sum(stats.segments.values()) == 8
            live = sum(segment.live_records for segment in self.world.log._ledger.segments.all)
            assert live == stats.records


TestSegmentLog = pytest.mark.timeout(examples(300, 7200))(LogMachine.TestCase)
TestSegmentLog.settings = settings(
    max_examples=examples(25, 1000),
    stateful_step_count=examples(30, 50),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
