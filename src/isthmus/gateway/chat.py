"""POST /v1/chat/completions: the answer whole, or as a stream of chunks."""

from dataclasses import dataclass, field

from msgspec import UNSET

from isthmus.contracts.prompting import ChatMessage
from isthmus.gateway.context import Call
from isthmus.gateway.decode import decode_json
from isthmus.gateway.errors import HttpError
from isthmus.gateway.plan import Limits
from isthmus.gateway.render import Tail, TokenBytes, chat_logprobs, encode, event, usage
from isthmus.gateway.schema_requests import ChatRequest, Message
from isthmus.gateway.schema_responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    TokenLogprobEntry,
    Usage,
)
from isthmus.gateway.sequence import Delta, SequenceState, run_together
from isthmus.gateway.service import Service

API = "chat"


def chat_messages(messages: list[Message]) -> list[ChatMessage]:
    """The messages of a body as the prompting plane takes them. Raises `InvalidInput`."""
    return [ChatMessage(message.role, message.text(), message.name) for message in messages]


async def chat_completions(service: Service, call: Call) -> None:
    """Answer a chat completion."""
    body = decode_json(call.exchange.request, ChatRequest, service.settings)
    service.count_ignored(body)
    service.planner.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs: true", code="invalid_input", param="top_logprobs")
    n = body.n or 1
    service.planner.check_sequences(1, n)
    prompt = await service.prompting.encode_chat(chat_messages(body.messages))
    field_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    plans = service.planner.sequences(
        body,
        [prompt],
        request_id=call.request_id,
        limits=Limits(body.max_completion_tokens or body.max_tokens, field_name),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        deadline_s=call.remaining(service.clock),
        param="messages",
    )
    call.stream, call.sequences, call.prompt_tokens = bool(body.stream), n, len(prompt)
    created = int(service.clock.wall())
    token_bytes = service.prompting.token_bytes
    if body.stream:
        include = body.stream_options is not None and bool(body.stream_options.include_usage)
        stream = ChatStream(call, service, created, Tail(call.exchange, n), include)
        states = await run_together([service.sequences.run(plan, call, API, stream.add) for plan in plans])
        call.cached_tokens = states[0].cached_tokens
        await stream.end(states, n)
        return
    collected = [ChatCollector(token_bytes) for _ in plans]
    runs = [service.sequences.run(plan, call, API, collected[plan.index].add) for plan in plans]
    states = await run_together(runs)
    call.cached_tokens = states[0].cached_tokens
    choices = [one.choice(index) for index, one in enumerate(collected)]
    answer = ChatCompletion(
        id=call.request_id,
        object="chat.completion",
        created=created,
        model=service.info.name,
        choices=choices,
        usage=usage(states, n),
        system_fingerprint=service.fingerprint,
    )
    await call.exchange.respond(200, encode(answer), "application/json")


@dataclass(slots=True)
class ChatCollector:
    """Collects one whole answer."""

    token_bytes: TokenBytes
    text: list[str] = field(default_factory=list)
    entries: list[TokenLogprobEntry] | None = None
    finish: str | None = None

    async def add(self, delta: Delta) -> None:
        """Take what a step added."""
        self.text.append(delta.text)
        found = chat_logprobs(delta, self.token_bytes)
        if found is not None:
            self.entries = (self.entries or []) + found.content
        self.finish = delta.finish

    def choice(self, index: int) -> ChatChoice:
        """The finished choice."""
        logprobs = None if self.entries is None else ChatLogprobs(self.entries)
        message = AssistantMessage("assistant", "".join(self.text))
        return ChatChoice(index, message, logprobs, "length" if self.finish == "length" else "stop")


class ChatStream:
    """Writes one chat stream. Chunks that only add text are put together from bytes encoded once."""

    def __init__(self, call: Call, service: Service, created: int, tail: Tail, include_usage: bool) -> None:
        self._call = call
        self._service = service
        self._created = created
        self._tail = tail
        self._include_usage = include_usage
        self._opened: set[int] = set()
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
        if logprobs is not None and logprobs.content:
            choice = ChatChunkChoice(delta.index, ChatDelta(content=delta.text), logprobs, None)
            parts.append(self._chunk([choice]))
        elif delta.text:
            parts += [self._head, index, b',"delta":{"content":', encode(delta.text), self._after]
        if delta.finish is not None:
            reason = b'"length"' if delta.finish == "length" else b'"stop"'
            parts += [self._head, index, b',"delta":{},"logprobs":null,"finish_reason":', reason, b"}]}\n\n"]
        await self._tail.put(b"".join(parts), last=delta.finish is not None)

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
