"""Structured output as the engine sees it, with a stand-in for the process: starts, deaths, broken protocol."""

import msgspec
import pytest
from tests.support.fake_runner import fake_info
from tests.support.requests import make_request

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import EngineFailed, InvalidInput, Unsupported
from isthmus.contracts.events import ErrorInfo
from isthmus.contracts.ids import RequestId
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.grammar.messages import (
    Advance,
    Answer,
    Loaded,
    Masks,
    Open,
    Question,
    Refused,
    Stepped,
)
from isthmus.execution.inference.grammar.service import MAX_START_DEATHS, Grammars
from isthmus.execution.inference.grammar.settings import GrammarSettings

INFO = msgspec.structs.replace(fake_info(vocab=40), eos_token_ids=[1])
MASK = b"\xff" * 8
ID = RequestId("a")


class FakeProcess:
    """Keeps what it is asked; answers what the test puts into `answers`."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.answers: list[Answer] | None = []
        self.killed = False
        self.sending = False

    def send(self, questions: list[Question]) -> None:
        self.questions += questions

    def receive(self) -> list[Answer] | None:
        answers, self.answers = self.answers, [] if self.answers is not None else None
        return answers

    def fileno(self) -> int:
        return 0

    def kill(self) -> None:
        self.killed = True


class World:
    def __init__(self, **options: object) -> None:
        self.clock = ManualClock(10.0)
        self.processes: list[FakeProcess] = []
        self.grammars = Grammars(
            INFO, "/nowhere/tokenizer.json", GrammarSettings(), self.clock, most_open=4, spawn=self.spawn, **options
        )  # type: ignore[arg-type]

    def spawn(self, memory_bytes: int) -> FakeProcess:
        self.processes.append(FakeProcess())
        return self.processes[-1]

    @property
    def process(self) -> FakeProcess:
        return self.processes[-1]

    def say(self, *answers: Answer) -> dict[RequestId, Exception]:
        self.process.answers = list(answers)
        return dict(self.grammars.pump())

    def opened(self, request: EngineRequest) -> int:
        """Open `request` on a loaded process; its session."""
        self.grammars.open(request, [])
        self.grammars.pump()
        self.say(Loaded())
        return next(one.session for one in reversed(self.process.questions) if isinstance(one, Open))


def request(name: str = "a", **options: object) -> EngineRequest:
    made = make_request(name, [2, 3], **options)  # type: ignore[arg-type]
    return msgspec.structs.replace(made, constraint=Constraint(ConstraintKind.REGEX, "x"))


def test_no_process_until_somebody_needs_one_and_nothing_is_asked_before_it_loaded() -> None:
    world = World()
    assert world.grammars.pump() == []
    assert world.processes == []
    assert world.grammars.fileno is None
    world.grammars.open(request(), [])
    world.grammars.pump()
    assert [type(one).__name__ for one in world.process.questions] == ["Setup"]
    world.say(Loaded())
    assert isinstance(world.process.questions[-1], Open)


def test_requests_that_no_grammar_can_end_are_refused() -> None:
    world = World()
    assert world.grammars.refuse(request()) is None
    ignoring = world.grammars.refuse(request(ignore_eos=True))
    assert isinstance(ignoring, Unsupported)
    assert ignoring.field == "ignore_eos"
    endless = Grammars(fake_info(), "", GrammarSettings(), world.clock, most_open=1)
    assert isinstance(endless.refuse(request()), Unsupported)


def test_a_tokenizer_that_is_not_accepted_refuses_for_good() -> None:
    world = World()
    world.grammars.open(request(), [])
    world.grammars.pump()
    failed = world.say(Refused(0, ErrorInfo("unsupported", "no such tokenizer", "constraint")))
    assert isinstance(failed[ID], Unsupported)
    world.process.answers = None
    assert world.grammars.pump() == []
    assert isinstance(world.grammars.refuse(request("b")), Unsupported)
    assert len(world.processes) == 1


def test_a_process_that_does_not_start_fails_who_waits_and_the_next_one_tries_again() -> None:
    world = World()
    world.grammars.open(request(), [])
    for _ in range(MAX_START_DEATHS):
        assert world.grammars.pump() == []
        world.process.answers = None
    failed = dict(world.grammars.pump())
    assert isinstance(failed[ID], EngineFailed)
    assert len(world.processes) == MAX_START_DEATHS
    world.opened(request("b"))


def test_a_start_has_a_deadline() -> None:
    world = World()
    world.grammars.open(request(), [])
    world.grammars.pump()
    assert world.grammars.deadline() == 70.0
    world.clock.advance(60.0)
    world.grammars.pump()
    assert world.processes[0].killed


def test_a_deadline_kills_and_the_engines_clock_measures_it() -> None:
    world = World()
    world.opened(request())
    assert world.grammars.deadline() == 15.0
    world.clock.advance(5.0)
    failed = dict(world.grammars.pump())
    assert isinstance(failed[ID], InvalidInput)
    assert world.processes[0].killed
    assert world.grammars.counters.grammar_restarts == 1


def test_an_answer_that_is_here_beats_the_deadline() -> None:
    """A long step kept the engine from reading; the process was in time."""
    world = World()
    session = world.opened(request())
    world.clock.advance(60.0)
    assert world.say(Stepped([Masks(session, [], [MASK])])) == {}
    assert world.grammars.ready(ID)
    assert not world.process.killed


@pytest.mark.parametrize(
    "part",
    [
        Masks(1, [], [MASK[:4]]),
        Masks(1, [], []),
        Masks(1, [5], [MASK]),
        Masks(1, [40], [MASK, MASK]),
        Masks(1, [5, 5, 5], [MASK] * 4),
        Masks(9, [], [MASK]),
    ],
)
def test_masks_that_would_break_a_step_cost_the_process_its_life(part: Masks) -> None:
    world = World(draft_tokens=2)
    assert world.opened(request()) == 1
    world.say(Stepped([part]))
    assert world.processes[0].killed
    assert not world.grammars.ready(ID)
    assert world.grammars.fileno is not None, "a new one was started"


def test_steps_go_out_at_once_and_a_loop_may_wait_a_little_for_them() -> None:
    world = World()
    session = world.opened(request())
    world.say(Stepped([Masks(session, [], [MASK])]))
    assert world.grammars.grace_s() == 0.0
    world.grammars.advance(ID, [7], [])
    world.grammars.pump()
    assert isinstance(world.process.questions[-1], Advance)
    assert world.grammars.grace_s() > 0.0
