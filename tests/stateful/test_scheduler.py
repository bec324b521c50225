"""A Hypothesis state machine for the whole engine core over 2 tokens, on a runner that checks every block read.

Promises: every request's output is what it would be alone, whatever arrives, is aborted, preempted, shared or drafted;
nothing is computed over wrong or stale state (the runner raises); conservation after every call; every request ends
exactly once; an engine with work always has a step to run; what is left at rest is only cache. The same for a hybrid
model, whose runner keeps a hash chain over the tokens in state slots: a wrong source or capture gives other tokens.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.support.fake_pager import FakePager
from tests.support.fake_runner import FakeRunner, fake_info, fake_states, reference
from tests.support.requests import make_request
from tests.support.scale import examples

from isthmus.contracts.blocks import Reason
from isthmus.contracts.clock import ManualClock
from isthmus.contracts.events import Finish, RequestOutput, StateInfo
from isthmus.contracts.ids import Namespace, RequestId
from isthmus.contracts.keys import PrefixScope
from isthmus.contracts.requests import EngineRequest, Work
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.paging.settings import PagingSettings
from isthmus.execution.inference.settings import SNAPSHOT_POLICIES, SchedulerSettings

SCOPES = [PrefixScope(Namespace(bytes([fill]) * 32), "fake") for fill in (1, 2)]


STEM = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1]
# Half of the prompts go on from a common stem, so that prefixes are often in flight when they are wanted.
PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    st.builds(lambda cut, tail: STEM[:cut] + tail, st.integers(6, 12), st.lists(st.integers(0, 1), max_size=2)),
)


class EngineMachine(RuleBasedStateMachine):
    """Random arrivals, aborts, deadlines and steps against the one-at-a-time reference."""

    def __init__(self) -> None:
        super().__init__()
        self.core: EngineCore | None = None
        self.pager: FakePager | None = None
        self.requests: dict[str, EngineRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Finish] = {}

    @property
    def stepping(self) -> bool:
        return self.core is not None and self.core.stepping

    @precondition(lambda self: self.core is None)
    @rule(
        blocks=st.integers(4, 12),
        budget=st.integers(4, 12),
        running=st.integers(1, 4),
        waiting=st.integers(1, 6),
        drafts=st.sampled_from([0, 0, 1, 2, 3]),
        eager=st.booleans(),
    )
    def start(self, blocks: int, budget: int, running: int, waiting: int, drafts: int, eager: bool) -> None:
        self.open(blocks, budget, running, waiting, drafts)
        self.runner.eager = eager

    def open(
        self,
        blocks: int,
        budget: int,
        running: int,
        waiting: int,
        drafts: int,
        states: StateInfo | None = None,
        policy: str = "turns",
        paged: FakePager | None = None,
        paging: PagingSettings | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.hybrid = states is not None
        self.runner = FakeRunner(
            fake_info(blocks, block_tokens=3, vocab=2, max_len=24, states=states, layers=2 if paged else 1)
        )
        limits = SchedulerSettings(
            max_batch_tokens=budget,
            max_running=running,
            max_waiting=waiting,
            draft_tokens=drafts,
            ageing_s=1.0,
            snapshots=policy,
            paging=paging or PagingSettings(),
        )
        if paged is not None:
            paged.runner = self.runner
            self.runner.on_gate = paged.finish
        self.pager = paged
        self.core = EngineCore(self.runner, limits, self.clock, pager=paged)

    @precondition(lambda self: self.core is not None)
    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 10),
        scope=st.sampled_from(SCOPES),
        priority=st.integers(-2, 2),
        deadline=st.sampled_from([None, None, None, 0.5, 2.0]),
        work=st.sampled_from([Work.GENERATE] * 4 + [Work.PREFILL, Work.EMBED]),
        resumed=st.integers(0, 2),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        scope: PrefixScope,
        priority: int,
        deadline: float | None,
        work: Work,
        resumed: int,
    ) -> None:
        self.send(prompt, max_tokens, scope, priority, deadline, work, resumed)

    @precondition(lambda self: self.core is not None and len(self.ended) > 0)
    @rule(data=st.data(), tail=st.lists(st.integers(0, 1), max_size=3), cut=st.integers(0, 4))
    def follow_up(self, data: st.DataObject, tail: list[int], cut: int) -> None:
        """The next turn of a request that ended, a retry of it, or a fork from somewhere before its end."""
        name = data.draw(st.sampled_from(sorted(self.ended)))
        request = self.requests[name]
        tokens = [*request.prompt_ids, *self.tokens[name]]
        prompt = [*tokens[: max(1, len(tokens) - cut)], *tail][:20]
        self.send(prompt, 6, request.scope, 0, None, Work.GENERATE, 0)

    def send(
        self,
        prompt: list[int],
        max_tokens: int,
        scope: PrefixScope,
        priority: int,
        deadline: float | None,
        work: Work,
        resumed: int,
    ) -> None:
        assert self.core is not None
        name = f"r{len(self.requests)}"
        resumed = min(resumed, max_tokens - 1) if work is Work.GENERATE else 0
        output = self.alone(prompt, resumed)
        if work is Work.PREFILL:
            self.runner.prompt_ends.add(len(prompt))
        request = make_request(
            name, prompt, max_tokens, 7, work, output, priority=priority, deadline_s=deadline, scope=scope
        )
        self.requests[name] = request
        self.tokens[name] = list(output)
        refused = self.core.submit(request)
        if refused is not None:
            self.take([refused])

    def alone(self, prompt: list[int], count: int) -> list[int]:
        return reference(prompt, 7, count, 2, hybrid=self.hybrid)

    @precondition(lambda self: self.core is not None and len(self.requests) > 0)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        assert self.core is not None
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.core.abort(RequestId(name))

    @precondition(lambda self: self.core is not None)
    @rule(seconds=st.floats(0, 0.4))
    def begin(self, seconds: float) -> None:
        assert self.core is not None
        self.clock.advance(seconds)
        if not self.core.begin_step():
            self.take(self.core.collect())
            assert self.core.idle or self.pager, "an engine with work always has a step: its loop sleeps otherwise"

    @precondition(lambda self: self.stepping)
    @rule()
    def finish(self) -> None:
        assert self.core is not None
        self.take(self.core.finish_step())

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            name = output.request_id
            assert name not in self.ended
            self.tokens[name] += output.token_ids
            if output.finish is not None:
                self.ended[name] = output.finish

    @invariant()
    def conserved(self) -> None:
        if self.core is not None:
            self.core.check()
            stats = self.core.stats()
            assert stats.blocks_free + stats.blocks_cached + stats.blocks_leased == stats.blocks_total
            assert stats.states_free + stats.states_cached + stats.states_leased == stats.states_total

    @invariant()
    def outputs_are_those_of_each_request_alone(self) -> None:
        for name, tokens in self.tokens.items():
            request = self.requests[name]
            assert tokens == self.alone(list(request.prompt_ids), len(tokens))

    def teardown(self) -> None:
        if self.core is None:
            return
        while self.stepping:
            self.take(self.core.finish_step())
        for _ in range(600):
            if self.pager is not None:
                self.pager.work(99)
            if self.core.idle:
                break
            if self.core.begin_step():
                self.take(self.core.finish_step())
            elif self.pager is None:
                break
        if self.pager is not None:
            self.pager.work(99)
            assert not self.core.begin_step()
        self.take(self.core.collect())
        assert self.core.idle, "every request ends"
        assert set(self.ended) == set(self.requests)
        self.core.check()
        assert self.core.stats().blocks_leased == self.core.stats().states_leased == 0
        for name, finish in self.ended.items():
            request = self.requests[name]
            if finish is Finish.LENGTH:
                room = 24 - len(request.prompt_ids)
                assert len(self.tokens[name]) == min(request.sampling.max_tokens, room)


class HybridMachine(EngineMachine):
    """The same with a recurrent state: few slots, any policy, grids that fall on block boundaries and between."""

    @precondition(lambda self: self.core is None)
    @rule(
        blocks=st.integers(4, 12),
        budget=st.integers(4, 12),
        running=st.integers(1, 4),
        waiting=st.integers(1, 6),
        drafts=st.integers(0, 3),
        slots=st.integers(1, 14),
        grid=st.sampled_from([2, 3, 6, 12]),
        policy=st.sampled_from(["turns", *SNAPSHOT_POLICIES]),
    )
    def start(
        self, blocks: int, budget: int, running: int, waiting: int, drafts: int, slots: int, grid: int, policy: str
    ) -> None:
        self.open(blocks, budget, running, waiting, drafts, fake_states(slots, grid), policy)


class PagedMachine(EngineMachine):
    """The same with a block store behind a small pool: it answers late, loses records, serves wrong ones as such."""

    @precondition(lambda self: self.core is None)
    @rule(
        blocks=st.integers(4, 12),
        budget=st.integers(4, 12),
        running=st.integers(1, 4),
        eager=st.booleans(),
        drafts=st.sampled_from([0, 0, 2]),
        loads=st.integers(1, 3),
        gate_fault=st.sampled_from([None, None, Reason.CORRUPT]),
    )
    def start(
        self, blocks: int, budget: int, running: int, eager: bool, drafts: int, loads: int, gate_fault: Reason | None
    ) -> None:  # type: ignore[override]
        paging = PagingSettings(max_loading=loads, keep_bytes=24 * 6, early_tokens=1, early_share=1.0)
        pager = FakePager(layered=True, gate_fault=gate_fault)
        self.open(blocks, budget, running, 6, drafts, paged=pager, paging=paging)
        self.runner.eager = eager
        assert self.core is not None
        self.core._scheduler._paging.rates.computed(1, 1000.0)  # loading is worth it, and computing takes long

    @precondition(lambda self: self.pager is not None)
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=8, max_size=14),
        cut=st.integers(0, 3),
        scope=st.sampled_from(SCOPES),
    )
    def pushed_out(self, prompt: list[int], cut: int, scope: PrefixScope) -> None:
        """A turn that ended, was written behind and left the device; then the next one, which finds it in the store."""
        assert self.core is not None
        assert self.pager is not None
        if self.core.stepping:
            self.take(self.core.finish_step())
        self.send(prompt, 4, scope, 0, None, Work.GENERATE, 0)
        name = f"r{len(self.requests) - 1}"
        for _ in range(60):
            self.pager.work(99)
            if self.core.begin_step():
                self.take(self.core.finish_step())
        self.take(self.core.collect())
        self.pager.work(99)
        self.core.begin_step()
        self.core._scheduler._tree.evict(99)
        tokens = [*prompt, *self.tokens[name]]
        self.send(tokens[: len(tokens) - cut], 4, scope, 0, None, Work.GENERATE, 0)
        self.pager.work(99)

    @precondition(lambda self: self.pager is not None)
    @rule(jobs=st.integers(1, 3), fault=st.sampled_from([None, None, None, Reason.CORRUPT, Reason.ABSENT]))
    def page(self, jobs: int, fault: Reason | None) -> None:
        assert self.pager is not None
        self.pager.work(jobs, fault)

    @precondition(lambda self: self.pager is not None)
    @rule(namespace=st.sampled_from(SCOPES))
    def forget(self, namespace: PrefixScope) -> None:
        assert self.pager is not None
        self.pager.forget(namespace.namespace)


class PagedHybridMachine(PagedMachine):
    """The same for a hybrid model."""

    @precondition(lambda self: self.core is None)
    @rule(
        blocks=st.integers(4, 12),
        budget=st.integers(4, 12),
        running=st.integers(1, 4),
        slots=st.integers(1, 14),
        grid=st.sampled_from([2, 3, 6, 12]),
        policy=st.sampled_from(["turns", *SNAPSHOT_POLICIES]),
    )
    def start(self, blocks: int, budget: int, running: int, slots: int, grid: int, policy: str) -> None:  # type: ignore[override]
        self.open(blocks, budget, running, 6, 0, fake_states(slots, grid), policy, FakePager())


LIMITS = settings(
    max_examples=examples(150, 1000), stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEngine = EngineMachine.TestCase
TestEngine.settings = LIMITS
TestHybrid = HybridMachine.TestCase
TestHybrid.settings = LIMITS
TestPaged = PagedMachine.TestCase
TestPaged.settings = LIMITS
TestPagedHybrid = PagedHybridMachine.TestCase
TestPagedHybrid.settings = LIMITS
