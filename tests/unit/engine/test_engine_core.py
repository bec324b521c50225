"""The engine core over a fake runner that checks every block it reads."""

import pytest
from tests.support.fake_runner import FakeRunner, fake_info, reference
from tests.support.requests import make_request

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.events import Finish, RequestOutput
from isthmus.contracts.ids import Namespace
from isthmus.contracts.keys import PrefixScope
from isthmus.contracts.requests import Work
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.settings import SchedulerSettings


class Harness:
    """An engine with everything it said, by request."""

    def __init__(self, blocks: int = 16, vocab: int = 50, max_len: int = 64, **settings: object) -> None:
        self.runner = FakeRunner(fake_info(blocks, vocab=vocab, max_len=max_len))
        self.clock = ManualClock()
        defaults = {"max_batch_tokens": 16, "max_running": 4, "max_waiting": 8}
        self.core = EngineCore(self.runner, SchedulerSettings(**(defaults | settings)), self.clock)  # type: ignore[arg-type]
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, RequestOutput] = {}
        self.cached: dict[str, int] = {}

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.last, "nothing comes after a finish"
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.cached_tokens is not None:
                self.cached[output.request_id] = output.cached_tokens
            if output.finish is not None:
                self.last[output.request_id] = output
        self.core.check()

    def submit(self, *args: object, **kwargs: object) -> None:
        refused = self.core.submit(make_request(*args, **kwargs))  # type: ignore[arg-type]
        self.take([refused] if refused else [])

    def run(self, limit: int = 500) -> None:
        for _ in range(limit):
            if self.core.idle:
                return
            self.clock.advance(0.01)
            self.take(self.core.step())
        raise AssertionError("the engine does not come to rest")

    def finish(self, request_id: str) -> Finish | None:
        return self.last[request_id].finish


def test_a_request_alone_gets_the_model_s_tokens() -> None:
    engine = Harness()
    engine.submit("a", [1, 2, 3, 4, 5], max_tokens=6, seed=3)
    engine.run()
    assert engine.tokens["a"] == reference([1, 2, 3, 4, 5], 3, 6, 50)
    assert engine.finish("a") is Finish.LENGTH
    timing = engine.last["a"].timing
    assert timing is not None
    assert timing.queue_s == pytest.approx(0.01)
    assert timing.decode_s == pytest.approx(0.05)


def test_a_prompt_over_the_token_budget_is_computed_in_chunks() -> None:
    engine = Harness(max_batch_tokens=5)
    prompt = list(range(23))
    engine.submit("a", prompt, max_tokens=2)
    engine.run()
    assert max(batch.tokens for batch in engine.runner.batches) == 5
    assert engine.tokens["a"] == reference(prompt, 0, 2, 50)


def test_requests_are_batched_and_decodes_are_never_crowded_out_by_a_long_prompt() -> None:
    engine = Harness(max_batch_tokens=5)
    engine.submit("a", [1], max_tokens=8)
    engine.take(engine.core.step())
    engine.submit("long", list(range(20)), max_tokens=1)
    for _ in range(3):
        engine.take(engine.core.step())
        assert {part.request_id for part in engine.runner.batches[-1].slices} == {"a", "long"}
    assert len(engine.tokens["a"]) == 4


def test_prompts_take_less_of_a_step_in_which_others_decode() -> None:
    engine = Harness(blocks=64, max_batch_tokens=20, mixed_prompt_tokens=6)
    engine.submit("a", list(range(20)), max_tokens=3)
    engine.take(engine.core.step())
    engine.submit("b", [41, *range(13)], max_tokens=1)
    engine.submit("c", [42, *range(13)], max_tokens=1)
    engine.run()
    steps = [{part.request_id: len(part.token_ids) for part in batch.slices} for batch in engine.runner.batches]
    assert steps == [{"a": 20}, {"a": 1, "b": 6}, {"a": 1, "b": 6}, {"b": 2, "c": 14}]
    assert engine.tokens["b"] == reference([41, *range(13)], 0, 1, 50)


def test_a_second_request_reuses_the_first_one_s_full_blocks() -> None:
    engine = Harness()
    prompt = list(range(10))
    engine.submit("a", prompt)
    engine.run()
    engine.submit("b", prompt)
    engine.run()
    assert engine.cached["b"] == 8
    assert engine.tokens["a"] == engine.tokens["b"]


def test_the_last_prompt_token_is_always_computed() -> None:
    engine = Harness()
    engine.submit("a", list(range(8)))
    engine.run()
    engine.submit("b", list(range(8)))
    engine.run()
    assert engine.cached["b"] == 4


def test_output_blocks_are_reused_by_the_next_turn() -> None:
    engine = Harness()
    engine.submit("a", [1, 2, 3, 4], max_tokens=9)
    engine.run()
    engine.submit("b", [1, 2, 3, 4, *engine.tokens["a"], 7], max_tokens=1)
    engine.run()
    assert engine.cached["b"] == 12


def test_another_namespace_reuses_nothing() -> None:
    engine = Harness()
    engine.submit("a", list(range(10)))
    engine.run()
    engine.submit("b", list(range(10)), scope=PrefixScope(Namespace(b"m" * 32), "fake"))
    engine.run()
    assert engine.cached["b"] == 0


def test_a_shared_prefix_in_flight_is_computed_once() -> None:
    engine = Harness(blocks=32, max_batch_tokens=20)
    shared = list(range(16))
    for name in "abcd":
        engine.submit(name, [*shared, 30 + ord(name) % 7], max_tokens=1)
    engine.run()
    assert engine.runner.computed_slots == 16 + 4
    assert engine.core.stats().dedup_waits == 3
    assert [engine.cached[name] for name in "abcd"] == [0, 16, 16, 16]


def test_waiters_go_on_when_the_owner_of_the_prefix_is_aborted() -> None:
    engine = Harness(blocks=32, max_batch_tokens=20)
    shared = list(range(16))
    engine.submit("a", shared)
    engine.submit("b", shared)
    assert engine.core.begin_step()
    assert engine.core.stats().dedup_waits == 1, "b waits for the blocks that a computes"
    engine.core.abort(make_request("a", [1]).request_id)
    engine.take(engine.core.finish_step())
    engine.run()
    assert engine.finish("a") is Finish.ABORT
    assert engine.tokens["b"] == reference(shared, 0, 4, 50)
    assert engine.cached["b"] == 12, "what the owner had computed is not computed again"


def test_memory_pressure_preempts_and_outputs_stay_the_same() -> None:
    engine = Harness(blocks=6, max_running=4)
    prompts = {name: [ord(name) % 50, 2, 3] for name in "abcd"}
    for name, prompt in prompts.items():
        engine.submit(name, prompt, max_tokens=15)
    engine.run()
    assert engine.core.stats().preemptions > 0
    for name, prompt in prompts.items():
        assert engine.tokens[name] == reference(prompt, 0, 15, 50)


def test_a_request_resumes_from_its_output_ids() -> None:
    engine = Harness()
    whole = reference([5, 6], 9, 8, 50)
    engine.submit("a", [5, 6], max_tokens=8, seed=9, output_ids=whole[:5])
    engine.run()
    assert engine.tokens["a"] == whole[5:]


def test_drafts_change_the_number_of_steps_but_never_the_output() -> None:
    plain, drafting = Harness(blocks=64, vocab=2), Harness(blocks=64, vocab=2, draft_tokens=4)
    for engine in (plain, drafting):
        engine.submit("a", [0, 1, 1, 0, 1], max_tokens=40)
        engine.run()
    assert plain.tokens == drafting.tokens
    assert plain.last["a"].logits_digest == drafting.last["a"].logits_digest
    stats = drafting.core.stats()
    assert 0 < stats.accepted_drafts < stats.draft_tokens
    assert len(drafting.runner.batches) < len(plain.runner.batches)


def test_prefill_only_leaves_blocks_and_no_token() -> None:
    engine = Harness()
    engine.submit("p", list(range(12)), work=Work.PREFILL)
    engine.run()
    assert engine.finish("p") is Finish.DONE
    assert engine.tokens["p"] == []
    engine.submit("g", list(range(12)))
    engine.run()
    assert engine.cached["g"] == 8


def test_embed_gives_the_hidden_state_of_the_last_prompt_token() -> None:
    engine = Harness(max_batch_tokens=5)
    engine.submit("e", list(range(13)), work=Work.EMBED)
    engine.run()
    assert engine.last["e"].hidden == (13).to_bytes(4, "little")


def test_stop_tokens_end_a_text_unless_they_come_before_min_tokens() -> None:
    out = reference([1], 0, 10, 50)
    stop = out[3]
    first = out.index(stop)
    engine = Harness()
    engine.submit("a", [1], max_tokens=10, stop_token_ids=(stop,))
    engine.run()
    assert engine.tokens["a"] == out[: first + 1]
    assert engine.last["a"].stop_token
    assert engine.finish("a") is Finish.STOP


def test_the_context_limit_ends_a_request_with_length() -> None:
    engine = Harness(max_len=12, blocks=8)
    engine.submit("a", list(range(8)), max_tokens=100)
    engine.run()
    assert engine.finish("a") is Finish.LENGTH
    assert len(engine.tokens["a"]) == 4


@pytest.mark.parametrize(
    ("kwargs", "code", "field"),
    [
        ({"prompt": [50]}, "invalid_input", "prompt"),
        ({"prompt": [1] * 64}, "too_large", "prompt"),
        ({"prompt": [1] * 40, "max_tokens": 24, "seed": 1}, "too_large", "max_tokens"),
        ({"prompt": [1], "logit_bias": {50: 1.0}}, "invalid_input", "logit_bias"),
        ({"prompt": [1], "output_ids": [77]}, "invalid_input", "output_ids"),
    ],
)
def test_what_cannot_run_is_refused_by_field(kwargs: dict[str, object], code: str, field: str) -> None:
    engine = Harness(blocks=12)
    engine.submit("a", **kwargs)
    error = engine.last["a"].error
    assert error is not None
    assert (error.code, error.field) == (code, field)
    assert engine.core.idle


def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    engine = Harness(max_waiting=2, max_running=1)
    for name in "abc":
        engine.submit(name, [1, 2])
    error = engine.last["c"].error
    assert error is not None
    assert error.code == "overloaded"
    assert error.retry_after_s is not None
    assert error.retry_after_s >= 1
    engine.run()
    assert {engine.finish("a"), engine.finish("b")} == {Finish.LENGTH}


def test_a_draining_engine_finishes_what_it_has_and_takes_nothing() -> None:
    engine = Harness()
    engine.submit("a", [1])
    engine.core.drain()
    engine.submit("b", [1])
    engine.run()
    assert engine.finish("a") is Finish.LENGTH
    error = engine.last["b"].error
    assert error is not None
    assert error.code == "draining"


def test_a_deadline_ends_a_request_in_the_queue_and_in_a_step() -> None:
    engine = Harness(max_running=1)
    engine.submit("a", [1], max_tokens=60, deadline_s=0.05)
    engine.submit("b", [2], max_tokens=60, deadline_s=0.03)
    engine.run()
    assert engine.finish("a") is Finish.DEADLINE
    assert engine.finish("b") is Finish.DEADLINE
    assert engine.core.wait_s() is None


def test_priority_decides_the_order_and_waiting_makes_up_for_it() -> None:
    engine = Harness(max_running=1, ageing_s=1.0)
    engine.submit("first", [1], max_tokens=30)
    engine.take(engine.core.step())
    engine.submit("patient", [2], max_tokens=1, priority=3)
    engine.submit("urgent", [3], max_tokens=1, priority=0)
    engine.clock.advance(5.0)
    engine.submit("late", [4], max_tokens=1, priority=0)
    engine.run()
    ended = list(engine.last)
    assert ended == ["first", "urgent", "patient", "late"]


@pytest.mark.parametrize("during_step", [False, True])
@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted"])
def test_abort_in_every_state_frees_everything(state: str, during_step: bool) -> None:
    engine = Harness(
        blocks=6 if state == "preempted" else 32, max_running=1 if state == "waiting" else 4, max_batch_tokens=4
    )
    shared = list(range(12))
    if state == "waiting":
        engine.submit("other", [9], max_tokens=6)
        engine.submit("victim", [1, 2])
        engine.take(engine.core.step())
    elif state == "prefilling":
        engine.submit("victim", shared)
        engine.take(engine.core.step())
    elif state == "decoding":
        engine.submit("victim", [1], max_tokens=40)
        engine.take(engine.core.step())
    else:
        engine.submit("other", [9, 9, 9], max_tokens=15)
        engine.submit("victim", [1, 2, 3], max_tokens=15)
        while engine.core.stats().preemptions == 0:
            engine.take(engine.core.step())
    victim = make_request("victim", [1]).request_id
    before = engine.core.stats().blocks_leased
    if during_step:
        assert engine.core.begin_step()
        engine.core.abort(victim)
        engine.take(engine.core.finish_step())
    else:
        engine.core.abort(victim)
        if state in {"prefilling", "decoding"}:
            assert engine.core.stats().blocks_leased < before
        engine.take(engine.core.collect())
    assert engine.finish("victim") is Finish.ABORT
    engine.run()
    assert engine.core.stats().blocks_leased == 0


def test_abort_of_a_request_that_waits_for_an_in_flight_prefix() -> None:
    """The fifth state: blocked, which lasts while the owner's step is under way."""
    engine = Harness(blocks=32, max_batch_tokens=20)
    shared = list(range(16))
    engine.submit("other", shared, max_tokens=3)
    engine.submit("victim", shared)
    assert engine.core.begin_step()
    assert engine.core.stats().dedup_waits == 1
    engine.core.abort(make_request("victim", [1]).request_id)
    assert engine.core.stats().waiting == 0
    engine.take(engine.core.finish_step())
    assert engine.finish("victim") is Finish.ABORT
    engine.run()
    assert engine.finish("other") is Finish.LENGTH
    assert engine.core.stats().blocks_leased == 0


def test_blocks_freed_by_an_abort_during_a_step_are_not_reused_within_it() -> None:
    engine = Harness(blocks=4)
    engine.submit("a", list(range(12)), max_tokens=1)
    assert engine.core.begin_step()
    engine.core.abort(make_request("a", [1]).request_id)
    assert engine.core.stats().blocks_leased == 3
    engine.take(engine.core.finish_step())
    assert engine.core.stats().blocks_leased == 0


def test_two_sequences_that_computed_the_same_block_share_it_afterwards() -> None:
    """Found by the state machine: a private copy under a shared child left a cached block that could not be evicted."""
    engine = Harness(blocks=5, vocab=2, max_running=2, max_batch_tokens=4)
    engine.submit("a", [0], max_tokens=1)
    engine.submit("b", [0, 0, 0], max_tokens=1)
    engine.submit("c", [0, 0, 0], max_tokens=12)
    engine.submit("d", [0], max_tokens=12)
    engine.run()
    assert engine.tokens["c"] == reference([0, 0, 0], 0, 12, 2)
    assert engine.tokens["d"] == reference([0], 0, 12, 2)
