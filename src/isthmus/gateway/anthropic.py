"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect, whole or as a stream of events.

    message_start, then for each block  content_block_start, content_block_delta ..., content_block_stop,
    then message_delta (why it ended, final counts), message_stop

Counts: `cache_read_input_tokens` are prompt tokens whose state was reused. Every full block of a prompt is kept, asked
or not; where the request marks something with `cache_control`, those of its blocks that were new are counted as
`cache_creation_input_tokens`, else they count as input.
"""

from typing import Any

import msgspec

from isthmus.contracts.prompting import Piece, ToolDelta
from isthmus.contracts.telemetry import Count
from isthmus.gateway.answer import CollectedAnswer, CollectedCall, CollectedText, call_id
from isthmus.gateway.anthropic_asks import ask_of, chat_messages, chat_options, hides_thinking, marks_cache
from isthmus.gateway.anthropic_schema import (
    IGNORED,
    UNSUPPORTED,
    AnthropicError,
    AnthropicErrorObject,
    BlockDelta,
    BlockOut,
    BlockStart,
    BlockStop,
    CacheUsage,
    CountRequest,
    InputPart,
    MessageDelta,
    MessageEnd,
    MessageOut,
    MessagesRequest,
    MessageStart,
    MessageStop,
    Ping,
    StopReason,
    StreamEvent,
    TextOut,
    TextPart,
    ThinkingOut,
    ThinkingPart,
    TokenCount,
    ToolUseOut,
)
from isthmus.gateway.context import Call
from isthmus.gateway.conversation import converse, prepare
from isthmus.gateway.decode import decode_json
from isthmus.gateway.errors import HttpError
from isthmus.gateway.render import ErrorFormat, Tail, encode
from isthmus.gateway.sequence import Delta, SequenceState
from isthmus.gateway.service import Service

API = "messages"
CALL_PREFIX = "toolu_"
_KINDS = {400: "invalid_request_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
          503: "overloaded_error", 504: "timeout_error"}  # fmt: skip


def _error(error: HttpError, request_id: str) -> AnthropicError:
    found = error.body.error
    message = f"{found.param}: {found.message}" if found.param and found.param not in found.message else found.message
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return AnthropicError(AnthropicErrorObject(kind, message), request_id)


def sse(value: StreamEvent) -> bytes:
    """`value` as one server-sent event, named by its type."""
    data = encode(value)
    name = str(value.__struct_config__.tag).encode()
    return b"event: " + name + b"\ndata: " + data + b"\n\n"


ANTHROPIC_ERRORS = ErrorFormat(
    lambda error, request_id: encode(_error(error, request_id)),
    lambda error, request_id: sse(_error(error, request_id)),
)


async def messages(service: Service, call: Call) -> None:
    """Answer a conversation."""
    body = decode_json(call.exchange.request, MessagesRequest, service.settings, UNSUPPORTED)
    call.exchange.headers.append(("request-id", call.request_id))
    for name in IGNORED:
        if getattr(body, name) is not None:
            service.deps.metrics.count(Count.IGNORED_FIELD)
    service.planner.check_model(body.model)
    prepared = await prepare(service, call, ask_of(body))
    call.stream = bool(body.stream)
    ending = Ending(service, body, prepared.prompt_tokens)
    if body.stream:
        stream = MessageStream(call, service, ending)
        states = await converse(service, call, prepared, API, lambda _: stream.add)
        await stream.end(states[0])
        return
    collected = CollectedAnswer(service.deps.entropy, CALL_PREFIX)
    last = Last()

    async def take(delta: Delta) -> None:
        """Collect, and remember how it ended."""
        await collected.add(delta)
        last.take(delta)

    states = await converse(service, call, prepared, API, lambda _: take)
    answer = MessageOut(
        id=call.request_id,
        role="assistant",
        model=service.info.name,
        content=_content(collected, hidden=ending.hidden),
        stop_reason=ending.reason(last, states[0], called=bool(collected.calls)),
        stop_sequence=last.stop or None,
        usage=ending.usage(states[0]),
    )
    await call.exchange.respond(200, encode(answer), "application/json")


async def count_tokens(service: Service, call: Call) -> None:
    """How many tokens a conversation's prompt has, tools included."""
    body = decode_json(call.exchange.request, CountRequest, service.settings, UNSUPPORTED)
    call.exchange.headers.append(("request-id", call.request_id))
    service.planner.check_model(body.model)
    ids = await service.prompting.encode_chat(chat_messages(body), chat_options(body))
    await call.exchange.respond(200, encode(TokenCount(len(ids))), "application/json")


def _content(collected: CollectedAnswer, *, hidden: bool) -> list[BlockOut]:
    found: list[BlockOut] = []
    for part in collected.parts:
        match part:
            case CollectedText(reasoning=True):
                found.append(ThinkingOut("" if hidden else part.text))
            case CollectedText():
                found.append(TextOut(part.text))
            case CollectedCall():
                found.append(_tool_use(part))
    return found


def _tool_use(call: CollectedCall) -> BlockOut:
    """A call; one that was cut off, so that its input is no JSON object, is shown as the text it is."""
    try:
        value = msgspec.json.decode(call.arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        return TextOut(f"{call.name}({call.arguments}")
    return ToolUseOut(call.id, call.name, value)


class Last:
    """How an answer ended: OpenAI's reason, and the stop string that was met."""

    def __init__(self) -> None:
        self.finish = "stop"
        self.stop = ""

    def take(self, delta: Delta) -> None:
        """Look at one step."""
        if delta.finish is not None:
            self.finish, self.stop = delta.finish, delta.stop


class Ending:
    """What an answer's end says: the reason, and the counts."""

    def __init__(self, service: Service, body: MessagesRequest, prompt_tokens: int) -> None:
        self.hidden = hides_thinking(body)
        self.prompt_tokens = prompt_tokens
        self._info = service.info
        self._marked = marks_cache(body)
        self._max_tokens = body.max_tokens

    def reason(self, last: Last, state: SequenceState, *, called: bool) -> StopReason:
        """Anthropic's reason."""
        if last.finish == "length":
            return "model_context_window_exceeded" if state.output_tokens < self._max_tokens else "max_tokens"
        if last.stop:
            return "stop_sequence"
        return "tool_use" if called else "end_turn"

    def usage(self, state: SequenceState | None) -> CacheUsage:
        """The counts; all input and nothing else while the engine has said nothing yet."""
        if state is None:
            return CacheUsage(self.prompt_tokens, 0, 0, 0)
        read, size = state.cached_tokens, self._info.block_tokens
        kept = max(0, self.prompt_tokens // size * size - read) if self._marked else 0
        return CacheUsage(self.prompt_tokens - read - kept, kept, read, state.output_tokens)


class MessageStream:
    """Writes one answer as events, a write a step. A block is open until something of another kind comes."""

    def __init__(self, call: Call, service: Service, ending: Ending) -> None:
        self._call = call
        self._service = service
        self._ending = ending
        self._tail = Tail(call.exchange, 1, done=b"")
        self._last = Last()
        self._started = False
        self._block = -1
        self._open: str | int | None = None
        self._called = False

    async def add(self, delta: Delta) -> None:
        """Write what a step added."""
        events: list[StreamEvent] = [] if self._started else self._start()
        self._started = True
        if delta.parts:
            for part in delta.parts:
                events += self._part(part)
        elif delta.text:
            events += self._part(Piece(delta.text))
        self._last.take(delta)
        await self._tail.put(b"".join(map(sse, events)), last=delta.finish is not None)

    def _start(self) -> list[StreamEvent]:
        usage = self._ending.usage(None)
        model = self._service.info.name
        return [MessageStart(MessageOut(self._call.request_id, "assistant", model, [], None, None, usage)), Ping()]

    def _part(self, part: Piece) -> list[StreamEvent]:
        """The events of one part: it is reasoning, or text, or of one call."""
        events: list[StreamEvent] = []
        for call in part.calls:
            events += self._call_part(call)
        if part.reasoning:
            events += self._switch("thinking", ThinkingOut(""))
            if not self._ending.hidden:
                events.append(BlockDelta(self._block, ThinkingPart(part.reasoning)))
        if part.text:
            events += [*self._switch("text", TextOut("")), BlockDelta(self._block, TextPart(part.text))]
        return events

    def _call_part(self, call: ToolDelta) -> list[StreamEvent]:
        self._called = True
        fresh = ToolUseOut(call_id(self._service.deps.entropy, CALL_PREFIX), call.name or "", {})
        events = self._switch(call.index, fresh)
        if call.arguments:
            events.append(BlockDelta(self._block, InputPart(call.arguments)))
        return events

    def _switch(self, kind: str | int, fresh: BlockOut) -> list[StreamEvent]:
        """Close the open block and begin `fresh`, unless a block of this kind is open (a call's kind is its index)."""
        if self._open == kind:
            return []
        events = self._close()
        self._open = kind
        self._block += 1
        return [*events, BlockStart(self._block, fresh)]

    def _close(self) -> list[StreamEvent]:
        if self._open is None:
            return []
        self._open = None
        return [BlockStop(self._block)]

    async def end(self, state: SequenceState) -> None:
        """Close what is open, say why it ended, and end the stream."""
        reason = self._ending.reason(self._last, state, called=self._called)
        end = MessageDelta(MessageEnd(reason, self._last.stop or None), self._ending.usage(state))
        events: list[StreamEvent] = [*self._close(), end, MessageStop()]
        await self._tail.end(b"".join(map(sse, events)))
