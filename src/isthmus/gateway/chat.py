"""POST /v1/chat/completions: the answer whole, or as a stream of chunks."""

from dataclasses import dataclass

from msgspec import UNSET

from isthmus.contracts.prompting import Piece, ToolDelta
from isthmus.gateway.answer import CollectedAnswer, call_id
from isthmus.gateway.context import Call
from isthmus.gateway.conversation import Ask, Prepared, converse, prepare
from isthmus.gateway.decode import decode_json
from isthmus.gateway.errors import HttpError
from isthmus.gateway.output_form import response_constraint
from isthmus.gateway.plan import Limits
from isthmus.gateway.render import Tail, TokenBytes, chat_logprobs, encode, event, usage
from isthmus.gateway.schema_requests import ChatRequest
from isthmus.gateway.schema_responses import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    FunctionDelta,
    TokenLogprobEntry,
    ToolCallDelta,
    ToolCallEntry,
    Usage,
)
from isthmus.gateway.sequence import Delta, SequenceState, Sink
from isthmus.gateway.service import Service
from isthmus.gateway.tools import chat_messages, chat_options

API = "chat"


def ask_of(body: ChatRequest) -> Ask:
    """What `body` asks for. Raises `HttpError` and `InvalidInput` naming the field."""
    if body.top_logprobs and not body.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs: true", code="invalid_input", param="top_logprobs")
    response, field_name = response_constraint(body)
    limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return Ask(
        messages=chat_messages(body.messages),
        sampling=body,
        limits=Limits(body.max_completion_tokens or body.max_tokens, limit_name),
        options=chat_options(body),
        response=response,
        response_field=field_name,
        tool_fields=tuple(f"tools[{index}].function.parameters" for index in range(len(body.tools or ()))),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


async def chat_completions(service: Service, call: Call) -> None:
    """Answer a chat completion."""
    body = decode_json(call.exchange.request, ChatRequest, service.settings)
    service.count_ignored(body)
    service.planner.check_model(body.model)
    prepared = await prepare(service, call, ask_of(body))
    call.stream = bool(body.stream)
    created = int(service.clock.wall())
    if body.stream:
        include = body.stream_options is not None and bool(body.stream_options.include_usage)
        stream = ChatStream(call, service, created, Tail(call.exchange, call.sequences), include)
        states = await converse(service, call, prepared, API, lambda _: stream.add)
        await stream.end(states, call.sequences)
        return
    await _whole(service, call, prepared, created)


async def _whole(service: Service, call: Call, prepared: Prepared, created: int) -> None:
    """Answer with everything at once."""
    token_bytes, entropy = service.prompting.token_bytes, service.deps.entropy
    collected = [ChatCollector(token_bytes, CollectedAnswer(entropy)) for _ in prepared.plans]

    def sink_of(index: int) -> Sink:
        return collected[index].add

    states = await converse(service, call, prepared, API, sink_of)
    answer = ChatCompletion(
        id=call.request_id,
        object="chat.completion",
        created=created,
        model=service.info.name,
        choices=[one.choice(index) for index, one in enumerate(collected)],
        usage=usage(states, call.sequences),
        system_fingerprint=service.fingerprint,
    )
    await call.exchange.respond(200, encode(answer), "application/json")


@dataclass(slots=True)
class ChatCollector:
    """Collects one whole answer."""

    token_bytes: TokenBytes
    answer: CollectedAnswer
    entries: list[TokenLogprobEntry] | None = None

    async def add(self, delta: Delta) -> None:
        """Take what a step added."""
        await self.answer.add(delta)
        found = chat_logprobs(delta, self.token_bytes)
        if found is not None:
            self.entries = (self.entries or []) + found.content

    def choice(self, index: int) -> ChatChoice:
        """The finished choice."""
        answer = self.answer
        logprobs = None if self.entries is None else ChatLogprobs(self.entries)
        calls = [ToolCallEntry(one.id, "function", CalledFunction(one.name, one.arguments)) for one in answer.calls]
        message = AssistantMessage(
            "assistant",
            answer.text or (None if calls else ""),
            reasoning_content=answer.reasoning or UNSET,
            tool_calls=calls or UNSET,
        )
        return ChatChoice(index, message, logprobs, finish_reason(answer.finish, called=bool(calls)))


def finish_reason(finish: str, *, called: bool) -> ChatFinishReason:
    """OpenAI's reason of an answer that ended with `finish`. A call that was cut off is no call."""
    if finish == "length":
        return "length"
    return "tool_calls" if called else "stop"


class ChatStream:
    """Writes one chat stream. Chunks that only add text are put together from bytes encoded once."""

    def __init__(self, call: Call, service: Service, created: int, tail: Tail, include_usage: bool) -> None:
        self._call = call
        self._service = service
        self._created = created
        self._tail = tail
        self._include_usage = include_usage
        self._opened: set[int] = set()
        self._called: set[int] = set()
        head = b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"system_fingerprint":%b,' % (
            encode(call.request_id),
            created,
            encode(service.info.name),
            encode(service.fingerprint),
        )
        self._head = head + (b'"usage":null,"choices":[{"index":' if include_usage else b'"choices":[{"index":')
        self._roles = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        self._after = b'},"logprobs":null,"finish_reason":null}]}\n\n'

    async def add(self, delta: Delta) -> None:
        """Write what a step added to one sequence, in one write."""
        index = b"%d" % delta.index
        parts = []
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            parts += [self._head, index, self._roles]
        logprobs = chat_logprobs(delta, self._service.prompting.token_bytes)
        if delta.parts or (logprobs is not None and logprobs.content):
            parts += self._rich(delta, logprobs)
        elif delta.text:
            parts += [self._head, index, b',"delta":{"content":', encode(delta.text), self._after]
        if delta.finish is not None:
            reason = encode(finish_reason(delta.finish, called=delta.index in self._called))
            parts += [self._head, index, b',"delta":{},"logprobs":null,"finish_reason":', reason, b"}]}\n\n"]
        await self._tail.put(b"".join(parts), last=delta.finish is not None)

    def _rich(self, delta: Delta, logprobs: ChatLogprobs | None) -> list[bytes]:
        """The chunks of a step that added more than text: one a part, the log probabilities with the first."""
        chunks = []
        for part in delta.parts or (Piece(delta.text),):
            choice = ChatChunkChoice(delta.index, self._part(delta.index, part), logprobs, None)
            chunks.append(self._chunk([choice]))
            logprobs = None
        return chunks

    def _part(self, index: int, part: Piece) -> ChatDelta:
        if part.calls:
            self._called.add(index)
            return ChatDelta(tool_calls=[self._tool_call(call) for call in part.calls])
        return ChatDelta(reasoning_content=part.reasoning) if part.reasoning else ChatDelta(content=part.text)

    def _tool_call(self, call: ToolDelta) -> ToolCallDelta:
        """A part of a call: the first has a fresh id, the type and the name."""
        if call.name is None:
            return ToolCallDelta(call.index, FunctionDelta(call.arguments))
        fresh = call_id(self._service.deps.entropy)
        return ToolCallDelta(call.index, FunctionDelta(call.arguments, call.name), fresh, "function")

    def _chunk(self, choices: list[ChatChunkChoice], counts: Usage | None = None) -> bytes:
        chunk = ChatChunk(
            id=self._call.request_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._service.info.name,
            choices=choices,
            system_fingerprint=self._service.fingerprint,
            usage=counts if self._include_usage else UNSET,
        )
        return event(chunk)

    async def end(self, states: list[SequenceState], n: int) -> None:
        """Write the usage chunk, if it was asked for, and the end."""
        await self._tail.end(self._chunk([], usage(states, n)) if self._include_usage else b"")
