"""The conformance suite of `Retention`: every policy passes it. To add one, add its name to `policies.NAMES`."""

import math
import random
from collections.abc import Callable, Sequence

import pytest

from isthmus.contracts.blocks import HintKind, Lifetime
from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.retention.hints import HintLimits
from isthmus.state.kv.retention.leaf_first import LeafFirst
from isthmus.state.kv.retention.policies import NAMES, make
from isthmus.state.kv.retention.port import Entry, Retention
from isthmus.state.kv.retention.quotas import Quotas

Maker = Callable[..., LeafFirst[str]]


@pytest.fixture(params=NAMES)
def maker(request: pytest.FixtureRequest) -> Maker:
    def make_it(capacity: int = 1000, quotas: Quotas | None = None, limits: HintLimits | None = None) -> LeafFirst[str]:
        return make(request.param, capacity, quotas or Quotas(), limits)

    return make_it


def free(_key: str) -> bool:
    return False


def chain(retention: Retention[str], keys: Sequence[str], now: float = 0.0, size: int = 1, tenant: str = "t") -> None:
    """Insert a sequence of one-letter records."""
    for index, key in enumerate(keys):
        retention.insert(Entry(key, keys[index - 1] if index else None, size, tenant), now)


def drain(retention: LeafFirst[str], now: float = 0.0, size: int = 1, tenant: str | None = None) -> str:
    """Evict in steps of `size` until nothing is left that may go; the keys in their order."""
    order = ""
    while victims := retention.victims(size, now, free, tenant):
        for key in victims:
            retention.remove(key)
        retention.check()
        order += "".join(victims)
    return order


def test_a_full_tier_is_emptied_leaves_first(maker: Maker) -> None:
    retention = maker()
    chain(retention, "abcd")
    assert retention.victims(1, 0.0, free) == ["d"]
    assert retention.victims(3, 0.0, free) == ["d", "c", "b"]
    assert drain(retention) == "dcba"
    assert len(retention) == retention.used() == 0
    assert retention.victims(1, 0.0, free) == []


def test_bytes_count_not_records(maker: Maker) -> None:
    retention = maker()
    for key, size in (("a", 10), ("b", 10), ("c", 100)):
        retention.insert(Entry(key, None, size, "t"), 0.0)
    assert retention.used() == 120
    assert len(retention.victims(11, 0.0, free)) == 2
    assert sorted(retention.victims(120, 0.0, free)) == ["a", "b", "c"]
    assert sorted(retention.victims(121, 0.0, free)) == ["a", "b", "c"], "all there is, although it is not enough"
    assert retention.victims(0, 0.0, free) == retention.victims(-5, 0.0, free) == []


def test_what_was_never_used_goes_before_what_was_used_often(maker: Maker) -> None:
    retention = maker(6)
    chain(retention, "abc")
    chain(retention, "xyz")
    for _ in range(3):
        retention.touch("abc", 1.0)
    assert drain(retention) == "zyxcba"


def test_a_branch_goes_and_the_stem_stays_while_the_other_branch_is_used(maker: Maker) -> None:
    retention = maker(100)
    chain(retention, "abcd")
    retention.insert(Entry("x", "b", 1, "t"), 0.0)
    for _ in range(3):
        retention.touch("abx", 1.0)
    assert drain(retention) == "dcxba"


def test_what_is_held_stays_and_so_does_what_it_stands_on(maker: Maker) -> None:
    retention = maker()
    chain(retention, "abc")
    chain(retention, "xy")
    assert retention.victims(100, 0.0, {"c"}.__contains__) == ["y", "x"]
    retention.check()
    assert sorted(retention.victims(100, 0.0, free)) == ["a", "b", "c", "x", "y"], "released, it may go"


def test_what_is_held_is_not_asked_about_again_and_again(maker: Maker) -> None:
    """Leases at the front of the order must not make every eviction as dear as there are leases."""
    retention = maker(10_000)
    leased = {f"l{i}" for i in range(200)}
    for key in sorted(leased):
        retention.insert(Entry(key, None, 1, "t"), 0.0)
    for index in range(400):
        retention.insert(Entry(f"f{index}", None, 1, "t"), 0.0)
    asked = 0

    def held(key: str) -> bool:
        nonlocal asked
        asked += 1
        return key in leased

    for _ in range(300):
        (victim,) = retention.victims(1, 0.0, held)
        retention.remove(victim)
    assert asked <= 300 + 2 * 200


def test_a_proposal_that_is_not_taken_changes_nothing(maker: Maker) -> None:
    retention = maker()
    chain(retention, "abc")
    chain(retention, "xyz")
    first = retention.victims(4, 0.0, free)
    assert retention.victims(4, 0.0, free) == first
    retention.remove(first[0])
    retention.check()
    retention.touch(first[1:], 0.0)
    retention.check()
    assert retention.victims(5, 0.0, free)[0] != first[0]
    assert sorted(drain(retention) + first[0]) == sorted("abcxyz")


def test_a_child_that_comes_after_a_proposal_keeps_its_parent(maker: Maker) -> None:
    retention = maker()
    chain(retention, "ab")
    assert retention.victims(2, 0.0, free) == ["b", "a"]
    retention.insert(Entry("c", "b", 1, "t"), 0.0)
    assert drain(retention) == "cba"


def test_holes_are_lived_with(maker: Maker) -> None:
    retention = maker()
    chain(retention, "abcd")
    retention.remove("b")  # found corrupt
    retention.check()
    assert retention.victims(1, 0.0, {"d"}.__contains__) == ["a"], "nothing that is here stands on it"
    retention.insert(Entry("b", "a", 1, "t"), 0.0)
    retention.check()
    order = drain(retention)
    assert order.index("d") < order.index("c") < order.index("b") < order.index("a")


def test_children_may_come_before_their_parents(maker: Maker) -> None:
    retention = maker()
    for key, parent in (("c", "b"), ("b", "a"), ("a", None)):
        retention.insert(Entry(key, parent, 1, "t"), 0.0)
        retention.check()
    assert drain(retention) == "cba"


def test_inserting_what_is_here_is_a_use(maker: Maker) -> None:
    retention = maker(2)
    chain(retention, "a")
    chain(retention, "b")
    for _ in range(3):
        chain(retention, "a", now=1.0)
    assert len(retention) == 2
    assert drain(retention) == "ba"


def test_bad_entries_are_refused_and_change_nothing(maker: Maker) -> None:
    retention = maker()
    with pytest.raises(InvalidInput, match="at least 1 byte, not 0") as refused:
        retention.insert(Entry("a", None, 0, "t"), 0.0)
    assert refused.value.field == "entry.size"
    chain(retention, "a")
    for entry in (Entry("a", None, 2, "t"), Entry("a", None, 1, "u")):
        with pytest.raises(InvalidInput, match="another size or tenant"):
            retention.insert(entry, 0.0)
    retention.check()
    assert retention.used() == 1


def test_unknown_keys_are_passed_over(maker: Maker) -> None:
    retention = maker()
    retention.remove("nothing")
    retention.touch(["nothing"], 0.0)
    for kind in HintKind:
        retention.hint(["nothing"], kind, 1.0, 0.0)
    retention.check()
    assert len(retention) == 0


def test_an_error_of_the_caller_leaves_the_accounts_right(maker: Maker) -> None:
    retention = maker()
    chain(retention, "abc")

    def broken(key: str) -> bool:
        if key == "b":
            raise KeyError(key)
        return False

    with pytest.raises(KeyError):
        retention.victims(3, 0.0, broken)
    retention.check()
    assert drain(retention) == "cba"


def test_a_tenant_over_its_quota_pays_first(maker: Maker) -> None:
    retention = maker(8, quotas=Quotas(default=3, named={"big": 10}))
    chain(retention, "abc", tenant="big")
    chain(retention, "vwxyz", tenant="small")
    for _ in range(3):
        retention.touch("vwxyz", 1.0)
    assert retention.used("small") == 5
    assert retention.used("big") == 3
    assert retention.used("nobody") == 0
    victims = retention.victims(2, 1.0, free)
    assert victims == ["z", "y"], "although they were used last"
    for key in victims:
        retention.remove(key)
    assert retention.victims(3, 1.0, free) == ["c", "b", "a"], "within its quota, it is one of all"


def test_a_tenants_own_records_can_be_asked_for(maker: Maker) -> None:
    retention = maker()
    chain(retention, "abc", tenant="one")
    chain(retention, "xyz", tenant="two")
    assert retention.victims(100, 0.0, free, tenant="two") == ["z", "y", "x"]
    assert retention.victims(100, 0.0, free, tenant="three") == []
    assert drain(retention, tenant="one") == "cba"
    assert retention.used() == retention.used("two") == 3


def test_a_foreign_child_keeps_a_parent(maker: Maker) -> None:
    """Keys of two tenants never chain; if they did, leaf first would still hold."""
    retention = maker()
    retention.insert(Entry("a", None, 1, "one"), 0.0)
    retention.insert(Entry("b", "a", 1, "two"), 0.0)
    assert retention.victims(9, 0.0, free, tenant="one") == []
    assert drain(retention) == "ba"


def test_done_goes_first_and_a_use_takes_that_back(maker: Maker) -> None:
    retention = maker(100)
    chain(retention, "abc")
    chain(retention, "xyz")
    for _ in range(3):
        retention.touch("xyz", 1.0)
    retention.hint("xyz", HintKind.DONE, 0.0, 1.0)
    assert retention.victims(3, 1.0, free) == ["z", "y", "x"]
    retention.touch("xyz", 2.0)
    assert drain(retention, 2.0) == "cbazyx"


def test_done_stops_at_what_is_shared(maker: Maker) -> None:
    retention = maker(100)
    chain(retention, "sab")
    retention.insert(Entry("x", "s", 1, "t"), 0.0)
    chain(retention, "o")
    retention.touch("sab", 1.0)
    retention.touch("sx", 1.0)
    retention.hint("sab", HintKind.DONE, 0.0, 2.0)
    retention.hint("sx", HintKind.DONE, 0.0, 2.0)
    order = drain(retention, 2.0)
    assert order[:2] == "ba"
    assert order.index("s") > order.index("x")
    retention.insert(Entry("p", None, 1, "t", Lifetime.SHARED), 3.0)
    retention.insert(Entry("q", "p", 1, "t"), 3.0)
    chain(retention, "r", now=2.5)
    retention.hint("pq", HintKind.DONE, 0.0, 3.0)
    assert drain(retention, 3.0)[0] == "q"


def test_the_orders_that_hints_make(maker: Maker) -> None:
    retention = maker(100, limits=HintLimits(0, soon_s=5.0))
    for key in "abcdefgh":
        chain(retention, key)
    retention.hint("a", HintKind.WAITING, 1.0, 10.0)
    retention.hint("b", HintKind.PREFETCH, 0.0, 10.0)
    retention.hint("c", HintKind.WAITING, 600.0, 10.0)
    retention.hint("d", HintKind.WAITING, 60.0, 10.0)
    retention.hint("e", HintKind.TURN_ENDED, 0.0, 10.0)
    retention.hint("f", HintKind.TURN_ENDED, 0.0, 11.0)
    retention.hint("g", HintKind.DONE, 0.0, 12.0)
    assert retention.victims(8, 12.0, free) == list("gefcdhab")
    assert drain(retention, 12.0) == "gefcdhab"


def test_who_comes_back_sooner_than_others_last_is_kept(maker: Maker) -> None:
    """An unused record lasts about 100 s here: a wait of 60 s is worth keeping, one of 600 s is not."""
    retention = maker(1000, limits=HintLimits(0, soon_s=1.0))
    for index in range(100):
        retention.insert(Entry(f"old{index}", None, 1, "t"), 0.0)
    for _ in range(60):
        (victim,) = retention.victims(1, 100.0, free)
        retention.remove(victim)
    assert 90 < retention.turnover_s <= 100
    chain(retention, "a", now=100.0)
    chain(retention, "b", now=100.0)
    retention.hint("a", HintKind.WAITING, 60.0, 100.0)
    retention.hint("b", HintKind.WAITING, 600.0, 100.0)
    victims = retention.victims(42, 100.0, free)
    assert victims[0] == "b"
    assert victims[-1] == "a"


def test_a_wait_that_is_overdue_is_forgotten(maker: Maker) -> None:
    retention = maker(100, limits=HintLimits(0, soon_s=5.0))
    chain(retention, "a")
    chain(retention, "b", now=1.0)
    retention.hint("a", HintKind.WAITING, 10.0, 1.0)
    assert retention.victims(1, 8.0, free) == ["b"], "it comes back in 3 s"
    assert retention.victims(1, 15.9, free) == ["b"], "it should have come, but may still"
    assert retention.victims(1, 16.1, free) == ["a"]


def test_short_lived_records_go_first(maker: Maker) -> None:
    retention = maker(100)
    chain(retention, "a")
    retention.insert(Entry("b", None, 1, "t", Lifetime.SHORT), 1.0)
    retention.insert(Entry("c", None, 1, "t", Lifetime.SHORT), 1.0)
    retention.touch("c", 2.0)
    assert drain(retention, 3.0)[0] == "b"


def test_a_pin_holds_until_it_ends(maker: Maker) -> None:
    retention = maker(100)
    chain(retention, "abc")
    chain(retention, "x")
    retention.hint("abc", HintKind.PIN, 10.0, 0.0)
    retention.touch("abc", 1.0)
    assert retention.victims(9, 9.9, free) == ["x"]
    assert sorted(retention.victims(9, 10.0, free)) == ["a", "b", "c", "x"]
    retention.hint("abc", HintKind.PIN, 50.0, 10.0)
    retention.hint("abc", HintKind.DONE, 0.0, 11.0)
    assert retention.victims(9, 12.0, free) == ["x"], "a pin outlasts what else is said"
    retention.hint("abc", HintKind.PIN, 0.0, 12.0)
    assert retention.victims(3, 12.0, free) == ["c", "b", "a"], "and is ended by another"
    retention.hint("abc", HintKind.PIN, math.inf, 12.0)
    retention.hint("x", HintKind.PIN, math.nan, 12.0)
    assert retention.victims(9, 12.0, free) == ["x"]
    retention.remove("c")
    retention.check()
    assert sorted(retention.victims(9, 12.0 + 8 * 86_400, free)) == ["a", "b", "x"], "no pin is for ever"


def test_pins_over_their_limit_are_not_taken(maker: Maker) -> None:
    retention = maker(100, limits=HintLimits(pin_bytes=2))
    chain(retention, "abc")
    retention.hint("abc", HintKind.PIN, 10.0, 0.0)
    assert retention.victims(9, 1.0, free) == []
    chain(retention, "x")
    retention.hint("x", HintKind.PIN, 10.0, 0.0)
    assert retention.victims(9, 1.0, free) == ["x"]
    retention.check()


def test_memory_does_not_grow_with_calls(maker: Maker) -> None:
    """Whatever is done how often: places in queues, ends of pins and waits, and ghosts are bounded."""
    retention = maker(64, Quotas(default=8), HintLimits(32))
    rng = random.Random(1)
    here: set[str] = set()
    for step in range(20_000):
        key = f"k{rng.randrange(4000)}"
        if key not in here:
            if retention.used() >= 64:
                for victim in retention.victims(1, step, free):
                    retention.remove(victim)
                    here.discard(victim)
            retention.insert(Entry(key, None, 1, f"t{rng.randrange(20)}"), step)
            here.add(key)
        retention.hint([key], rng.choice(list(HintKind)), rng.choice([0.0, 1e6]), step)
        if rng.random() < 0.3:
            gone = rng.choice(sorted(here))
            retention.remove(gone)
            here.discard(gone)
    retention.check()
    assert len(retention) == len(here) <= 64
    assert deep_size(retention) < 1_000_000


def deep_size(of: object) -> int:
    """Bytes of all that `of` refers to, but code."""
    import gc
    import sys
    import types

    seen: set[int] = set()
    todo, total = [of], 0
    while todo:
        found = todo.pop()
        if id(found) in seen or isinstance(found, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(found))
        total += sys.getsizeof(found)
        todo += gc.get_referents(found)
    return total


def test_a_record_is_small(maker: Maker) -> None:
    """Tens of millions of records must fit: under half a KiB each, the entry's key and size included."""
    retention = maker(10**9)
    before = deep_size(retention)
    for index in range(20_000):
        key = f"{index:032d}"
        retention.insert(Entry(key, f"{index - 1:032d}" if index % 50 else None, 4096, "t"), float(index))
    retention.victims(1, 0.0, free)
    assert (deep_size(retention) - before) / 20_000 < 512


def test_the_same_calls_give_the_same_answers(maker: Maker) -> None:
    def run() -> list[list[str]]:
        retention, rng, found = maker(50), random.Random(7), []
        for step in range(300):
            keys = [f"{rng.randrange(6)}", f"{rng.randrange(30)}"]
            retention.touch(keys, step)
            chain(retention, [f"p{keys[0]}", f"p{keys[0]}.{keys[1]}"], step)
            found.append(retention.victims(retention.used() - 50, step, free))
            for key in found[-1]:
                retention.remove(key)
        return found

    assert run() == run()
