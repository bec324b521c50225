"""Structured output as the engine sees it: sessions and the process behind them, driven by `pump`, which never waits.

The process is started when the first constrained request comes and kept. While it loads or is started anew, constrained
outputs wait and everything else goes on.
"""

from collections.abc import Callable

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import EngineFailed, IsthmusError, Unsupported
from isthmus.contracts.events import ModelInfo
from isthmus.contracts.ids import RequestId
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.grammar.client import GrammarProcess, Process
from isthmus.execution.inference.grammar.messages import Answer, Loaded, Masks, Refused, Setup, Stepped, to_error
from isthmus.execution.inference.grammar.sessions import FIELD, GrammarCounters, Sessions
from isthmus.execution.inference.grammar.settings import GrammarSettings

GRACE_S = 0.002
"""How long a step may wait for masks that are under way: less than a step, more than most masks take."""
MAX_START_DEATHS = 3


class Grammars:
    """Masks for constrained requests. `tokenizer` is the path of the model's tokenizer.json.

    `pump` is to be called whenever `fileno` is readable (or writable, while `sending`), at `deadline`, and before and
    after each step; it returns the requests that cannot go on.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: str,
        settings: GrammarSettings,
        clock: Clock,
        *,
        most_open: int,
        draft_tokens: int = 0,
        spawn: Callable[[int], Process] = GrammarProcess.spawn,
    ) -> None:
        self._info = info
        self._settings = settings
        self._clock = clock
        self._draft_tokens = draft_tokens
        self._spawn = spawn
        self._sessions = Sessions(settings, most_open)
        cpu_s = int(settings.compile_s + settings.step_s) + 2
        self._setup = Setup(tokenizer, info.vocab_size, info.eos_token_ids, cpu_s)
        self._process: Process | None = None
        self._started = 0.0
        self._loaded = False
        self._start_deaths = 0
        self._unusable: IsthmusError | None = None

    # ---- for the scheduler

    def refuse(self, request: EngineRequest) -> IsthmusError | None:
        """Why a constrained request cannot be taken at all, None to take it."""
        if self._unusable is not None:
            return self._unusable
        if not self._info.eos_token_ids:
            return Unsupported("this model has no end token, so its output cannot be constrained", FIELD)
        if request.sampling.ignore_eos:
            return Unsupported("ignore_eos does not go with a constraint, which decides about the end", "ignore_eos")
        return None

    def open(self, request: EngineRequest, guesses: list[int]) -> None:
        """Take a constrained request."""
        if request.constraint is None:
            raise ValueError("the request has no constraint")
        params = request.sampling
        self._sessions.open(
            request.request_id,
            request.constraint,
            request.output_ids,
            self._clock.monotonic(),
            banned=tuple({*self._info.eos_token_ids, *params.stop_token_ids}),
            banned_until=params.min_tokens,
            guesses=guesses,
            limit=self._draft_tokens,
        )

    def advance(self, request_id: RequestId, token_ids: list[int], guesses: list[int]) -> None:
        """Tokens were chosen for a constrained request that goes on."""
        self._sessions.advance(request_id, token_ids, guesses, self._clock.monotonic())

    def ready(self, request_id: RequestId) -> bool:
        """Whether the request may sample."""
        return self._sessions.ready(request_id)

    def part(self, request_id: RequestId, most: int) -> tuple[list[int], list[bytes]]:
        """At most `most` drafts, and the masks of the positions before, between and after them."""
        return self._sessions.part(request_id, most)

    def close(self, request_id: RequestId) -> None:
        """A request ended; unknown ids are ignored."""
        self._sessions.close(request_id)

    # ---- for the loop

    def pump(self) -> list[tuple[RequestId, IsthmusError]]:
        """Read, decide, send; see the class."""
        now = self._clock.monotonic()
        if self._process is not None:
            self._read(self._process, now)
        if self._process is not None and (self._sessions.overdue(now) or self._start_overdue(now)):
            self._end(now)
        if self._process is None and self._sessions.waiting:
            self._start(now)
        if self._process is not None and self._loaded:
            questions = self._sessions.questions(now)
            if questions:
                self._process.send(questions)
        return self._sessions.failures()

    @property
    def fileno(self) -> int | None:
        """What to watch, None without a process."""
        return None if self._process is None else self._process.fileno()

    @property
    def sending(self) -> bool:
        """Whether to watch for writing, too."""
        return self._process is not None and self._process.sending

    def deadline(self) -> float | None:
        """When `pump` has to be called at the latest."""
        if self._process is not None and not self._loaded:
            return self._started + self._settings.start_s
        return self._sessions.deadline()

    def grace_s(self) -> float:
        """How long the loop may wait for masks before a step that could do without."""
        return GRACE_S if self._sessions.stepping else 0.0

    @property
    def counters(self) -> GrammarCounters:
        """What was counted since the start."""
        return self._sessions.counters

    @property
    def process(self) -> Process | None:
        """The process, None before the first constrained request."""
        return self._process

    def shut(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    # ---- inside

    def _start(self, now: float) -> None:
        try:
            self._process = self._spawn(self._settings.memory_bytes)
        except OSError as error:
            self._sessions.fail_all(EngineFailed(f"the grammar process cannot be started: {error.strerror}"))
            return
        self._started, self._loaded = now, False
        self._process.send([self._setup])

    def _read(self, process: Process, now: float) -> None:
        answers = process.receive()
        try:
            for answer in answers or ():
                self._take(answer, now)
        except EngineFailed:
            answers = None  # it broke the protocol: as good as gone
        if answers is None:
            self._end(now)

    def _take(self, answer: Answer, now: float) -> None:
        match answer:
            case Loaded():
                self._loaded, self._start_deaths = True, 0
            case Stepped():
                for part in answer.parts:
                    self._check(part)
                    self._sessions.take(part, now)
            case Refused() if answer.session:
                self._sessions.refuse(answer, now)
            case Refused():
                self._unusable = to_error(answer.error)
                self._sessions.fail_all(self._unusable)

    def _check(self, part: Masks) -> None:
        """Raise `EngineFailed` for masks that would break the step of everybody."""
        words = -(-self._info.vocab_size // 32)
        sized = all(len(mask) == words * 4 for mask in part.masks) and len(part.masks) == len(part.drafts) + 1
        known = all(0 <= draft < self._info.vocab_size for draft in part.drafts)
        if not (sized and known and len(part.drafts) <= self._draft_tokens):
            raise EngineFailed("the grammar process sent masks of a wrong size")

    def _start_overdue(self, now: float) -> bool:
        return not self._loaded and now >= self._started + self._settings.start_s

    def _end(self, now: float) -> None:
        """End what is left of the process, and settle what it leaves behind."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        if self._unusable is not None:
            return
        if self._loaded:
            self._sessions.lost(now)
        else:
            self._start_deaths += 1
            if self._start_deaths >= MAX_START_DEATHS:
                self._start_deaths = 0
                self._sessions.fail_all(EngineFailed("the grammar process does not start"))
        self._loaded = False
