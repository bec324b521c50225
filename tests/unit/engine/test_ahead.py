"""Overlapped scheduling: the step after the one under way, handed in before that one's tokens are known."""

import pytest
from tests.support.fake_runner import FakeRunner, fake_info, fake_states, reference
from tests.support.requests import make_request

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.events import Finish, RequestOutput
from isthmus.contracts.requests import Work
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.settings import SchedulerSettings


class Engine:
    """An engine on a fake that runs steps late or at once."""

    def __init__(self, *, eager: bool, blocks: int = 32, hybrid: bool = False, **settings: object) -> None:
        states = fake_states(8) if hybrid else None
        self.runner = FakeRunner(fake_info(blocks, vocab=50, max_len=64, states=states), eager=eager)
        self.rung = 0
        limits = SchedulerSettings(**({"max_batch_tokens": 16, "max_running": 4} | settings))  # type: ignore[arg-type]
        self.core = EngineCore(self.runner, limits, ManualClock(), wake=self.ring)
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Finish] = {}

    def ring(self) -> None:
        self.rung += 1

    def submit(self, *args: object, **kwargs: object) -> None:
        assert self.core.submit(make_request(*args, **kwargs)) is None  # type: ignore[arg-type]

    def step(self) -> None:
        assert self.core.begin_step()
        self.take(self.core.finish_step())

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish is not None:
                self.ended[output.request_id] = output.finish
        self.core.check()

    def run(self) -> None:
        while not self.core.idle:
            self.step()

    @property
    def ahead(self) -> int:
        """Steps handed in ahead and not taken back."""
        return sum(batch.ahead for batch in self.runner.batches)


@pytest.fixture(params=[False, True], ids=["late", "at once"])
def eager(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_decoding_is_scheduled_ahead_and_gives_the_same_tokens(eager: bool) -> None:
    engine = Engine(eager=eager)
    engine.submit("a", [1, 2, 3], max_tokens=9)
    engine.submit("b", [4, 5, 6, 7], max_tokens=5, seed=2)
    engine.run()
    assert engine.tokens == {"a": reference([1, 2, 3], 0, 9, 50), "b": reference([4, 5, 6, 7], 2, 5, 50)}
    # All but the step of the prompts: how many tokens are wanted is known, so that no step is in vain.
    assert engine.ahead == engine.core.stats().steps_ahead == 8
    assert engine.core.stats().steps == 9
    assert engine.rung == 9
    assert engine.core.stats().blocks_leased == 0


def test_without_overlap_nothing_is_scheduled_ahead(eager: bool) -> None:
    engine = Engine(eager=eager, overlap=False)
    engine.submit("a", [1, 2, 3], max_tokens=9)
    engine.run()
    assert engine.tokens["a"] == reference([1, 2, 3], 0, 9, 50)
    assert engine.ahead == 0


@pytest.mark.parametrize(
    ("settings", "request_"),
    [
        ({"draft_tokens": 2}, {}),
        ({"hybrid": True}, {}),
        ({}, {"presence_penalty": 0.5}),
        ({}, {"work": Work.EMBED}),
        ({}, {"max_tokens": 1}),
    ],
    ids=["drafts", "hybrid", "penalties", "embedding", "one token"],
)
def test_what_depends_on_the_tokens_is_not_scheduled_ahead(
    settings: dict[str, object], request_: dict[str, object], eager: bool
) -> None:
    engine = Engine(eager=eager, **settings)  # type: ignore[arg-type]
    engine.submit("a", [1, 2, 3], **({"max_tokens": 6} | request_))
    engine.run()
    assert engine.ahead == 0


def test_a_long_prompt_is_not_scheduled_ahead_until_its_last_chunk(eager: bool) -> None:
    engine = Engine(eager=eager, max_batch_tokens=5, max_running=2)
    engine.submit("a", list(range(12)), max_tokens=3)
    engine.step()
    engine.step()
    assert engine.ahead == 0
    engine.run()
    assert engine.ahead == 2
    assert engine.tokens["a"] == reference(list(range(12)), 0, 3, 50)


def test_an_end_that_could_not_be_foreseen_costs_one_step_in_vain(eager: bool) -> None:
    tokens = reference([1, 2, 3], 0, 10, 50)
    stop = tokens[2]
    assert stop not in tokens[:2]
    engine = Engine(eager=eager)
    engine.submit("a", [1, 2, 3], max_tokens=10, stop_token_ids=[stop])
    while "a" not in engine.ended:
        engine.step()
    assert engine.tokens["a"] == tokens[:3]
    assert engine.core.stats().blocks_leased == 0, "the blocks are free before the step in vain is done"
    assert not engine.core.idle
    # The name may come again at once, and the step in vain is not mistaken for the new request's.
    again = {"max_tokens": 4, "seed": 5}
    engine.ended.clear()
    engine.tokens.clear()
    engine.submit("a", [9, 8, 7, 6, 5], **again)
    engine.run()
    assert engine.tokens["a"] == reference([9, 8, 7, 6, 5], 5, 4, 50)


def test_a_request_that_arrives_takes_back_the_step_that_has_not_begun() -> None:
    engine = Engine(eager=False)
    engine.submit("a", [1, 2, 3], max_tokens=9)
    engine.step()
    assert engine.core.begin_step()
    assert engine.ahead == 2
    engine.submit("b", [4, 5, 6, 7], max_tokens=2)
    assert engine.ahead == 1
    assert engine.core.stats().steps_ahead == 0, "a step is counted when it is done: the count never falls"
    engine.take(engine.core.finish_step())
    assert not engine.core.stepping
    assert engine.core.begin_step()
    assert {part.request_id: len(part.token_ids) for part in engine.runner.batches[-2].slices} == {"a": 1, "b": 4}
    engine.run()
    assert engine.tokens == {"a": reference([1, 2, 3], 0, 9, 50), "b": reference([4, 5, 6, 7], 0, 2, 50)}


def test_a_step_that_has_begun_is_not_taken_back() -> None:
    engine = Engine(eager=True)
    engine.submit("a", [1, 2, 3], max_tokens=9)
    engine.step()
    assert engine.core.begin_step()
    had = engine.ahead
    engine.submit("b", [4, 5, 6, 7], max_tokens=2)
    assert engine.ahead == had
    engine.run()
    assert engine.tokens == {"a": reference([1, 2, 3], 0, 9, 50), "b": reference([4, 5, 6, 7], 0, 2, 50)}


def test_an_abort_ends_a_request_that_is_part_of_two_steps(eager: bool) -> None:
    engine = Engine(eager=eager)
    engine.submit("a", [1, 2, 3], max_tokens=9)
    engine.submit("b", [4, 5, 6, 7], max_tokens=9)
    engine.step()
    assert engine.core.begin_step()
    engine.core.abort(make_request("a", [1]).request_id)
    engine.run()
    assert engine.ended == {"a": Finish.ABORT, "b": Finish.LENGTH}
    assert len(engine.tokens["a"]) <= 2
    assert engine.tokens["b"] == reference([4, 5, 6, 7], 0, 9, 50)


def test_without_room_for_the_next_token_nothing_is_scheduled_ahead(eager: bool) -> None:
    engine = Engine(eager=eager, blocks=2)
    engine.submit("a", [1, 2, 3, 4, 5], max_tokens=3)
    engine.submit("b", [6, 7, 8], max_tokens=2)
    engine.run()
    assert engine.tokens == {"a": reference([1, 2, 3, 4, 5], 0, 3, 50), "b": reference([6, 7, 8], 0, 2, 50)}


def test_min_tokens_is_kept_by_steps_scheduled_ahead(eager: bool) -> None:
    engine = Engine(eager=eager)
    engine.submit("a", [1, 2, 3], max_tokens=6, min_tokens=4, stop_token_ids=[7])
    engine.run()
    banned = {
        part.sample.index: part.sample.banned
        for batch in engine.runner.batches
        for part in batch.slices
        if part.sample is not None
    }
    assert banned == {0: (7,), 1: (7,), 2: (7,), 3: (7,), 4: (), 5: ()}
