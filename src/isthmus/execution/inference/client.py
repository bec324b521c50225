"""The near end of the engine port: starts the engine process and speaks to it. Never imports torch.

Promises: every submitted request ends with a `finish` or an error of the tree; closing the iterator early aborts the
request; when the process ends, every request in flight fails with `EngineFailed`, none hangs.
"""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence

from isthmus.contracts import errors
from isthmus.contracts.errors import DiskFailed, EngineFailed, InvalidInput, IsthmusError, Overloaded, StoreUnavailable
from isthmus.contracts.events import (
    Abort,
    Command,
    Drain,
    EngineStats,
    ErrorInfo,
    Event,
    Failed,
    Finish,
    ModelInfo,
    Outputs,
    Progress,
    Ready,
    RequestOutput,
    SessionHint,
    Shutdown,
    Submit,
)
from isthmus.contracts.ids import RequestId
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.inference.settings import EngineSettings

RECEIVE_BYTES = 1 << 18
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 5.0

_ERRORS: dict[str, type[IsthmusError]] = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, IsthmusError)
}


def to_error(info: ErrorInfo) -> IsthmusError:
    """The error of the tree that `info` describes; an unknown code becomes `EngineFailed`."""
    kind = _ERRORS.get(info.code, EngineFailed)
    if issubclass(kind, InvalidInput):
        return kind(info.message, info.field)
    if kind is Overloaded:
        return Overloaded(info.message, info.retry_after_s or 1.0)
    if kind is DiskFailed:
        return StoreUnavailable(info.message)  # the number of the system's error stayed in that process
    return kind(info.message)


class EngineProcess:
    """The `Engine` port over a process of its own. Build with `EngineProcess.start`."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self._process = process
        self._socket = sock
        self._info: ModelInfo | None = None
        self._stats = EngineStats()
        self._streams: dict[RequestId, asyncio.Queue[RequestOutput | IsthmusError]] = {}
        self._failure: IsthmusError | None = None
        self._failed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def spawn(cls, settings: EngineSettings, command: Sequence[str]) -> "EngineProcess":
        """Start `command`, a worker (worker.py), at once, with `--fd N` for its end of the socket; `ready` awaits it.
        Lets other start-up work run while torch is imported.
        """
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with far:
            # A session of its own: Ctrl-C in a terminal reaches the parent alone, which drains first.
            process = subprocess.Popen(
                [*command, "--fd", str(far.fileno())],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        near.sendall(encode_frame(settings))
        return cls(process, near)

    async def ready(self, progress: Callable[[str, float], None]) -> None:
        """Wait until requests are taken; `progress(stage, fraction)` is called on the way.

        Raises what the engine reports (`ModelInvalid`, `ExactUnavailable`, ...) or `EngineFailed`.
        """
        self._socket.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        frames: FrameReader[Event] = FrameReader(Event)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while self._info is None:
                    for event in await self._receive(frames):
                        if isinstance(event, Progress):
                            progress(event.stage, event.fraction)
                        else:
                            self._take(event)
                    if self._failure is not None:
                        raise self._failure
        except TimeoutError as error:
            raise EngineFailed(f"the engine was not ready within {START_TIMEOUT_S:.0f} s") from error
        self._task = asyncio.create_task(self._pump(frames), name="engine-reader")

    async def failed(self) -> IsthmusError:
        """Wait until the engine has ended; why."""
        await self._failed.wait()
        return self._failure or EngineFailed("the engine ended")

    @property
    def failure(self) -> IsthmusError | None:
        """Why the engine ended; None while it runs."""
        return self._failure

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    @property
    def info(self) -> ModelInfo:
        """See `Engine`."""
        if self._failure is not None:
            raise self._failure
        if self._info is None:
            raise EngineFailed("the engine is not ready")
        return self._info

    @property
    def stats(self) -> EngineStats:
        """See `Engine`."""
        return self._stats

    async def submit(self, request: EngineRequest) -> AsyncIterator[RequestOutput]:
        """See `Engine`."""
        if request.request_id in self._streams:
            raise InvalidInput("a request with this id is running", "request_id")
        queue: asyncio.Queue[RequestOutput | IsthmusError] = asyncio.Queue()  # bounded by max_tokens
        self._streams[request.request_id] = queue
        self._idle.clear()
        ended = False
        try:
            self._send(Submit(request))
            while not ended:
                output = await queue.get()
                if isinstance(output, IsthmusError):
                    ended = True
                    raise output
                ended = output.finish is not None
                if output.finish is Finish.REJECTED and output.error is not None:
                    raise to_error(output.error)
                yield output
        finally:
            del self._streams[request.request_id]
            if not self._streams:
                self._idle.set()
            if not ended:
                self.abort(request.request_id)

    def abort(self, request_id: RequestId) -> None:
        """See `Engine`."""
        with contextlib.suppress(IsthmusError):  # a dead engine runs nothing that could be aborted
            self._send(Abort(request_id))

    def hint(self, hint: SessionHint) -> None:
        """See `Engine`."""
        with contextlib.suppress(IsthmusError):  # advice: a dead engine needs none
            self._send(hint)

    async def drain(self) -> None:
        """See `Engine`."""
        self._send(Drain())
        await self._idle.wait()

    async def close(self) -> None:
        """See `Engine`."""
        with contextlib.suppress(IsthmusError):  # it may have ended already
            self._send(Shutdown())
        self._fail(EngineFailed("the engine was closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        else:
            self._socket.close()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._stop)

    def _stop(self) -> None:
        """Wait for the process to end; kill it when it does not."""
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, command: Command) -> None:
        if self._failure is not None or self._writer is None:
            raise self._failure or EngineFailed("the engine is not ready")
        self._writer.write(encode_frame(command))

    async def _receive(self, frames: FrameReader[Event]) -> list[Event]:
        """The next events. Records a failure when the process is gone or breaks the protocol."""
        if self._reader is None:
            raise EngineFailed("the engine is not ready")
        try:
            data = await self._reader.read(RECEIVE_BYTES)
            if data:
                return frames.feed(data)
        except (OSError, errors.WireViolation) as error:
            self._fail(EngineFailed(f"the connection to the engine broke: {error}"))
            return []
        self._fail(EngineFailed("the engine process ended"))
        return []

    async def _pump(self, frames: FrameReader[Event]) -> None:
        """Hand outputs to their streams until the engine is gone."""
        while self._failure is None:
            for event in await self._receive(frames):
                self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Outputs():
                self._stats = event.stats
                for output in event.outputs:
                    queue = self._streams.get(output.request_id)
                    if queue is not None:
                        queue.put_nowait(output)
            case Ready():
                self._info = event.info
            case Failed():
                self._fail(to_error(event.error))
            case Progress():
                pass

    def _fail(self, failure: IsthmusError) -> None:
        """From now on everything fails with `failure` (the first one counts)."""
        if self._failure is None:
            self._failure = failure
            self._failed.set()
            for queue in self._streams.values():
                queue.put_nowait(failure)
