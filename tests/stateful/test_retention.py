"""A Hypothesis state machine over every policy of retention, with quotas and hints.

Promises: leaf first, nothing held or pinned is proposed, enough is proposed unless all that may go is less, tenants
over their quota pay first, `check` holds after every call, whatever the caller does with a proposal.
Release figure (`make chaos`): 1,000 examples of 60 steps a policy; `make test` runs fewer.
"""

from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.scale import examples

from isthmus.contracts.blocks import HintKind, Lifetime
from isthmus.state.kv.retention.hints import HintLimits
from isthmus.state.kv.retention.leaf_first import LeafFirst
from isthmus.state.kv.retention.policies import NAMES, make
from isthmus.state.kv.retention.port import Entry
from isthmus.state.kv.retention.quotas import Quotas

KEYS = 24
TENANTS = ("a", "b", "c")
QUOTAS = Quotas(None, {"a": 12, "b": 20})
CAPACITY = 40
keys = st.integers(0, KEYS - 1)
chains = st.lists(keys, min_size=1, max_size=6, unique=True).map(sorted)


@dataclass
class Model:
    """What is known to be here."""

    parent: int | None
    size: int
    tenant: str


class RetentionMachine(RuleBasedStateMachine):
    """Records come, are used, hinted at, leased, evicted and erased; a dictionary says what must be true.

    A key's parent is always a lower number, so that there are no cycles; it may be absent.
    """

    @initialize(name=st.sampled_from(NAMES))
    def start(self, name: str) -> None:
        self.retention: LeafFirst[int] = make(name, CAPACITY, QUOTAS, HintLimits(pin_bytes=10, soon_s=2.0))
        self.model: dict[int, Model] = {}
        self.held: set[int] = set()
        self.pins: dict[int, float] = {}
        self.now = 100.0

    @rule(
        data=st.data(),
        key=keys,
        size=st.integers(1, 5),
        tenant=st.sampled_from(TENANTS),
        life=st.sampled_from(Lifetime),
    )
    def insert(self, data: st.DataObject, key: int, size: int, tenant: str, life: Lifetime) -> None:
        if key in self.model:
            known = self.model[key]
            self.retention.insert(Entry(key, known.parent, known.size, known.tenant, life), self.now)
            return
        parent = data.draw(st.none() | st.integers(0, key - 1)) if key else None
        self.retention.insert(Entry(key, parent, size, tenant, life), self.now)
        self.model[key] = Model(parent, size, tenant)

    @rule(chain=chains, size=st.integers(1, 3), tenant=st.sampled_from(TENANTS))
    def sequence(self, chain: list[int], size: int, tenant: str) -> None:
        """A request: what is here of a chain is used, the rest comes in."""
        self.retention.touch(chain, self.now)
        for index, key in enumerate(chain):
            if key not in self.model:
                parent = chain[index - 1] if index else None
                self.retention.insert(Entry(key, parent, size, tenant), self.now)
                self.model[key] = Model(parent, size, tenant)

    @rule(chain=chains)
    def touch(self, chain: list[int]) -> None:
        self.retention.touch(chain, self.now)

    @rule(
        chain=chains, kind=st.sampled_from(HintKind), seconds=st.sampled_from([0.0, 1.0, 5.0, 50.0, float("nan"), -3.0])
    )
    def hint(self, chain: list[int], kind: HintKind, seconds: float) -> None:
        self.retention.hint(chain, kind, seconds, self.now)
        if kind is HintKind.PIN:
            pinned = sum(self.model[key].size for key in self.pins)
            for key in reversed(chain):
                if key in self.model and (key in self.pins or pinned + self.model[key].size <= 10):
                    pinned += 0 if key in self.pins else self.model[key].size
                    self.pins[key] = self.now + (seconds if seconds > 0 else 0.0)

    @rule(key=keys)
    def remove(self, key: int) -> None:
        self.retention.remove(key)
        self.gone(key)

    @rule(some=st.sets(keys, max_size=8))
    def lease(self, some: set[int]) -> None:
        self.held = some

    @rule(seconds=st.sampled_from([0.5, 3.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        size=st.integers(0, 30),
        tenant=st.none() | st.sampled_from(TENANTS),
        removed=st.sampled_from(["all", "some", "none"]),
    )
    def evict(self, size: int, tenant: str | None, removed: str) -> None:
        self.pins = {key: until for key, until in self.pins.items() if until > self.now}
        payers = {t for t in TENANTS if (limit := QUOTAS.limit(t)) is not None and self.retention.used(t) > limit}
        payers = {t for t in payers if self.may_go(set(), t)}
        over = {t: max(0, self.retention.used(t) - (QUOTAS.limit(t) or 10**9)) for t in TENANTS}
        victims = self.retention.victims(size, self.now, self.held.__contains__, tenant)
        self.retention.check()
        assert len(set(victims)) == len(victims)
        if tenant is None and victims and payers:
            assert self.model[victims[0]].tenant in payers
        gone: set[int] = set()
        for key in victims:
            assert key not in self.held
            assert key not in self.pins
            assert tenant in (None, self.model[key].tenant)
            assert all(child in gone for child, of in self.model.items() if of.parent == key), "leaf first"
            gone.add(key)
        freed = sum(self.model[key].size for key in victims)
        if freed < size:
            assert not self.may_go(gone, tenant), "there was more"
        elif victims:
            assert freed - self.model[victims[-1]].size < size or self.paid(victims, over, size), "no more than needed"
        count = {"all": len(victims), "some": len(victims) // 2, "none": 0}[removed]
        for key in victims[:count]:
            self.retention.remove(key)
            self.gone(key)

    def may_go(self, gone: set[int], tenant: str | None) -> list[int]:
        """Leaves that could have been proposed, too."""
        left = {key: of for key, of in self.model.items() if key not in gone}
        parents = {of.parent for of in left.values()}
        free = [key for key in left if key not in parents and key not in self.held and key not in self.pins]
        return [key for key in free if tenant in (None, left[key].tenant)]

    def paid(self, victims: list[int], over: dict[str, int], size: int) -> bool:
        """Whether the overshoot is one last record of each tenant that was over its quota, and one of the rest."""
        most = size + 4 * (1 + sum(excess > 0 for excess in over.values()))
        return sum(self.model[key].size for key in victims) <= most

    def gone(self, key: int) -> None:
        self.model.pop(key, None)
        self.pins.pop(key, None)

    @invariant()
    def adds_up(self) -> None:
        self.retention.check()
        assert len(self.retention) == len(self.model)
        assert self.retention.used() == sum(of.size for of in self.model.values())
        for tenant in TENANTS:
            assert self.retention.used(tenant) == sum(of.size for of in self.model.values() if of.tenant == tenant)


TestRetention = RetentionMachine.TestCase
TestRetention.settings = settings(
    max_examples=examples(60, 3000), stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
