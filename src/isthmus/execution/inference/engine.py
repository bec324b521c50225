"""The engine core: one loop with three verbs, schedule -> execute -> update, over a `Runner`.

No threads, sockets or clock reading besides the injected clock: a process (process.py) or a test drives it.
"""

from isthmus.contracts.clock import Clock
from isthmus.contracts.events import EngineStats, ModelInfo, RequestOutput
from isthmus.contracts.ids import RequestId
from isthmus.contracts.layout import BlockFormat
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.batch import Batch, Runner, StepHandle
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
    )


class EngineCore:
    """Requests in, outputs out, one step at a time. At most one step is under way."""

    def __init__(self, runner: Runner, settings: SchedulerSettings, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock
        self._scheduler = Scheduler(runner.info, block_format(runner.info).digest(), settings)
        self._step: tuple[Batch, StepHandle] | None = None

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return self._runner.info

    @property
    def idle(self) -> bool:
        """Whether no request is left."""
        return self._scheduler.idle

    def submit(self, request: EngineRequest) -> RequestOutput | None:
        """Queue a request; the output that refuses it when it cannot be taken. Allowed while a step is under way."""
        return self._scheduler.add(request, self._clock.monotonic())

    def abort(self, request_id: RequestId) -> None:
        """End a request by the end of the step under way. Unknown ids are ignored."""
        self._scheduler.abort(request_id, self._clock.monotonic())

    def drain(self) -> None:
        """Refuse every request from now on."""
        self._scheduler.drain()

    def begin_step(self) -> bool:
        """Schedule and start a step. False when there is nothing to run (see `collect`, `wait_s`)."""
        if self._step is not None:
            raise ValueError("a step is under way")
        batch = self._scheduler.schedule(self._clock.monotonic())
        if batch is None:
            return False
        self._step = (batch, self._runner.execute(batch))
        return True

    def finish_step(self) -> list[RequestOutput]:
        """Wait for the step under way and take its result. Raises `EngineFailed` when it could not be computed."""
        if self._step is None:
            raise ValueError("no step is under way")
        batch, handle = self._step
        result = handle.result()
        self._step = None
        return self._scheduler.update(batch, result, self._clock.monotonic())

    def step(self) -> list[RequestOutput]:
        """A whole step, or only what ended meanwhile."""
        return self.finish_step() if self.begin_step() else self.collect()

    def collect(self) -> list[RequestOutput]:
        """The last outputs of requests that ended outside a step."""
        return self._scheduler.collect()

    def wait_s(self) -> float | None:
        """How long a loop with nothing to run may sleep: until the next deadline, None for ever."""
        deadline = self._scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - self._clock.monotonic())

    def stats(self) -> EngineStats:
        """A snapshot of queues, blocks and counters."""
        return self._scheduler.stats()

    def check(self) -> None:
        """Raise `PoolCorrupt` unless the conservation law holds."""
        self._scheduler.check()
