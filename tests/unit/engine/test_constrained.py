"""Constrained requests in the engine core: who waits for masks, who does not, and how such a request ends."""

import msgspec
from tests.support.fake_runner import FakeRunner, fake_info
from tests.support.requests import make_request

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.events import ErrorInfo, Finish, RequestOutput
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.batch import SequenceSlice, SliceResult
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.grammar.messages import (
    Advance,
    Answer,
    Close,
    Loaded,
    Masks,
    Open,
    Question,
    Refused,
    Setup,
    Stepped,
)
from isthmus.execution.inference.grammar.service import Grammars
from isthmus.execution.inference.grammar.settings import GrammarSettings
from isthmus.execution.inference.settings import SchedulerSettings

VOCAB, END = 32, 31
NO = ErrorInfo("unsupported", "no", "constraint")
COUNT = 6  # tokens that the grammar wants before the end


class MaskedRunner(FakeRunner):
    """Chooses the first allowed token after the one that the fake model would say."""

    def compute(self, part: SequenceSlice) -> SliceResult:
        plain = super().compute(part)
        task = part.sample
        if task is None or task.masks is None:
            return plain
        assert len(task.masks) == part.drafts + 1
        wanted = list(part.token_ids[len(part.token_ids) - part.drafts :]) if part.drafts else []
        out: list[int] = []
        for place, mask in enumerate(task.masks):
            bits = int.from_bytes(mask, "little")
            assert bits, "a mask that allows nothing must not come here"
            start = (7 * (task.index + place) + task.params.seed) % VOCAB
            out.append(next((start + n) % VOCAB for n in range(VOCAB) if bits >> (start + n) % VOCAB & 1))
            if place < len(wanted) and wanted[place] != out[-1]:
                break
        return SliceResult(out, len(out) - 1)


class Process:
    """A grammar in Python: `COUNT` tokens, at place i those that leave i % 3 over 3; then the end."""

    def __init__(self) -> None:
        self.outputs: dict[int, list[int]] = {}
        self.waiting: list[Answer] = []
        self.questions: list[Question] = []
        self.held = False
        self.refusing = False
        self.alive = True
        self.sending = False

    def send(self, questions: list[Question]) -> None:
        for question in questions:
            self.questions.append(question)
            match question:
                case Setup():
                    self.waiting.append(Loaded())
                case Open() if self.refusing:
                    self.waiting.append(Refused(question.session, NO))
                case Advance() if self.refusing:
                    self.waiting += [Refused(step.session, NO) for step in question.steps]
                case Open():
                    self.outputs[question.session] = list(question.output_ids)
                    self.waiting.append(Stepped([self.look(question.session, question.limit)]))
                case Advance():
                    for step in question.steps:
                        self.outputs[step.session] += step.token_ids
                    self.waiting.append(Stepped([self.look(one.session, one.limit) for one in question.steps]))
                case Close():
                    for session in question.sessions:
                        del self.outputs[session]
                case _:
                    raise AssertionError(question)

    def look(self, session: int, limit: int) -> Masks:
        start = len(self.outputs[session])
        drafts = [3 + (start + n) % 3 for n in range(min(limit, max(0, COUNT - start)))]
        return Masks(session, drafts, [self.mask(start + n) for n in range(len(drafts) + 1)])

    def mask(self, place: int) -> bytes:
        allowed = [END] if place >= COUNT else [token for token in range(VOCAB - 1) if token % 3 == place % 3]
        return sum(1 << token for token in allowed).to_bytes(4, "little")

    def receive(self) -> list[Answer] | None:
        if not self.alive:
            return None
        if self.held:
            return []
        answers, self.waiting = self.waiting, []
        return answers

    def fileno(self) -> int:
        return 0

    def kill(self) -> None:
        self.alive = False


class World:
    def __init__(self, blocks: int = 16, **settings: int) -> None:
        info = msgspec.structs.replace(fake_info(blocks=blocks, vocab=VOCAB, exact=False), eos_token_ids=[END])
        self.clock = ManualClock(100.0)
        self.processes: list[Process] = []
        drafts = settings.get("draft_tokens", 0)
        self.grammars = Grammars(
            info, "", GrammarSettings(), self.clock, most_open=8, draft_tokens=drafts, spawn=self.spawn
        )
        self.runner = MaskedRunner(info)
        chosen = SchedulerSettings(**({"max_batch_tokens": 32, "max_running": 8, "max_waiting": 8} | settings))
        self.core = EngineCore(self.runner, chosen, self.clock, self.grammars)
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, RequestOutput] = {}

    def spawn(self, memory_bytes: int) -> Process:
        self.processes.append(Process())
        return self.processes[-1]

    @property
    def process(self) -> Process:
        return self.processes[-1]

    def submit(self, name: str, constrained: bool = True, prompt: int = 6, **options: object) -> RequestOutput | None:
        request: EngineRequest = make_request(name, list(range(prompt)), **{"max_tokens": 20, **options})  # type: ignore[arg-type]
        if constrained:
            request = msgspec.structs.replace(request, constraint=Constraint(ConstraintKind.REGEX, "x"))
        return self.core.submit(request)

    def run(self, steps: int = 40) -> None:
        for _ in range(steps):
            for output in self.core.step():
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish is not None:
                    assert output.request_id not in self.ends
                    self.ends[output.request_id] = output
            self.core.check()


def kept(tokens: list[int]) -> bool:
    return len(tokens) == COUNT + 1 and tokens[-1] == END and all(t % 3 == n % 3 for n, t in enumerate(tokens[:-1]))


def test_constrained_outputs_keep_their_masks_and_end_with_stop() -> None:
    world = World()
    for name in ("a", "b", "c"):
        world.submit(name, seed=ord(name))
    world.run()
    for name in ("a", "b", "c"):
        assert kept(world.tokens[name]), world.tokens[name]
        assert world.ends[name].finish is Finish.STOP
    assert world.process.outputs == {} or world.core.step() == []
    world.core.step()
    assert world.process.outputs == {}, "ended sessions are closed"
    assert world.core.stats().constrained == 3


def test_others_go_on_while_a_constrained_one_waits() -> None:
    world = World()
    world.submit("held")
    world.core.step()
    world.process.held = True
    world.submit("free", constrained=False, max_tokens=5)
    world.run(12)
    assert world.ends["free"].finish is Finish.LENGTH
    assert "held" not in world.ends
    assert not world.core.begin_step()
    assert world.core.wait_s() is not None
    world.process.held = False
    world.run()
    assert kept(world.tokens["held"])


def test_drafts_of_the_grammar_give_several_tokens_a_step_and_the_same_output() -> None:
    outputs = []
    for drafts in (0, 3):
        world = World(draft_tokens=drafts)
        for name in ("a", "b"):
            world.submit(name, seed=ord(name))
        world.run()
        outputs.append((world.tokens["a"], world.tokens["b"]))
        assert all(kept(one) for one in outputs[-1])
    assert outputs[0] == outputs[1]


def test_preempted_and_resumed_outputs_keep_their_constraint() -> None:
    world = World(blocks=5)
    for name in ("a", "b", "c"):
        world.submit(name, seed=ord(name), prompt=5, max_tokens=12)
    world.run(80)
    assert all(kept(world.tokens[name]) for name in ("a", "b", "c")), world.tokens
    again = World()
    again.submit("a", seed=ord("a"), prompt=5, output_ids=world.tokens["a"][:3])
    again.run()
    assert again.tokens["a"] == world.tokens["a"][3:]


def test_a_process_that_dies_is_replaced_and_nobody_notices() -> None:
    calm, world = World(), World()
    for one in (calm, world):
        one.submit("a", seed=5)
        one.submit("b", seed=6)
    calm.run()
    for _ in range(3):
        world.run(4)  # started, loaded, opened, one token
        world.process.kill()
    world.run()
    assert world.tokens == calm.tokens
    assert len(world.processes) > 2


def test_who_cannot_go_on_is_rejected_before_and_an_error_after_its_first_token() -> None:
    world = World()
    world.submit("a")
    world.core.step()
    world.process.refusing = True
    world.run(3)
    assert world.ends["a"].finish is Finish.REJECTED
    assert world.ends["a"].error == NO
    world.process.refusing = False
    world.submit("b")
    world.run(3)
    assert world.tokens["b"]
    world.process.refusing = True
    world.run(3)
    assert world.ends["b"].finish is Finish.ERROR
    assert world.ends["b"].error == NO
    assert world.core.idle


def test_min_tokens_that_the_grammar_cannot_reach_ends_with_the_reason() -> None:
    world = World()
    world.submit("a", min_tokens=COUNT + 3)
    world.run()
    assert world.ends["a"].finish is Finish.ERROR
    assert world.ends["a"].error is not None
    assert world.ends["a"].error.field == "min_tokens"
    assert len(world.tokens["a"]) == COUNT


def test_a_deadline_and_an_abort_end_a_request_that_waits_for_masks() -> None:
    world = World()
    world.submit("late", deadline_s=1.0)
    world.submit("gone")
    world.core.step()
    world.process.held = True
    world.core.abort("gone")  # type: ignore[arg-type]
    world.clock.advance(1.0)
    world.run(2)
    assert world.ends["late"].finish is Finish.DEADLINE
    assert world.ends["gone"].finish is Finish.ABORT
    assert world.core.idle


def test_an_engine_without_grammars_refuses_constraints() -> None:
    world = World()
    core = EngineCore(world.runner, SchedulerSettings(), world.clock)
    request = make_request("a", [1])
    refused = core.submit(msgspec.structs.replace(request, constraint=Constraint(ConstraintKind.REGEX, "x")))
    assert refused is not None
    assert refused.error is not None
    assert refused.error.code == "unsupported"
    assert core.submit(request) is None
