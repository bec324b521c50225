"""State snapshots of hybrid models, over a fake runner whose recurrent state is a hash chain over the tokens."""

from collections.abc import Callable

import pytest
from tests.support.fake_runner import FakeRunner, fake_info, fake_states, reference
from tests.support.requests import SCOPE, make_request

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.events import Finish, RequestOutput
from isthmus.contracts.ids import RequestId
from isthmus.contracts.keys import BlockKey, block_key, prefix_chain
from isthmus.contracts.requests import Work
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.pool import BlockPool
from isthmus.execution.inference.settings import SchedulerSettings
from isthmus.execution.inference.snapshots import SnapshotIndex

VOCAB = 50


class Hybrid:
    """An engine over a hybrid fake: blocks of 4 tokens, a grid of 6. Outputs are compared with each request alone."""

    def __init__(
        self, slots: int = 32, blocks: int = 64, grid: int = 6, vocab: int = VOCAB, **settings: object
    ) -> None:
        self.vocab = vocab
        info = fake_info(blocks, vocab=vocab, max_len=128, states=fake_states(slots, grid))
        self.runner = FakeRunner(info)
        self.clock = ManualClock()
        defaults = {"max_batch_tokens": 64, "max_running": 4, "max_waiting": 8}
        self.core = EngineCore(self.runner, SchedulerSettings(**(defaults | settings)), self.clock)  # type: ignore[arg-type]
        self.prompts: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.ended: dict[str, Finish] = {}

    def submit(self, name: str, prompt: list[int], max_tokens: int = 4, **kwargs: object) -> None:
        self.prompts[name] = prompt
        output = kwargs.get("output_ids") or []
        self.tokens[name] = list(output)  # type: ignore[call-overload]
        if kwargs.get("work") is Work.PREFILL:
            self.runner.prompt_ends.add(len(prompt))
        refused = self.core.submit(make_request(name, prompt, max_tokens, **kwargs))  # type: ignore[arg-type]
        self.take([refused] if refused else [])

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.tokens[output.request_id] += output.token_ids
            if output.cached_tokens is not None:
                self.cached[output.request_id] = output.cached_tokens
            if output.finish is not None:
                self.ended[output.request_id] = output.finish
        self.core.check()

    def step(self) -> None:
        self.clock.advance(0.01)
        self.take(self.core.step())

    def run(self, limit: int = 800) -> None:
        for _ in range(limit):
            if self.core.idle:
                break
            self.step()
        assert self.core.idle, "the engine does not come to rest"
        assert self.core.stats().states_leased == 0
        for name, tokens in self.tokens.items():
            assert tokens == reference(self.prompts[name], 0, len(tokens), self.vocab, hybrid=True), name

    def until(self, reached: Callable[[], bool], limit: int = 100) -> None:
        for _ in range(limit):
            if reached():
                return
            self.step()
        raise AssertionError("the engine does not get there")

    def ask(self, name: str, prompt: list[int], max_tokens: int = 4, **kwargs: object) -> int:
        """Run one request to its end. Its cached tokens."""
        self.submit(name, prompt, max_tokens, **kwargs)
        self.run()
        return self.cached[name]

    def text(self, name: str) -> list[int]:
        return [*self.prompts[name], *self.tokens[name]]

    def depths(self) -> list[int]:
        """Tokens under every snapshot."""
        states = self.core._scheduler._states
        assert states is not None
        return sorted(snapshot.blocks * 4 for snapshot in states.index._by_key.values())


def test_the_next_turn_starts_at_the_deepest_boundary_of_the_last() -> None:
    engine = Hybrid()
    engine.ask("a", list(range(10)), max_tokens=9)
    # 19 tokens, of which the last is not computed: 18 computed, boundary 16.
    assert engine.depths() == [16], "the boundary in the prompt is given up when the turn ends"
    assert engine.ask("b", [*engine.text("a"), 7, 7]) == 16


def test_a_turn_too_short_for_a_boundary_leaves_the_one_in_its_prompt() -> None:
    engine = Hybrid()
    engine.ask("a", list(range(10)), max_tokens=2)
    assert engine.depths() == [8]
    assert engine.ask("b", [*engine.text("a"), 7, 7]) == 8


def test_a_prompt_that_ends_on_a_boundary_leaves_that_boundary() -> None:
    engine = Hybrid()
    engine.ask("a", list(range(12)), max_tokens=2)
    assert engine.depths() == [12]
    assert engine.ask("b", [*engine.text("a"), 7]) == 12


def test_a_retry_while_the_first_runs_hits_the_boundary_in_the_prompt_and_keeps_it() -> None:
    engine = Hybrid()
    prompt = list(range(14))
    engine.submit("a", prompt, max_tokens=20)
    engine.step()
    engine.step()
    engine.submit("b", prompt, max_tokens=20)
    engine.run()
    assert engine.cached["b"] == 12
    assert 12 in engine.depths(), "it was hit"


def test_what_matches_beyond_the_deepest_snapshot_is_a_branch_point_and_hit_the_next_time() -> None:
    engine = Hybrid()
    system = list(range(20))
    engine.ask("a", [*system, 30, 31, 32, 33], max_tokens=4)
    assert engine.ask("b", [*system, 40, 41, 42, 43], max_tokens=4) == 0, "no snapshot at the end of the system prompt"
    assert 20 in engine.depths()
    assert engine.ask("c", [*system, 45, 46, 47, 48], max_tokens=4) == 20
    stats = engine.core.stats()
    assert stats.blocks_cached == 5 + 3, "recomputed blocks are shared again, not doubled"
    assert stats.snapshot_hits == 1


def test_who_waits_for_a_prefix_in_flight_gets_a_hit_the_first_time() -> None:
    engine = Hybrid(max_batch_tokens=24)
    system = list(range(21))
    for name in "abc":
        engine.submit(name, [*system, 40 + ord(name) % 7], max_tokens=1)
    engine.run()
    assert engine.cached == {"a": 0, "b": 20, "c": 20}
    assert engine.core.stats().dedup_waits == 2
    assert engine.runner.computed_slots == 22 + 2 * 2


def test_who_comes_late_waits_for_what_the_owner_still_computes() -> None:
    """The owner is past the first blocks without a snapshot there: not a reason to compute them again."""
    engine = Hybrid(max_batch_tokens=12)
    shared = list(range(40))
    engine.submit("a", shared, max_tokens=1)
    engine.step()
    engine.submit("b", [*shared[:33], 44], max_tokens=1)
    engine.run()
    assert engine.cached["b"] == 32


def test_chunks_end_on_the_grid_and_a_budget_under_a_cell_is_exceeded_to_get_there() -> None:
    engine = Hybrid(grid=6, max_batch_tokens=4, max_running=1)
    engine.ask("a", list(range(23)), max_tokens=1)
    assert [batch.slices[0].end for batch in engine.runner.batches] == [6, 12, 18, 23]
    engine = Hybrid(grid=6, max_batch_tokens=16, max_running=1)
    engine.ask("a", list(range(40)), max_tokens=1)
    assert [batch.slices[0].end for batch in engine.runner.batches] == [12, 24, 40]


def test_a_step_goes_over_its_budget_by_less_than_a_cell() -> None:
    engine = Hybrid(grid=6, max_batch_tokens=8, max_running=4)
    for name in "abcd":
        engine.submit(name, [ord(name) - 90, *range(20)], max_tokens=5)
    engine.run()
    assert 8 < max(batch.tokens for batch in engine.runner.batches) < 8 + 6


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 32])
def test_memory_pressure_of_either_kind_preempts_and_outputs_stay_the_same(slots: int) -> None:
    engine = Hybrid(slots=slots, blocks=10)
    for name in "abcd":
        engine.submit(name, [ord(name) - 90, 2, 3], max_tokens=20)
    engine.run()
    assert set(engine.ended.values()) == {Finish.LENGTH}
    assert engine.core.stats().preemptions > 0 or slots < 3, "with so few slots only few run at a time"


def test_a_preempted_sequence_goes_on_from_its_own_snapshot() -> None:
    engine = Hybrid(slots=32, blocks=9)
    engine.submit("a", list(range(11)), max_tokens=12)
    engine.submit("b", [4, 5, 6], max_tokens=25)
    engine.run()
    stats = engine.core.stats()
    assert stats.preemptions > 0
    starts = [part.start for batch in engine.runner.batches for part in batch.slices if part.request_id == "b"]
    assert starts.count(0) == 1, "it does not start at 0 again"
    assert stats.snapshot_hits == 0, "a hit is one of another request"


def test_a_sequence_preempted_at_a_chunk_s_end_keeps_that_state() -> None:
    engine = Hybrid(slots=8, blocks=12, max_batch_tokens=12, max_running=2, grid=4)
    engine.submit("first", [1], max_tokens=30)
    engine.step()
    engine.submit("late", list(range(44)), max_tokens=1)
    engine.until(lambda: engine.core.stats().preemptions > 0)
    late = [p for batch in engine.runner.batches for p in batch.slices if p.request_id == "late"]
    assert late[-1].end in engine.depths()
    engine.run()


@pytest.mark.parametrize("slots", [1, 4, 32])
def test_drafts_change_the_number_of_steps_but_never_the_output(slots: int) -> None:
    plain = Hybrid(slots=slots, vocab=2)
    drafting = Hybrid(slots=slots, vocab=2, draft_tokens=3)
    for engine in (plain, drafting):
        engine.ask("a", [0, 1, 1, 0, 1], max_tokens=60)
        assert engine.depths() == [64], "the deepest boundary of 64 computed tokens"
    assert plain.tokens == drafting.tokens
    stats = drafting.core.stats()
    if slots > 3:
        assert 0 < stats.accepted_drafts < stats.draft_tokens
        assert len(drafting.runner.batches) < len(plain.runner.batches)
    else:
        assert stats.draft_tokens == 0, "no slots to verify drafts in"


def test_a_request_resumes_from_its_output_ids_at_its_last_snapshot() -> None:
    engine = Hybrid()
    whole = reference([5, 6], 0, 30, VOCAB, hybrid=True)
    engine.submit("a", [5, 6], max_tokens=30)
    for _ in range(20):
        engine.step()
    engine.core.abort(RequestId("a"))
    engine.take(engine.core.collect())
    assert engine.tokens["a"] == whole[:20]
    engine.submit("again", [5, 6], max_tokens=30, output_ids=whole[:20])
    engine.step()
    first = engine.runner.batches[-1].slices[0]
    assert (first.start, first.end) == (20, 22)
    engine.run()
    assert engine.tokens["again"] == whole


def test_a_rollback_starts_at_the_deepest_snapshot_before_it_and_marks_where_it_branched() -> None:
    engine = Hybrid()
    engine.ask("a", list(range(10)), max_tokens=20)
    cut = engine.text("a")[:18]
    assert engine.ask("b", [*cut, 49]) == 0
    assert 16 in engine.depths()
    assert engine.ask("c", [*cut, 48]) == 16


@pytest.mark.parametrize("during_step", [False, True])
@pytest.mark.parametrize("state", ["waiting", "blocked", "prefilling", "decoding", "drafting", "preempted", "started"])
def test_abort_in_every_state_frees_every_slot(state: str, during_step: bool) -> None:
    few = state == "preempted"
    engine = Hybrid(
        blocks=8 if few else 64,
        vocab=2,
        max_running=1 if state == "waiting" else 4,
        max_batch_tokens=6,
        draft_tokens=3 if state == "drafting" else 0,
    )
    stem = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0, 1]
    if state == "waiting":
        engine.submit("other", [1], max_tokens=6)
        engine.submit("victim", [1, 1])
    elif state == "blocked":
        engine.submit("other", stem)
        engine.submit("victim", stem)
    elif state == "started":
        engine.ask("other", stem)
        engine.submit("victim", [*engine.text("other"), 1, 1], max_tokens=20)
    else:
        engine.submit("other", [1, 0, 1], max_tokens=25)
        engine.submit("victim", stem if state == "prefilling" else [0, 1, 1], max_tokens=25)
    if few:
        engine.until(lambda: engine.core.stats().preemptions > 0)
    elif state == "drafting":
        engine.until(lambda: engine.core.stats().draft_tokens > 0)
    elif state != "blocked":
        engine.step()
    victim = RequestId("victim")
    if during_step or state == "blocked":
        assert engine.core.begin_step()
        engine.core.abort(victim)
        engine.take(engine.core.finish_step())
    else:
        engine.core.abort(victim)
        engine.take(engine.core.collect())
    assert engine.ended["victim"] is Finish.ABORT
    engine.run()


def test_an_aborted_request_leaves_the_boundary_in_its_prompt_for_a_retry() -> None:
    engine = Hybrid()
    prompt = list(range(14))
    engine.submit("a", prompt, max_tokens=30)
    for _ in range(6):
        engine.step()
    engine.core.abort(RequestId("a"))
    assert engine.ask("b", prompt) == 12


def test_prefill_only_serves_the_request_that_follows() -> None:
    engine = Hybrid()
    engine.ask("p", list(range(12)), work=Work.PREFILL)
    assert engine.ask("g", list(range(12))) == 8
    assert engine.ask("h", [*range(12), 7]) == 12


def test_evicting_a_block_evicts_its_snapshot() -> None:
    engine = Hybrid(blocks=12)
    engine.ask("a", list(range(20)), max_tokens=8)
    assert engine.depths() == [24]
    engine.ask("b", [49 - token for token in range(30)], max_tokens=8)
    assert 24 not in engine.depths()
    assert engine.core.stats().snapshots_evicted > 0


def test_two_that_start_from_one_snapshot_without_slots_to_spare_do_not_overwrite_it() -> None:
    engine = Hybrid(slots=3, max_running=2)
    engine.ask("a", list(range(18)), max_tokens=1)
    for name in ("b", "c"):
        engine.submit(name, [*range(16), 40 + ord(name) % 7, 1, 2], max_tokens=12)
    engine.run()
    assert engine.cached["b"] == engine.cached["c"] == 16


def test_a_single_slot_is_enough_and_a_hit_takes_it_over() -> None:
    engine = Hybrid(slots=1)
    engine.ask("a", list(range(10)), max_tokens=7)
    assert engine.depths() == [16]
    assert engine.ask("b", [*engine.text("a"), 7, 7], max_tokens=2) == 16
    assert engine.depths() == [20]


@pytest.mark.parametrize(
    ("policy", "depths"),
    [("turns", [8, 16, 16]), ("every-block", [4, 8, 12, 12, 16, 16]), ("last-only", [16, 16])],
)
def test_policies_keep_what_they_say(policy: str, depths: list[int]) -> None:
    engine = Hybrid(snapshots=policy)
    engine.ask("a", list(range(10)), max_tokens=9)
    engine.ask("b", [*range(8), 40, 41], max_tokens=9)
    assert engine.depths() == depths


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidInput, match="turns, every-block, last-only"):
        SchedulerSettings(snapshots="all")


def test_an_attention_model_has_no_state_in_its_slices() -> None:
    runner = FakeRunner(fake_info())
    core = EngineCore(runner, SchedulerSettings(), ManualClock())
    core.submit(make_request("a", [1, 0, 1]))
    while not core.idle:
        core.step()
    assert all(part.state is None for batch in runner.batches for part in batch.slices)
    assert core.stats().states_total == 0


# ---- the index


def chain(tokens: list[int]) -> list[BlockKey]:
    return [block_key(SCOPE, key, b"f" * 32) for key in prefix_chain(SCOPE, tokens, 1)]


def index_of(slots: int) -> tuple[BlockPool, SnapshotIndex]:
    pool = BlockPool(slots)
    return pool, SnapshotIndex(pool)


def put(index: SnapshotIndex, keys: list[BlockKey], blocks: int) -> None:
    slot = index.take()
    assert slot is not None
    index.insert(keys, blocks, slot)
    index.release(slot)


def test_eviction_takes_what_saves_the_fewest_tokens() -> None:
    _, index = index_of(3)
    a, b = chain([1] * 10), chain([2] * 10)
    put(index, a, 10)
    put(index, b, 5)
    put(index, a, 2)
    put(index, b, 9)
    assert index.get(a[1]) is None, "saves 2"
    assert index.get(a[9]) is not None, "saves 8, and 10 from now on"
    assert index.get(b[4]) is not None


def test_a_snapshot_between_two_takes_its_share_of_the_saving() -> None:
    _, index = index_of(3)
    a, b = chain([1] * 10), chain([2] * 10)
    put(index, b, 4)
    put(index, a, 10)
    put(index, a, 8)
    put(index, b, 9)
    assert index.get(a[9]) is None, "a hit on it saves no more than 2 blocks"


def test_old_savings_fade() -> None:
    _, index = index_of(2)
    old = chain([1] * 10)
    put(index, old, 10)
    for token in range(2, 8):
        put(index, chain([token] * 4), 4)
    assert index.get(old[9]) is None


def test_a_leased_snapshot_is_never_evicted() -> None:
    pool, index = index_of(1)
    keys = chain([1, 2])
    put(index, keys, 2)
    snapshot = index.get(keys[1])
    assert snapshot is not None
    assert snapshot.slot is not None
    pool.retain(snapshot.slot)
    assert index.take() is None
    index.release(snapshot.slot)
    assert index.take() == 0
    assert index.deepest(keys, 2) is None
