"""A deterministic engine and a byte tokenizer behind the real ports, and a gateway over them on a real socket."""

import asyncio
import codecs
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from blake3 import blake3

from isthmus.contracts.clock import SystemClock
from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.events import EngineStats, Finish, ModelInfo, RequestOutput, SessionHint, Timing, TokenLogprob
from isthmus.contracts.ids import Namespace, RequestId
from isthmus.contracts.journal import LineageFact
from isthmus.contracts.layout import Codec, Dtype
from isthmus.contracts.prompting import ChatMessage, ChatOptions, OutputParse, Piece, ToolDelta, ToolMode
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.sampling import OPENAI_DEFAULTS, SamplingDefaults, TextParams
from isthmus.contracts.telemetry import RequestRecord
from isthmus.gateway.server import Gateway
from isthmus.gateway.service import GatewayDeps
from isthmus.gateway.settings import GatewaySettings
from isthmus.observability.metrics import PrometheusMetrics

BOS, EOS, OFFSET = 0, 1, 3
MODEL = "fake/bytes"


def ids_of(text: str) -> list[int]:
    return [byte + OFFSET for byte in text.encode("utf-8")]


class CountingEntropy:
    """Different bytes at each call, the same in each run."""

    def __init__(self) -> None:
        self.calls = 0

    def token_bytes(self, count: int) -> bytes:
        self.calls += 1
        return blake3(self.calls.to_bytes(8, "little")).digest(count)


class ByteAssembler:
    def __init__(self, params: TextParams) -> None:
        self.params = params
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False
        self.count = 0

    def feed(self, token_ids: Sequence[int]) -> Piece:
        self.count += len(token_ids)
        raw = bytes(token - OFFSET for token in token_ids if OFFSET <= token < OFFSET + 256)
        return self._take(self.decoder.decode(raw), final=False)

    def finish(self) -> Piece:
        return self._take(self.decoder.decode(b"", final=True), final=True)

    def _take(self, text: str, *, final: bool) -> Piece:
        self.held += text
        if self.count > self.params.min_tokens:
            places = [(self.held.find(stop), stop) for stop in self.params.stop if stop in self.held]
            if places:
                place, stop = min(places)
                end = place + (len(stop) if self.params.include_stop else 0)
                out, self.held = self.held[:end], ""
                return Piece(out, stopped=True, stop=stop)
        keep = 0
        if not final:
            for stop in self.params.stop:
                for size in range(1, len(stop)):
                    if self.held.endswith(stop[:size]):
                        keep = max(keep, size)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return Piece(out)


class ChatAssembler:
    """Tells `<think>reasoning</think>` and `<tool_call>name|arguments</tool_call>` from text, as they come."""

    MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

    def __init__(self, params: TextParams, parse: OutputParse) -> None:
        self.bytes = ByteAssembler(replace_stop(params))
        self.text = ByteAssembler(params)
        self.parse = parse
        self.mode = "text"
        self.held = ""
        self.calls = -1
        self.named = False

    def feed(self, token_ids: Sequence[int]) -> Piece:
        self.text.count += len(token_ids)
        return self._take(self.bytes.feed(token_ids).text, final=False)

    def finish(self) -> Piece:
        return self._take(self.bytes.finish().text, final=True)

    def _take(self, text: str, *, final: bool) -> Piece:
        self.held += text
        reasoning, said, calls, stopped, stop = "", "", [], False, ""
        while self.held and not stopped:
            mark = self._mark()
            place = self.held.find(mark) if mark else -1
            whole = place >= 0
            if not whole:
                place = len(self.held) - (0 if final else self._kept(mark))
            part, self.held = self.held[:place], self.held[place + len(mark) if whole else place :]
            if self.mode == "think":
                reasoning += part
            elif self.mode == "call":
                calls += self._call(part)
            else:
                piece = self.text._take(part, final=False)
                said, stopped, stop = said + piece.text, piece.stopped, piece.stop
            if not whole:
                break
            self.mode = {"<think>": "think", "<tool_call>": "call"}.get(mark, "text")
            if self.mode == "call":
                self.calls, self.named = self.calls + 1, False
        if final and not stopped:
            piece = self.text._take("", final=True)
            said, stopped, stop = said + piece.text, piece.stopped, piece.stop
        return Piece(said, stopped, reasoning, tuple(calls), stop)

    def _mark(self) -> str:
        if self.mode == "text":
            looked_for = [m for m, on in (("<think>", self.parse.reasoning), ("<tool_call>", self.parse.tools)) if on]
            found = [mark for mark in looked_for if mark in self.held]
            return min(found, key=self.held.find) if found else (looked_for or [""])[-1]
        return "</think>" if self.mode == "think" else "</tool_call>"

    def _kept(self, mark: str) -> int:
        marks = (mark, "<think>") if self.mode == "text" and mark else (mark,)
        sizes = [size for one in marks for size in range(len(one)) if self.held.endswith(one[:size])]
        return max(sizes, default=0)

    def _call(self, part: str) -> list[ToolDelta]:
        if self.named:
            return [ToolDelta(self.calls, None, part)] if part else []
        name, bar, rest = part.partition("|")
        if not bar:
            self.held = part + self.held
            return []
        self.named = True
        return [ToolDelta(self.calls, name), *([ToolDelta(self.calls, None, rest)] if rest else [])]


def replace_stop(params: TextParams) -> TextParams:
    return TextParams(skip_special_tokens=params.skip_special_tokens)


class BytePrompting:
    """One token a byte. `gate`, when set to an event, holds every encoding until it is set.

    `chats` and `constraints` are what it was asked; a demanded call is constrained to `call <names>`.
    """

    def __init__(self, vocab_size: int = 259) -> None:
        self.vocab_size = vocab_size
        self.gate: asyncio.Event | None = None
        self.waiting = 0
        self.cancelled = 0
        self.failure: Exception | None = None
        self.refusal: InvalidInput | None = None
        self.chats: list[tuple[list[ChatMessage], ChatOptions]] = []
        self.constraints: list[tuple[ChatOptions, Constraint | None, tuple[int, ...]]] = []
        self.parses: list[OutputParse | None] = []

    async def encode_chat(self, messages: Sequence[ChatMessage], options: ChatOptions | None = None) -> list[int]:
        options = options or ChatOptions()
        self.chats.append((list(messages), options))
        text = "".join(f"<{m.role}>{m.content}\n" for m in messages)
        return await self.encode(text + ("<assistant>" if options.add_generation_prompt else ""))

    def constraint(
        self, options: ChatOptions, response: Constraint | None, prompt_tail: Sequence[int] = ()
    ) -> Constraint | None:
        self.constraints.append((options, response, tuple(prompt_tail)))
        if self.refusal is not None:
            raise self.refusal
        if options.choice.mode not in (ToolMode.REQUIRED, ToolMode.NAMED):
            return response
        return Constraint(ConstraintKind.GRAMMAR, "call " + (options.choice.name or "any"))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if self.failure is not None:
            raise self.failure
        if self.gate is not None:
            self.waiting += 1
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return ([BOS] if add_special_tokens else []) + ids_of(text)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        if any(token >= self.vocab_size for token in token_ids):
            raise InvalidInput("a token id is outside the vocabulary", "tokens")
        return b"".join(self.token_bytes(t) for t in token_ids if t >= OFFSET or not skip_special_tokens).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < OFFSET:
            return f"<{token_id}>".encode()
        return bytes([token_id - OFFSET]) if token_id < OFFSET + 256 else b"?"

    def assembler(self, params: TextParams, parse: OutputParse | None = None) -> ByteAssembler | ChatAssembler:
        self.parses.append(parse)
        return ByteAssembler(params) if parse is None else ChatAssembler(params, parse)

    async def close(self) -> None:
        return None


def echo_reply(request: EngineRequest) -> str:
    """A reply that depends on the seed alone, so that equal seeds give equal answers."""
    return f"seed {request.sampling.seed} says héllo."


@dataclass
class FakeEngine:
    """Streams `reply(request)` token by token. `gate` (a semaphore), when set, lets one output through a permit."""

    info: ModelInfo
    reply: Callable[[EngineRequest], str | list[int]] = echo_reply
    step: int = 1
    gate: asyncio.Semaphore | None = None
    failure: Callable[[EngineRequest], Exception | RequestOutput | None] | None = None
    stats: EngineStats = field(default_factory=lambda: EngineStats(blocks_total=100, blocks_leased=25, prompt_tokens=7))
    submitted: list[EngineRequest] = field(default_factory=list)
    aborted: list[RequestId] = field(default_factory=list)
    closed: list[RequestId] = field(default_factory=list)
    produced: int = 0
    hints: list[SessionHint] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def submit(self, request: EngineRequest) -> AsyncIterator[RequestOutput]:
        return self._run(request)

    async def _run(self, request: EngineRequest) -> AsyncIterator[RequestOutput]:
        self.submitted.append(request)
        try:
            failure = self.failure(request) if self.failure is not None else None
            if isinstance(failure, RequestOutput):
                yield failure
                return
            if failure is not None:
                raise failure
            reply = self.reply(request)
            ids = ids_of(reply) if isinstance(reply, str) else list(reply)
            ends = len(ids) < request.sampling.max_tokens
            ids = ids[: request.sampling.max_tokens]
            if ends:
                ids.append(EOS)
            for start in range(0, len(ids), self.step):
                if self.gate is not None:
                    await self.gate.acquire()
                else:
                    await asyncio.sleep(0)
                part = ids[start : start + self.step]
                last = start + self.step >= len(ids)
                self.produced += len(part)
                yield self._output(request, part, first=start == 0, last=last, ends=ends)
        finally:
            self.closed.append(request.request_id)

    def _output(self, request: EngineRequest, part: list[int], *, first: bool, last: bool, ends: bool) -> RequestOutput:
        count = request.sampling.logprobs
        logprobs = None
        if count is not None:
            logprobs = [
                TokenLogprob(-0.5, [(token, -0.5 - i) for i, token in enumerate(range(65, 65 + count))]) for _ in part
            ]
        return RequestOutput(
            request.request_id,
            token_ids=part,
            logprobs=logprobs,
            cached_tokens=4 if first else None,
            finish=(Finish.STOP if ends else Finish.LENGTH) if last else None,
            stop_token=last and ends,
            timing=Timing(0.001, 0.002, 0.003, 0) if last else None,
        )

    def abort(self, request_id: RequestId) -> None:
        self.aborted.append(request_id)

    def hint(self, hint: SessionHint) -> None:
        self.hints.append(hint)

    async def drain(self) -> None:
        return None

    async def close(self) -> None:
        return None


def model_info(**changes: object) -> ModelInfo:
    info = ModelInfo(
        name=MODEL, model_type="llama", dtype=Dtype.F32, device="cpu", exact=False, parameters=1, vocab_size=259,
        max_model_len=4096, weights=bytes(range(32)), layers=1, kv_heads=1, head_dim=2, block_tokens=16,
        block_bytes=256, blocks=100, codec=next(iter(Codec)), eos_token_ids=[EOS],
    )  # fmt: skip
    return ModelInfo(**{**{name: getattr(info, name) for name in info.__struct_fields__}, **changes})


class Records:
    """Takes lineage facts and log records."""

    def __init__(self) -> None:
        self.facts: list[LineageFact] = []
        self.records: list[RequestRecord] = []

    def record(self, fact: LineageFact) -> None:
        self.facts.append(fact)

    def write(self, record: RequestRecord) -> None:
        self.records.append(record)


@dataclass
class Site:
    """A running gateway with everything behind it."""

    gateway: Gateway
    engine: FakeEngine
    prompting: BytePrompting
    kept: Records
    metrics: PrometheusMetrics
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def counted(self, what: str) -> float:
        """The edge's count of `what`."""
        text = self.metrics.render(self.engine.stats, self.engine.info).decode()
        line = next(line for line in text.splitlines() if line.startswith(f'isthmus_edge_total{{what="{what}"}}'))
        return float(line.split()[-1])


@asynccontextmanager
async def serving(
    settings: GatewaySettings | None = None,
    engine: FakeEngine | None = None,
    prompting: BytePrompting | None = None,
    defaults: SamplingDefaults = OPENAI_DEFAULTS,
) -> AsyncIterator[Site]:
    """A gateway on a free loopback port."""
    engine = engine or FakeEngine(model_info())
    prompting = prompting or BytePrompting(engine.info.vocab_size)
    kept, metrics = Records(), PrometheusMetrics(engine.info.name)
    deps = GatewayDeps(
        engine=engine, prompting=prompting, lineage=kept, metrics=metrics, log=kept, clock=SystemClock(),
        entropy=CountingEntropy(), namespace=Namespace(b"n" * 32), defaults=defaults,
    )  # fmt: skip
    gateway = Gateway(deps, replace(settings or GatewaySettings(), port=0))
    host, port = await gateway.start()
    try:
        yield Site(gateway, engine, prompting, kept, metrics, host, port)
    finally:
        await gateway.close()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds; the test's own timeout bounds it."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def raw(site: Site, data: bytes, *, half_close: bool = False) -> bytes:
    """Send raw bytes on a new connection and read until the server closes it."""
    reader, writer = await asyncio.open_connection(site.host, site.port)
    try:
        writer.write(data)
        await writer.drain()
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


def post(path: str, body: bytes, *headers: str, close: bool = True) -> bytes:
    """A POST request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def small_socket(site: Site) -> socket.socket:
    """A connected, non-blocking socket with a small receive buffer, for a reader that does not read."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((site.host, site.port))
    sock.setblocking(False)
    return sock
