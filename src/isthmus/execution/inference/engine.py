"""The engine core: one loop with three verbs, schedule -> execute -> update, over a `Runner`.

No threads, sockets or clock reading besides the injected clock: a process (process.py) or a test drives it.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import msgspec

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import InvalidInput, IsthmusError, Unsupported
from isthmus.contracts.events import EngineStats, ErrorInfo, ModelInfo, RequestOutput, SessionHint
from isthmus.contracts.ids import RequestId
from isthmus.contracts.layout import BlockFormat
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.admission import refusal
from isthmus.execution.inference.batch import Batch, Runner, StepHandle
from isthmus.execution.inference.grammar.service import Grammars
from isthmus.execution.inference.paging.jobs import Pager
from isthmus.execution.inference.profile import SCHEDULE, StepProfile
from isthmus.execution.inference.scheduler import Scheduler
from isthmus.execution.inference.settings import SchedulerSettings


def block_format(info: ModelInfo) -> BlockFormat:
    """The format of the blocks that an engine with this model computes."""
    return BlockFormat(
        weights=info.weights,
        dtype=info.dtype,
        layers=info.layers,
        kv_heads=info.kv_heads,
        head_dim=info.head_dim,
        block_tokens=info.block_tokens,
        codec=info.codec,
        arithmetic=info.arithmetic,
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was handed in; `ahead` of the tokens of the one before it, or not."""

    batch: Batch
    handle: StepHandle
    ahead: bool
    began: float


class EngineCore:
    """Requests in, outputs out, step by step. At most two steps are under way: one that runs and the one after it.

    `wake` is called, from any thread, when a step is done or taken back: `ready` may have changed.
    """

    def __init__(
        self,
        runner: Runner,
        settings: SchedulerSettings,
        clock: Clock,
        grammars: Grammars | None = None,
        *,
        pager: Pager | None = None,
        profile: StepProfile | None = None,
        compiled: Callable[[], tuple[str, str]] | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._profile = profile
        self._compiled = compiled
        self._runner = runner
        self._clock = clock
        self._grammars = grammars
        self._pager = pager
        self._scheduler = Scheduler(runner.info, block_format(runner.info).digest(), settings, grammars, pager)
        self._steps: deque[_Step] = deque()
        self._wake = wake

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return self._runner.info

    @property
    def idle(self) -> bool:
        """Whether no request is left, and no step."""
        return self._scheduler.idle and not self._steps

    @property
    def stepping(self) -> bool:
        """Whether a step is under way."""
        return bool(self._steps)

    @property
    def ready(self) -> bool:
        """Whether `finish_step` would return at once."""
        return bool(self._steps) and self._steps[0].handle.done()

    def submit(self, request: EngineRequest) -> RequestOutput | None:
        """Queue a request; the output that refuses it when it cannot be taken. Allowed while a step is under way."""
        self._take_back()
        error: IsthmusError | None = None
        if request.constraint is not None:
            error = (
                Unsupported("this engine does not constrain outputs", "constraint")
                if self._grammars is None
                else self._grammars.refuse(request)
            )
        return (
            self._scheduler.add(request, self._clock.monotonic())
            if error is None
            else refusal(request.request_id, error)
        )

    def abort(self, request_id: RequestId) -> None:
        """End a request by the end of the step that runs. Unknown ids are ignored."""
        self._take_back()
        self._scheduler.abort(request_id, self._clock.monotonic())

    def hint(self, hint: SessionHint) -> None:
        """Pass on what is known about the future of a session's state; nothing without a block store."""
        if self._scheduler.paging is not None:
            self._scheduler.paging.hint(hint)

    def drain(self) -> None:
        """Refuse every request from now on."""
        self._scheduler.drain()

    def begin_step(self) -> bool:
        """Have a step under way, and the one after it where that can be told. False when there is nothing to run
        (see `collect`, `wait_s`).
        """
        self._pump()
        if not self._steps:
            self._hand_in(None)
        if len(self._steps) == 1:
            self._hand_in(self._steps[0].batch)
        return bool(self._steps)

    def _hand_in(self, last: Batch | None) -> None:
        """Schedule a step and hand it in; the one after `last`, if that is under way."""
        now = self._clock.monotonic()
        with self._scheduling():
            batch = self._scheduler.schedule(now) if last is None else self._scheduler.ahead(last, now)
        if batch is not None:
            handle = self._runner.execute(batch)
            self._steps.append(_Step(batch, handle, last is not None, now))
            handle.when_done(self._wake)

    def _take_back(self) -> None:
        """Take back a step that was scheduled ahead and has not begun: what has come may change it."""
        if self._steps and self._steps[-1].ahead and self._steps[-1].handle.cancel():
            self._scheduler.take_back(self._steps.pop().batch)

    def finish_step(self) -> list[RequestOutput]:
        """Wait for the step that runs and take its result. Raises `EngineFailed` when it could not be computed."""
        if not self._steps:
            raise ValueError("no step is under way")
        step = self._steps.popleft()
        result = step.handle.result()
        now = self._clock.monotonic()
        if self._scheduler.paging is not None and not step.ahead:
            self._scheduler.paging.measured(step.batch.tokens, now - step.began)
        with self._scheduling():
            outputs = self._scheduler.update(step.batch, result, now)
        self._pump()
        return outputs

    def _scheduling(self) -> AbstractContextManager[None]:
        return nullcontext() if self._profile is None else self._profile.part(SCHEDULE)

    def step(self) -> list[RequestOutput]:
        """A whole step, or only what ended meanwhile."""
        return self.finish_step() if self.begin_step() else self.collect()

    def collect(self) -> list[RequestOutput]:
        """The last outputs of requests that ended outside a step."""
        return self._scheduler.collect()

    def wait_s(self) -> float | None:
        """How long a loop with nothing to run may sleep: until the next deadline, None for ever."""
        deadlines = [self._scheduler.next_deadline(), None if self._grammars is None else self._grammars.deadline()]
        first = min((one for one in deadlines if one is not None), default=None)
        return None if first is None else max(0.0, first - self._clock.monotonic())

    def grace_s(self) -> float:
        """How long a loop that goes on stepping may wait for masks that are under way."""
        return 0.0 if self._grammars is None else self._grammars.grace_s()

    def watched(self) -> tuple[list[int], list[int]]:
        """Descriptors that end a wait when they are readable, and when they are writable."""
        descriptor = None if self._grammars is None else self._grammars.fileno
        if self._grammars is None or descriptor is None:
            return [], []
        return [descriptor], [descriptor] if self._grammars.sending else []

    def stats(self) -> EngineStats:
        """A snapshot of queues, blocks and counters."""
        stats = self._scheduler.stats()
        if self._profile is not None:
            stats = msgspec.structs.replace(stats, profile_s=dict(self._profile.seconds))
        if self._compiled is not None:
            state, reason = self._compiled()
            stats = msgspec.structs.replace(stats, compiled=state, compiled_reason=reason)
        if self._grammars is None:
            return stats
        counters = self._grammars.counters
        return msgspec.structs.replace(
            stats,
            constrained=counters.constrained,
            grammar_refused=counters.grammar_refused,
            grammar_restarts=counters.grammar_restarts,
            masks_computed=counters.masks_computed,
            mask_wait_s=counters.mask_wait_s,
        )

    def check(self) -> None:
        """Raise `PoolCorrupt` unless the conservation law holds."""
        self._scheduler.check()

    def _pump(self) -> None:
        """Let masks and loads come and go, and end the requests that cannot go on."""
        if self._pager is not None:
            self._scheduler.paged(self._pager.take(), self._clock.monotonic())
        if self._grammars is None:
            return
        for request_id, error in self._grammars.pump():
            info = ErrorInfo(error.code, str(error), error.field if isinstance(error, InvalidInput) else "")
            self._scheduler.fail(request_id, info, self._clock.monotonic())
