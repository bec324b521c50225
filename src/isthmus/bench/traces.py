"""Traces of real workloads, read from a folder that the caller names, and a made-up one for tests.

    conversation   mooncake/conversation_trace.jsonl   (kvcache-ai/Mooncake): 512-token blocks, arrival times in it
    agentic        agentic/sessions.jsonl              (callanjfox/kv-cache-tester): 64-token blocks local to a session,
                                                       times from its start; sessions start uniformly over 4 h by seed

Both may be compressed (`.zst`; the program `zstd` reads them). A file is data from elsewhere: sizes, counts and numbers
have limits, and block ids are checked to be chained, that is, to have one predecessor each. Only then does an id name a
prefix, and a set of them is a tree.
"""

import random
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from isthmus.contracts.errors import InvalidInput, TooLarge

NAMES = ("conversation", "agentic")
FILES = {"conversation": "mooncake/conversation_trace.jsonl", "agentic": "agentic/sessions.jsonl"}
MAX_FILE_BYTES = 1 << 30
MAX_LINE_BYTES = 32 << 20
MAX_REQUESTS = 1_000_000
MAX_BLOCKS = 1 << 17
"""In one request."""
MAX_ID = 1 << 22
MAX_TOKENS = 1 << 24
READ_TIMEOUT_S = 300.0
_CONVERSATION_TOKENS = 512
_AGENTIC_WINDOW_S = 4 * 3600.0

Ids = npt.NDArray[np.int32]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=MAX_ID)]
_IdList = Annotated[list[_Id], msgspec.Meta(max_length=MAX_BLOCKS)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Time = Annotated[float, msgspec.Meta(ge=0, le=1e10)]


@dataclass(frozen=True, slots=True)
class Request:
    """One request: `at_s` after its session's start, so many tokens in, the blocks of their prefix. An id names a block
    with all that is before it; no two sessions share one.
    """

    session: int
    at_s: float
    tokens: int
    blocks: Ids


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by session. `window_s`: over how long sessions start; 0: at the times in the trace."""

    name: str
    block_tokens: int
    window_s: float
    sessions: int
    requests: tuple[Request, ...]
    distinct: int
    """Blocks with different ids."""

    def arrivals(self, seed: int) -> list[tuple[float, int]]:
        """When each request (by its index) comes, in order. The seed draws the starts."""
        rng = random.Random(f"arrivals {seed}")
        starts = [rng.uniform(0.0, self.window_s) for _ in range(self.sessions)]
        return sorted((starts[request.session] + request.at_s, at) for at, request in enumerate(self.requests))


class _Line(msgspec.Struct):
    timestamp: _Time
    input_length: _Tokens
    hash_ids: _IdList


class _Call(msgspec.Struct, rename={"tokens": "in"}):
    t: _Time
    tokens: _Tokens = 0
    hash_ids: _IdList = []
    requests: list["_Call"] = []


class _Session(msgspec.Struct):
    block_size: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    requests: list[_Call]


def read(name: str, folder: Path) -> Trace:
    """The trace called `name` in `folder`. Raises `InvalidInput` when it is not there, or not what it should be."""
    if name not in FILES:
        raise InvalidInput(f"{name!r} is no trace; there are {', '.join(NAMES)}", "trace")
    path = folder / FILES[name]
    builder = _Builder(name, str(path))
    kind = _Line if name == "conversation" else _Session
    decoder: msgspec.json.Decoder[_Line | _Session] = msgspec.json.Decoder(kind)
    for number, line in enumerate(_lines(path), 1):
        try:
            found = decoder.decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InvalidInput(f"{path}, line {number}: {error}", "traces") from error
        if isinstance(found, _Line):
            builder.add(0, found.timestamp / 1000, found.input_length, found.hash_ids)
        else:
            builder.begin(found.block_size)
            _walk(builder, found.requests, 0.0)
            builder.end()
    return builder.finish()


def _walk(builder: "_Builder", calls: Sequence[_Call], start_s: float) -> None:
    """Requests, those of sub-agents from the time when they were started."""
    for call in calls:
        if call.hash_ids:
            builder.add(builder.sessions, start_s + call.t, call.tokens, call.hash_ids)
        _walk(builder, call.requests, start_s + call.t)


class _Builder:
    """Collects the requests of a trace and checks its ids."""

    def __init__(self, name: str, path: str) -> None:
        self._name, self._path = name, path
        self._block_tokens = _CONVERSATION_TOKENS
        self._requests: list[Request] = []
        self._first = 0
        self._base = 0
        self._distinct = 0
        self.sessions = 0

    def begin(self, block_tokens: int) -> None:
        """A session of its own ids follows."""
        if self.sessions and block_tokens != self._block_tokens:
            raise InvalidInput(f"{self._path}: sessions have different block sizes", "block_size")
        self._block_tokens = block_tokens

    def add(self, session: int, at_s: float, tokens: int, ids: list[int]) -> None:
        """A request."""
        if len(self._requests) >= MAX_REQUESTS:
            raise TooLarge(f"{self._path}: over {MAX_REQUESTS} requests", "traces")
        if not tokens // self._block_tokens <= len(ids) <= -(-tokens // self._block_tokens):
            raise InvalidInput(f"{self._path}: a request of {tokens} tokens has {len(ids)} blocks", "hash_ids")
        self._requests.append(Request(session, at_s, tokens, np.array(ids, np.int32)))

    def end(self) -> None:
        """Check the session's ids, and make them different from those of all others."""
        paths = [request.blocks for request in self._requests[self._first :]]
        most = max((int(path.max()) for path in paths if len(path)), default=-1) + 1
        before = np.full(most, -2, np.int32)
        for path in paths:
            own = np.concatenate((np.array([-1], np.int32), path[:-1]))[: len(path)]
            known = before[path]
            if bool(np.any((known != -2) & (known != own))):
                raise InvalidInput(f"{self._path}: a block id stands after two different ones", "hash_ids")
            before[path] = own
        self._distinct += int(np.count_nonzero(before != -2))
        if self._base + most >= 1 << 31:
            raise TooLarge(f"{self._path}: too many block ids", "hash_ids")
        for path in paths:
            np.add(path, self._base, out=path)
        self._base += most
        self._first = len(self._requests)
        self.sessions += 1

    def finish(self) -> Trace:
        """The trace."""
        if self._first < len(self._requests):
            self.end()
        if not self._distinct:
            raise InvalidInput(f"{self._path}: no requests with blocks", "traces")
        window = _AGENTIC_WINDOW_S if self._name == "agentic" else 0.0
        requests = tuple(self._requests)
        return Trace(self._name, self._block_tokens, window, self.sessions, requests, self._distinct)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of `path`, or of `path`.zst; all within the limits."""
    packed = path.with_name(path.name + ".zst")
    if path.is_file():
        with path.open("rb") as file:
            yield from _limited(file, path)
        return
    if not packed.is_file():
        raise InvalidInput(f"there is no {path} and no {packed}", "traces")
    program = shutil.which("zstd")
    if program is None:
        raise InvalidInput(f"{packed} is compressed, and there is no program zstd: install it, or unpack it", "traces")
    with subprocess.Popen([program, "-dcq", "--", str(packed)], stdout=subprocess.PIPE) as process:
        timer = threading.Timer(READ_TIMEOUT_S, process.kill)
        timer.start()
        try:
            if process.stdout is not None:
                yield from _limited(process.stdout, packed)
            failed = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if failed:
        raise InvalidInput(f"{packed} could not be decompressed: zstd ended with {failed}", "traces")


def _limited(file: IO[bytes], path: Path) -> Iterator[bytes]:
    total = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        total += len(line)
        if len(line) > MAX_LINE_BYTES or total > MAX_FILE_BYTES:
            raise TooLarge(f"{path}: a line is over {MAX_LINE_BYTES} bytes, or all over {MAX_FILE_BYTES}", "traces")
        yield line


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace cut into records: consecutive blocks that no request of the trace ever has one without the other, at most
    `most` of them, are one record. Fewer accesses, the same tree; `paths` are the requests' records, by a key each,
    `blocks` the blocks of each key. Exact for a cache without bounds; a bounded one evicts records instead of blocks.
    """

    trace: Trace
    most: int
    paths: tuple[Ids, ...]
    blocks: Ids


def cut(trace: Trace, most: int) -> Workload:
    """Cut `trace` into records of at most `most` blocks; 1: every block is a record."""
    highest = max(int(request.blocks.max()) for request in trace.requests if len(request.blocks))
    requests = np.zeros(highest + 1, np.int32)
    for request in trace.requests:
        requests[request.blocks] += 1
    sizes = np.zeros(highest + 1, np.int32)
    paths = []
    for request in trace.requests:
        path = request.blocks
        if not len(path):
            paths.append(path)
            continue
        # As many requests as the block before it: exactly the same ones, since each request has the whole prefix.
        often = requests[path]
        begins = np.flatnonzero(np.concatenate(([True], often[1:] != often[:-1])))
        within = np.arange(len(path)) - np.repeat(begins, np.diff(begins, append=len(path)))
        heads = np.flatnonzero(within % most == 0)
        sizes[path[heads]] = np.diff(heads, append=len(path))
        paths.append(path[heads])
    return Workload(trace, most, tuple(paths), sizes)


def synthetic(seed: int, sessions: int = 40, turns: int = 8) -> Trace:
    """A made-up trace: conversations over a few shared openings that grow by turns, and sometimes go back and take
    another way. 64-token blocks; times are in it.
    """
    rng = random.Random(f"synthetic {seed}")
    openings: list[list[int]] = []
    last = 0

    def fresh(count: int) -> list[int]:
        nonlocal last
        last += count
        return list(range(last - count, last))

    openings = [fresh(rng.randint(2, 12)) for _ in range(4)]
    requests = []
    for _ in range(sessions):
        path = list(rng.choice(openings))
        at_s = rng.uniform(0.0, 3600.0)
        for _ in range(rng.randint(1, turns)):
            if rng.random() < 0.15:
                path = path[: rng.randint(1, len(path))]
            path += fresh(rng.randint(1, 10))
            tokens = len(path) * 64 - rng.randint(0, 63)
            requests.append(Request(0, at_s, tokens, np.array(path, np.int32)))
            at_s += rng.expovariate(1 / 60)
    return Trace("synthetic", 64, 0.0, 1, tuple(requests), last)
