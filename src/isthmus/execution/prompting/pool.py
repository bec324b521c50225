"""The pool of helper processes: bounded queue in front, one request a helper at a time, a deadline that kills.

Promises: no text is rendered or tokenised on the event loop; a request that takes longer than its deadline costs its
helper's life and nobody else's request (helpers hold one request each); a helper that dies for another reason is
replaced and its request tried once more; every caller gets an answer or an error of the tree. Waiting requests are
bounded in number and bytes: over that, `Overloaded`.
"""

import asyncio
import socket
import sys
from array import array
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from isthmus.contracts.errors import (
    Draining,
    InvalidInput,
    IsthmusError,
    ModelInvalid,
    Overloaded,
    TooLarge,
    Unsupported,
    WireViolation,
)
from isthmus.contracts.events import ErrorInfo
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.prompting.messages import Answer, Encode, Limits, Loaded, Refused, Render, Setup, TokenIds

_READ_BYTES = 256 * 1024
_ATTEMPTS = 2
_WORKER = "isthmus.execution.prompting.worker"
_ERRORS: dict[str, type[InvalidInput]] = {"too_large": TooLarge, "unsupported": Unsupported}


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Limits of the pool. Times in seconds, sizes in bytes.

    A helper may map `helper_memory_bytes` beyond the bare interpreter; that holds the tokenizer too.
    """

    helpers: int = 1
    max_waiting: int = 256
    max_waiting_bytes: int = 64 * 1024 * 1024
    deadline_s: float = 10.0
    start_deadline_s: float = 60.0
    helper_memory_bytes: int = 1024 * 1024 * 1024
    max_output_chars: int = 8 * 1024 * 1024
    max_tokens: int = 1_048_576


@dataclass(slots=True)
class PoolStats:
    """Counters since the start. `killed`: helpers ended for a deadline; `died`: helpers that ended by themselves."""

    answered: int = 0
    refused: int = 0
    overloaded: int = 0
    killed: int = 0
    died: int = 0
    started: int = 0


@dataclass(slots=True)
class _Job:
    question: Render | Encode
    size: int
    answer: "asyncio.Future[list[int]]"


class _GoneError(Exception):
    """The helper's socket ended before its answer."""


class _Process:
    """One helper process and its socket."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._process = process
        self._reader = reader
        self._writer = writer
        self._frames: FrameReader[Answer] = FrameReader(Answer)

    @classmethod
    async def start(cls, memory_bytes: int) -> "_Process":
        """Spawn a helper. It inherits its socket only: no environment, no signals of the terminal, no other files."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                # -P, -s: neither the working directory nor the user's is searched for modules; -B: writes no bytecode.
                *(sys.executable, "-P", "-s", "-B", "-m", _WORKER, str(theirs.fileno()), str(memory_bytes)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise ModelInvalid(f"a prompting helper cannot be started: {error.strerror}") from error
        finally:
            theirs.close()
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except (OSError, asyncio.CancelledError):
            ours.close()
            process.kill()
            await process.wait()
            raise
        return cls(process, reader, writer)

    async def ask(self, question: Setup | Render | Encode) -> Answer:
        """One question, one answer. Raises `_GoneError`, `WireViolation`."""
        try:
            self._writer.write(encode_frame(question))
            await self._writer.drain()
            while True:
                data = await self._reader.read(_READ_BYTES)
                if not data:
                    raise _GoneError
                if answers := self._frames.feed(data):
                    return answers[0]
        except ConnectionError as error:
            raise _GoneError from error

    async def kill(self) -> None:
        """End the process now and wait until it is gone."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


def _environment() -> dict[str, str]:
    """The helpers' whole environment. One thread: a request is small, and threads would outgrow the memory limit."""
    package = sys.modules["isthmus"].__file__ or ""
    return {
        "PYTHONPATH": str(Path(package).resolve().parent.parent),
        "PYTHONUTF8": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }


class HelperPool:
    """Runs questions on helper processes. `start` before the first question, `close` at the end."""

    def __init__(
        self, settings: PoolSettings, tokenizer: bytes, template: str | None, specials: dict[str, str]
    ) -> None:
        self._settings = settings
        limits = Limits(
            cpu_s=int(settings.deadline_s) + 1,
            memory_bytes=settings.helper_memory_bytes,
            output_chars=settings.max_output_chars,
            tokens=settings.max_tokens,
        )
        self._setup = Setup(tokenizer, template, specials, limits)
        self._waiting: deque[_Job] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: set[_Process] = set()
        self._closed = False
        self.stats = PoolStats()

    async def start(self) -> None:
        """Return when every helper has loaded. Raises `ModelInvalid` when tokenizer or template are not accepted."""
        count = self._settings.helpers
        results = await asyncio.gather(*(self._spawn() for _ in range(count)), return_exceptions=True)
        processes = [result for result in results if isinstance(result, _Process)]
        for result in results:
            if isinstance(result, BaseException):
                for process in processes:
                    await self._end(process)
                raise result
        self._tasks = [asyncio.create_task(self._serve(process)) for process in processes]

    async def ask(self, question: Render | Encode, size: int) -> list[int]:
        """The token ids for `question`, whose text has `size` bytes.

        Raises `Overloaded`, `InvalidInput` and its kinds, `Draining` once closed.
        """
        if self._closed or not self._tasks:
            raise Draining("the prompting helpers are not running")
        settings = self._settings
        over_bytes = self._waiting and self._waiting_bytes + size > settings.max_waiting_bytes
        if len(self._waiting) >= settings.max_waiting or over_bytes:
            self.stats.overloaded += 1
            raise Overloaded(f"{len(self._waiting)} prompts wait to be tokenised")
        job = _Job(question, size, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._waiting_bytes += size
        self._wake.set()
        return await job.answer

    async def close(self) -> None:
        """End the helpers. Questions without an answer end with `Draining`."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A task that was cancelled before it first ran could not end its helper.
        for process in list(self._processes):
            await self._end(process)
        self._tasks = []
        while self._waiting:
            job = self._waiting.popleft()
            if not job.answer.done():
                job.answer.set_exception(Draining("the server is shutting down"))

    async def _spawn(self) -> _Process:
        """A helper that has loaded. Raises `ModelInvalid`."""
        process = await _Process.start(self._settings.helper_memory_bytes)
        self._processes.add(process)
        self.stats.started += 1
        try:
            async with asyncio.timeout(self._settings.start_deadline_s):
                answer = await process.ask(self._setup)
        except TimeoutError as error:
            await self._end(process)
            raise ModelInvalid(f"the tokenizer did not load within {self._settings.start_deadline_s} s") from error
        except (_GoneError, WireViolation) as error:
            await self._end(process)
            raise ModelInvalid(
                "a prompting helper ended while it loaded tokenizer.json and the chat template"
            ) from error
        except asyncio.CancelledError:
            await self._end(process)
            raise
        if isinstance(answer, Loaded):
            return process
        await self._end(process)
        raise ModelInvalid(
            answer.error.message if isinstance(answer, Refused) else "a prompting helper broke the protocol"
        )

    async def _end(self, process: _Process) -> None:
        self._processes.discard(process)
        await process.kill()

    async def _serve(self, first: _Process) -> None:
        """Feed one helper for ever; replace it when it ends."""
        process: _Process | None = first
        try:
            while True:
                if process is None:
                    # A failure here is not lost: the next job tries again and its caller is told.
                    with suppress(ModelInvalid):
                        process = await self._spawn()
                job = await self._next()
                process = await self._run(process, job)
        finally:
            if process is not None:
                await self._end(process)

    async def _next(self) -> _Job:
        """The next job whose caller still waits."""
        while True:
            while self._waiting:
                job = self._waiting.popleft()
                self._waiting_bytes -= job.size
                if not job.answer.done():
                    return job
            self._wake.clear()
            await self._wake.wait()

    async def _run(self, process: _Process | None, job: _Job) -> _Process | None:
        """Answer one job. The helper that is left, None when it is gone."""
        for _ in range(_ATTEMPTS):
            try:
                process = process or await self._spawn()
            except ModelInvalid as error:
                # It loaded before, so it is the machine that is short of something. The next job tries again.
                self._refuse(job, Overloaded(f"no prompting helper: {error}"))
                return None
            try:
                async with asyncio.timeout(self._settings.deadline_s):
                    answer = await process.ask(job.question)
            except TimeoutError:
                self.stats.killed += 1
                await self._end(process)
                limit = self._settings.deadline_s
                field = "messages" if isinstance(job.question, Render) else "prompt"
                self._refuse(job, InvalidInput(f"it took over {limit} s to render and tokenise, the limit", field))
                return None
            except (_GoneError, WireViolation):
                self.stats.died += 1
                await self._end(process)
                process = None
                continue
            except asyncio.CancelledError:
                await self._end(process)
                self._refuse(job, Draining("the server is shutting down"))
                raise
            self._deliver(job, answer)
            return process
        self._refuse(
            job, InvalidInput("the prompt ended its helper twice: over a limit of memory or CPU time", "prompt")
        )
        return None

    def _deliver(self, job: _Job, answer: Answer) -> None:
        if isinstance(answer, TokenIds):
            self.stats.answered += 1
            ids = array("I")
            ids.frombytes(answer.packed)
            if not job.answer.done():
                job.answer.set_result(ids.tolist())
        elif isinstance(answer, Refused):
            self._refuse(job, _error(answer.error))
        else:
            self._refuse(job, InvalidInput("the prompting helper broke the protocol"))

    def _refuse(self, job: _Job, error: IsthmusError) -> None:
        self.stats.refused += 1
        if not job.answer.done():
            job.answer.set_exception(error)


def _error(info: ErrorInfo) -> IsthmusError:
    return _ERRORS.get(info.code, InvalidInput)(info.message, info.field)


def text_bytes(text: str) -> int:
    """The size of `text` in UTF-8. Raises `InvalidInput` for a lone surrogate, which no encoding has."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput("the text has a lone surrogate", "prompt") from error
