"""The constrained outputs of an engine, and what to ask the grammar process next. Pure: no I/O, time passed in.

    QUEUED ──Open──> OPENING ──> READY ──tokens──> DUE ──Advance──> STEPPING ──> READY ...
       ^                                            │
       └─────── the process was started anew ───────┘      READY: masks for the next position are here

Promises: masks are for exactly the tokens told so far; a process that was started anew is told each output again, which
its request does not notice; a constraint that is over a time, or ends the process twice, ends its own request with the
reason and nobody else's; what ends while it is unanswered is closed as soon as it is answered.
"""

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.contracts.constraints import Constraint
from isthmus.contracts.errors import EngineFailed, InvalidInput, IsthmusError
from isthmus.contracts.ids import RequestId
from isthmus.execution.inference.grammar.messages import (
    Advance,
    Close,
    Masks,
    Open,
    Question,
    Refused,
    Step,
    to_error,
)
from isthmus.execution.inference.grammar.settings import GrammarSettings

FIELD = "constraint"
MAX_OPENING_DEATHS = 2
"""The process died so often while it compiled one constraint and nothing else is known to be wrong: that is why."""
MAX_STEPPING_DEATHS = 8
"""The same for steps, where several sessions are under suspicion; each is then opened anew, alone."""


class Phase(enum.Enum):
    """See the module's picture."""

    QUEUED = "queued"
    OPENING = "opening"
    READY = "ready"
    DUE = "due"
    STEPPING = "stepping"


@dataclass(slots=True, eq=False)
class Session:
    """One constrained output."""

    number: int
    id: RequestId
    constraint: Constraint
    output: list[int]
    banned: tuple[int, ...]
    banned_until: int
    limit: int
    since: float
    guesses: list[int]
    phase: Phase = Phase.QUEUED
    told: int = 0  # output tokens that the process knows
    live: bool = False  # whether the process has it
    closed: bool = False
    drafts: list[int] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)
    opening_deaths: int = 0
    stepping_deaths: int = 0


@dataclass(slots=True)
class GrammarCounters:
    """Since the start; names as in `EngineStats`. `mask_wait_s` sums what outputs waited for masks."""

    constrained: int = 0
    grammar_refused: int = 0
    grammar_restarts: int = 0
    masks_computed: int = 0
    mask_wait_s: float = 0.0


class Sessions:
    """Implements the module's picture. At most `most_open` are compiled at a time; the others queue."""

    def __init__(self, settings: GrammarSettings, most_open: int) -> None:
        self._settings = settings
        self._most_open = most_open
        self._all: dict[RequestId, Session] = {}
        self._queue: deque[Session] = deque()
        self._due: dict[int, Session] = {}
        self._opening: Session | None = None
        self._opening_since = 0.0
        self._stepping: dict[int, Session] = {}
        self._stepping_since = 0.0
        self._forget: list[int] = []
        self._open_count = 0
        self._numbers = 0
        self._failed: list[tuple[RequestId, IsthmusError]] = []
        self.counters = GrammarCounters()

    # ---- what the engine tells and asks

    def open(
        self,
        request_id: RequestId,
        constraint: Constraint,
        output: Sequence[int],
        now: float,
        *,
        banned: tuple[int, ...] = (),
        banned_until: int = 0,
        guesses: Sequence[int] = (),
        limit: int = 0,
    ) -> None:
        """A request that is constrained. `banned` tokens are not allowed at output indexes below `banned_until`; at
        most `limit` drafts come with its masks.
        """
        self._numbers += 1
        session = Session(
            self._numbers, request_id, constraint, list(output), banned, banned_until, limit, now, list(guesses)
        )
        self._all[request_id] = session
        self._queue.append(session)
        self.counters.constrained += 1

    def advance(self, request_id: RequestId, token_ids: Sequence[int], guesses: Sequence[int], now: float) -> None:
        """Tokens were chosen; masks for the position after them are wanted. `guesses` may come there."""
        session = self._all.get(request_id)
        if session is None:
            return
        session.output += token_ids
        session.masks, session.drafts, session.guesses, session.since = [], [], list(guesses), now
        if session.live:
            session.phase = Phase.DUE
            self._due[session.number] = session
        else:
            self._requeue(session)

    def ready(self, request_id: RequestId) -> bool:
        """Whether masks for the next position are here."""
        session = self._all.get(request_id)
        return session is not None and session.phase is Phase.READY

    def part(self, request_id: RequestId, most: int) -> tuple[list[int], list[bytes]]:
        """At most `most` drafts for the next positions, and a mask before each and after the last. Only when ready."""
        session = self._all[request_id]
        drafts = session.drafts[: max(0, most)]
        return drafts, session.masks[: len(drafts) + 1]

    def close(self, request_id: RequestId) -> None:
        """The request ended. Unknown ids are ignored."""
        session = self._all.pop(request_id, None)
        if session is None:
            return
        session.closed = True
        self._due.pop(session.number, None)
        if session in self._queue:
            self._queue.remove(session)
        if session.live and session.phase is not Phase.STEPPING:
            self._drop(session)

    def failures(self) -> list[tuple[RequestId, IsthmusError]]:
        """The requests that cannot go on, and why; each once."""
        failed, self._failed = self._failed, []
        return failed

    # ---- what passes between this and the process

    @property
    def waiting(self) -> bool:
        """Whether a process is needed: somebody waits for it."""
        return bool(self._queue or self._due or self._opening or self._stepping)

    @property
    def stepping(self) -> bool:
        """Whether masks of running outputs are under way."""
        return bool(self._stepping)

    def questions(self, now: float) -> list[Question]:
        """What to send now. Each lane has at most one unanswered question."""
        asked: list[Question] = []
        if self._forget:
            asked.append(Close(self._forget))
            self._forget = []
        if self._due and not self._stepping:
            self._stepping, self._due = self._due, {}
            self._stepping_since = now
            asked.append(Advance([self._step(session) for session in self._stepping.values()]))
        if self._queue and self._opening is None and self._open_count < self._most_open:
            session = self._queue.popleft()
            session.phase = Phase.OPENING
            session.told = len(session.output)
            self._opening, self._opening_since = session, now
            text = session.constraint
            output, guesses = list(session.output), session.guesses
            asked.append(Open(session.number, text.kind, text.text, output, guesses, session.limit))
        return asked

    def take(self, part: Masks, now: float) -> None:
        """Masks came."""
        session = self._answered(part.session)
        if session is None:
            return
        if not part.lost:
            session.live = True
            self._open_count += 1
        self.counters.masks_computed += len(part.masks)
        if session.closed:
            if session.live:
                self._drop(session)
            return
        session.phase = Phase.READY
        session.opening_deaths = 0
        session.drafts, session.masks = _allowed(session, part)
        self.counters.mask_wait_s += max(0.0, now - session.since)
        if not session.masks:
            self._fail(session, InvalidInput("the constraint leaves only an end here, before min_tokens", "min_tokens"))

    def refuse(self, answer: Refused, now: float) -> None:
        """The process refused a session."""
        del now
        session = self._answered(answer.session)
        if session is not None and not session.closed:
            self._fail(session, to_error(answer.error))

    def deadline(self) -> float | None:
        """When the first unanswered question is overdue."""
        times = []
        if self._opening is not None:
            times.append(self._opening_since + self._settings.compile_s)
        if self._stepping:
            times.append(self._stepping_since + self._settings.step_s)
        return min(times, default=None)

    def overdue(self, now: float) -> bool:
        """Whether the process has to be ended."""
        deadline = self.deadline()
        return deadline is not None and now >= deadline

    def lost(self, now: float) -> None:
        """The process is gone, by itself or because it was overdue: blame who is to blame, tell a new one the rest."""
        self.counters.grammar_restarts += 1
        opening, stepping = self._opening, list(self._stepping.values())
        late = opening is not None and now >= self._opening_since + self._settings.compile_s
        slow = bool(stepping) and now >= self._stepping_since + self._settings.step_s
        self._opening, self._stepping, self._forget, self._open_count = None, {}, [], 0
        for session in self._all.values():
            session.live = False
        for session in [*self._due.values(), *stepping]:
            self._requeue(session)
        self._due = {}
        for session in stepping:
            # Opened anew it goes through the same tokens alone, so that a second time tells who it was.
            session.stepping_deaths += 1
            if session.stepping_deaths > MAX_STEPPING_DEATHS:
                self._fail(session, _too_much())
        if opening is None or opening.closed:
            return
        self._requeue(opening, first=True)
        if late:
            limit = self._settings.compile_s
            self._fail(opening, InvalidInput(f"the grammar took too long: over {limit:g} s, the limit", FIELD))
        elif not slow:
            opening.opening_deaths += 1
            if opening.opening_deaths >= MAX_OPENING_DEATHS:
                self._fail(opening, _too_much())

    def fail_all(self, error: IsthmusError) -> None:
        """No process can be had: everybody who waits fails with `error`."""
        self._opening, self._stepping, self._forget, self._open_count = None, {}, [], 0
        for session in list(self._all.values()):
            session.live = False
            if session.phase is not Phase.READY:
                self._fail(session, error)

    # ---- inside

    def _step(self, session: Session) -> Step:
        session.phase = Phase.STEPPING
        new, session.told = session.output[session.told :], len(session.output)
        return Step(session.number, new, session.guesses, session.limit)

    def _answered(self, number: int) -> Session | None:
        """The session that a question was about; the lane is free again when it was the last. Raises `EngineFailed`
        for a session that nothing was asked about.
        """
        if self._opening is not None and self._opening.number == number:
            session, self._opening = self._opening, None
            return session
        if number not in self._stepping:
            raise EngineFailed("the grammar process answered what it was not asked")
        session = self._stepping.pop(number)
        session.live = False
        self._open_count -= 1
        return session

    def _requeue(self, session: Session, *, first: bool = False) -> None:
        if session.closed:
            return
        session.phase = Phase.QUEUED
        if first:
            self._queue.appendleft(session)
        else:
            self._queue.append(session)

    def _drop(self, session: Session) -> None:
        session.live = False
        self._open_count -= 1
        self._forget.append(session.number)

    def _fail(self, session: Session, error: IsthmusError) -> None:
        self.counters.grammar_refused += 1
        self._failed.append((session.id, error))
        self.close(session.id)


def _too_much() -> InvalidInput:
    return InvalidInput("the grammar ended its process: over a limit of memory or CPU time", FIELD)


def _allowed(session: Session, part: Masks) -> tuple[list[int], list[bytes]]:
    """The drafts and masks of `part` without banned tokens, up to the first mask that allows nothing."""
    masks: list[bytes] = []
    for index, mask in enumerate(part.masks, len(session.output)):
        if index >= session.banned_until or not session.banned:
            masks.append(mask)
            continue
        bits = bytearray(mask)
        for token in session.banned:
            if token >> 3 < len(bits):
                bits[token >> 3] &= ~(1 << (token & 7)) & 0xFF
        if not any(bits):
            break
        masks.append(bytes(bits))
    return part.drafts[: max(0, len(masks) - 1)], masks
