"""What is particular to each policy: against plain models of the papers, without a tree, and the queue of leaves."""

import random
from collections import OrderedDict, deque
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.contracts.blocks import HintKind, Lifetime
from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.retention.arc import AGAIN, ONCE, Arc
from isthmus.state.kv.retention.hints import HintLimits, Hints
from isthmus.state.kv.retention.leaf_first import LeafFirst
from isthmus.state.kv.retention.leaves import Leaves
from isthmus.state.kv.retention.order import Record
from isthmus.state.kv.retention.policies import NAMES, make
from isthmus.state.kv.retention.port import Entry
from isthmus.state.kv.retention.quotas import Quotas
from isthmus.state.kv.retention.s3fifo import S3Fifo


def free(_key: int) -> bool:
    return False


def zipf_with_scans(seed: int, length: int = 20_000, keys: int = 2000) -> list[int]:
    """Skewed accesses with a scan of new keys now and then."""
    rng = random.Random(seed)
    found: list[int] = []
    fresh = keys
    while len(found) < length:
        if rng.random() < 0.002:
            found += range(fresh, fresh + 150)
            fresh += 150
        found.append(int(keys * rng.random() ** 3))
    return found


def hits(retention: LeafFirst[int], accesses: list[int], capacity: int) -> list[bool]:
    """Which accesses to records of one byte hit; room is made before a record comes in."""
    here: set[int] = set()
    found = []
    for now, key in enumerate(accesses):
        found.append(key in here)
        if key in here:
            retention.touch((key,), now)
            continue
        if len(here) == capacity:
            (victim,) = retention.victims(1, now, free)
            retention.remove(victim)
            here.discard(victim)
        retention.insert(Entry(key, None, 1, "t"), now)
        here.add(key)
    retention.check()
    return found


def test_lru_is_lru() -> None:
    accesses, capacity = zipf_with_scans(1), 100
    cache: OrderedDict[int, None] = OrderedDict()
    expected = []
    for key in accesses:
        expected.append(key in cache)
        cache[key] = None
        cache.move_to_end(key)
        if len(cache) > capacity:
            cache.popitem(last=False)
    assert hits(make("lru", capacity), accesses, capacity) == expected


def plain_s3fifo(accesses: list[int], capacity: int) -> list[bool]:
    """The paper's Algorithm 1, in pages: small gives while it has its tenth."""
    small, main = deque[int](), deque[int]()
    ghosts: OrderedDict[int, None] = OrderedDict()
    uses: dict[int, int] = {}
    expected = []
    for key in accesses:
        expected.append(key in uses)
        if key in uses:
            uses[key] = min(3, uses[key] + 1)
            continue
        while len(uses) >= capacity:
            if len(small) >= capacity // 10 or not main:
                tail = small.popleft()
                if uses[tail] > 1:
                    uses[tail] = 0
                    main.append(tail)
                    continue
                ghosts[tail] = None
                if len(ghosts) > capacity - capacity // 10:
                    ghosts.popitem(last=False)
            else:
                tail = main.popleft()
                if uses[tail]:
                    uses[tail] -= 1
                    main.append(tail)
                    continue
            del uses[tail]
        uses[key] = 0
        if key in ghosts:
            del ghosts[key]
            main.append(key)
        else:
            small.append(key)
    return expected


def test_s3fifo_is_that_of_the_paper() -> None:
    accesses = zipf_with_scans(2)
    for capacity in (50, 200, 900):
        assert hits(make("s3fifo", capacity), accesses, capacity) == plain_s3fifo(accesses, capacity)


class PlainArc:
    """The paper's figure 4, in pages."""

    def __init__(self, capacity: int) -> None:
        self.c, self.p = capacity, 0.0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict[int, None]() for _ in range(4))

    def replace(self, in_b2: bool) -> None:
        if self.t1 and (len(self.t1) > self.p or (in_b2 and len(self.t1) == self.p)):
            self.b1[self.t1.popitem(last=False)[0]] = None
        else:
            self.b2[self.t2.popitem(last=False)[0]] = None

    def access(self, key: int) -> bool:
        if key in self.t1 or key in self.t2:
            self.t1.pop(key, None)
            self.t2[key] = None
            self.t2.move_to_end(key)
            return True
        if key in self.b1:
            self.p = min(self.c, self.p + max(1.0, len(self.b2) / len(self.b1)))
            self.replace(False)
            del self.b1[key]
            self.t2[key] = None
        elif key in self.b2:
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            self.replace(True)
            del self.b2[key]
            self.t2[key] = None
        else:
            if len(self.t1) + len(self.b1) == self.c:
                if len(self.t1) < self.c:
                    self.b1.popitem(last=False)
                    self.replace(False)
                else:
                    self.t1.popitem(last=False)
            elif (all_four := len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2)) >= self.c:
                if all_four == 2 * self.c:
                    self.b2.popitem(last=False)
                self.replace(False)
            self.t1[key] = None
        return False


@pytest.mark.parametrize("capacity", [50, 200, 900])
def test_arc_hits_as_often_as_that_of_the_paper(capacity: int) -> None:
    """Not at the same accesses: here the target moves after the eviction, in the paper before it."""
    accesses = zipf_with_scans(3)
    plain = PlainArc(capacity)
    expected = sum(plain.access(key) for key in accesses)
    assert sum(hits(make("arc", capacity), accesses, capacity)) == pytest.approx(expected, rel=0.01)


def test_arcs_target_follows_what_comes_back() -> None:
    records: dict[int, Record[int]] = {}
    arc = Arc(4, records, count(1))

    def come(key: int, size: int = 1) -> Record[int]:
        record = records[key] = Record(key, None, size, "t", Lifetime.SESSION, 0.0)
        arc.admit(record)
        return record

    def go(key: int) -> None:
        arc.leave(records.pop(key), evicted=True)

    assert come(1).band == ONCE
    go(1)
    assert come(1).band == AGAIN, "it came back: it was used twice"
    assert arc.target == 1.0
    come(2, 2)
    arc.used([records[2]], 0.0)
    go(2)
    assert come(2, 2).band == AGAIN
    assert arc.target == 0.0, "what was used often came back: less room for the rest, in steps of its bytes"
    come(3)
    arc.leave(records.pop(3), evicted=False)
    assert come(3).band == ONCE, "what was erased is not remembered"


@pytest.mark.parametrize("name", ["s3fifo", "arc"])
def test_a_scan_does_not_flush_what_is_used(name: str) -> None:
    retention: LeafFirst[int] = make(name, 100)
    accesses = [key for _ in range(5) for key in range(40)]
    accesses += range(1000, 3000)
    accesses += range(40)
    found = hits(retention, accesses, 100)
    assert sum(found[-40:]) >= 36
    assert not any(hits(make("lru", 100), accesses, 100)[-40:])


def test_s3fifo_moves_what_a_proved_leaf_stands_on() -> None:
    """Else small would be full of the prefixes of main, for good, and everything new would be thrown out at once."""
    retention: LeafFirst[int] = make("s3fifo", 20)
    for key in range(16):
        retention.insert(Entry(key, key - 1 if key else None, 1, "t"), 0.0)
    for _ in range(2):
        retention.touch(range(16), 1.0)
    for key in range(100, 104):
        retention.insert(Entry(key, None, 1, "t"), 2.0)
    assert retention.victims(1, 3.0, free) == [100], "the leaf that proved itself takes its prefix to main"
    gone: list[int] = []
    for key in range(200, 240):
        for victim in retention.victims(retention.used() - 19, 4.0, free):
            retention.remove(victim)
            gone.append(victim)
        retention.insert(Entry(key, None, 1, "t"), 4.0)
    retention.check()
    assert gone == [*range(100, 104), *range(200, 236)], "a scan takes turns in small, and only there"


@pytest.mark.parametrize("name", ["s3fifo", "arc"])
def test_ghosts_are_bounded_by_number_too(name: str) -> None:
    """Small records in a large tier: their bytes alone would let millions be remembered."""
    retention: LeafFirst[int] = make(name, 1 << 40)
    for key in range(3000):
        retention.insert(Entry(key, None, 1, "t"), 0.0)
        if key >= 10:
            retention.remove(retention.victims(1, 0.0, free)[0])
    retention.check()
    order = retention._order
    ghosts = [order._ghosts] if isinstance(order, S3Fifo) else list(order._ghosts)  # type: ignore[attr-defined]
    assert 1000 < sum(len(each) for each in ghosts) <= 1024


def test_a_record_under_one_that_proved_itself_goes_to_main_too() -> None:
    retention: LeafFirst[int] = make("s3fifo", 4)
    retention.insert(Entry(2, 1, 1, "t"), 0.0)
    retention.touch([2, 2], 0.0)
    retention.touch([2], 0.0)
    for key in range(10, 14):
        retention.insert(Entry(key, None, 1, "t"), 0.0)
    assert 2 not in retention.victims(2, 0.0, free)
    retention.insert(Entry(1, None, 1, "t"), 0.0)
    retention.check()


def test_unknown_policies_and_bad_limits_are_refused() -> None:
    with pytest.raises(InvalidInput, match="'fifo' is no policy; there are lru, s3fifo, arc"):
        make("fifo", 1)
    with pytest.raises(InvalidInput, match="at least 1 byte"):
        make("lru", 0)
    with pytest.raises(InvalidInput, match="quota"):
        Quotas(named={"a": -1})
    with pytest.raises(InvalidInput, match="pin_bytes"):
        HintLimits(-1)
    with pytest.raises(InvalidInput, match="soon_s"):
        HintLimits(0, float("nan"))


def test_quotas_say_what_is_too_much() -> None:
    quotas = Quotas(default=10, named={"big": 100, "none": 0})
    assert (quotas.limit("big"), quotas.limit("other")) == (100, 10)
    assert quotas.excess("other", used=8) == 0
    assert quotas.excess("other", used=8, incoming=5) == 3
    assert quotas.excess("none", used=0, incoming=1) == 1
    assert Quotas().excess("anyone", used=1 << 60) == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_remembered_of_hints_is_bounded_by_the_records(name: str) -> None:
    retention: LeafFirst[int] = make(name, 100)
    for key in range(500):
        retention.insert(Entry(key, None, 1, "t"), 0.0)
        retention.hint([key], HintKind.PIN if key % 2 else HintKind.WAITING, 1e5, 0.0)
    for key in range(500):
        retention.remove(key)
        retention.check()


def test_hints_of_one_record_said_a_thousand_times_are_one() -> None:
    hints: Hints[int] = Hints(HintLimits(10), count(1))
    record = Record(1, None, 1, "t", Lifetime.SESSION, 0.0)
    for step in range(1000):
        hints.say(record, HintKind.PIN, 10.0 + step, 0.0)
        hints.say(record, HintKind.WAITING, 10.0 + step, 0.0)
    hints.check({1: record})
    assert len(hints) == 2
    assert hints.pinned_bytes == 1
    assert hints.end(1008.0) == []
    assert hints.end(1009.0) == [1]
    assert hints.pinned_bytes == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "pop", "own", "drop", "child"]), st.integers(0, 30), st.integers(0, 9)),
        max_size=200,
    ),
    st.sampled_from([2, 20]),
)
def test_the_queue_of_leaves_is_a_sorted_list(steps: list[tuple[str, int, int]], tenants: int) -> None:
    """Against a plain list, with few tenants and with so many that their heads are a heap."""
    leaves: Leaves[int] = Leaves(count(1))
    records = [Record(key, None, 1, key % tenants, Lifetime.SESSION, 0.0) for key in range(31)]
    queued: dict[int, tuple[int, int]] = {}
    turn = 0
    for what, key, rank in steps:
        record = records[key]
        if what == "push":
            record.children = 0
            leaves.push(record, rank)
            turn += 1
            queued[key] = (rank, turn)
        elif what == "drop":
            record.place = 0
            queued.pop(key, None)
        elif what == "child":
            record.children = 1
            queued.pop(key, None)
        else:
            tenant = key % tenants if what == "own" else None
            owned = {at: place for at, place in queued.items() if tenant in (None, at % tenants)}
            expected = min(owned, key=owned.__getitem__, default=None)
            found = leaves.pop(tenant)
            assert (None if found is None else found[1].key) == expected
            if expected is not None:
                assert found is not None
                assert found[0] == queued.pop(expected)[0]
        assert len(leaves.serials()) >= len(queued)


def test_places_that_are_not_valid_are_dropped() -> None:
    leaves: Leaves[int] = Leaves(count(1))
    records = [Record(key, None, 1, key % 20, Lifetime.SESSION, 0.0) for key in range(100)]
    for rank in range(200):
        for record in records:
            leaves.push(record, -rank)
    assert len(leaves) <= 2 * 100 + 100 + 64
    assert [leaves.pop()[1].key for _ in range(100)] == list(range(100))
    assert leaves.pop() is None
