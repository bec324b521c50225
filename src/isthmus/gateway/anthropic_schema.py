"""Anthropic's Messages dialect as typed structs: request bodies, strict, and answers.

A field that is not here is refused by name. What is here and not in `IGNORED` does something; `UNSUPPORTED` are fields
of the dialect that this server refuses by name.
Source: the published Messages API (`anthropic-version: 2023-06-01`) and its official client's types.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from isthmus.contracts.ids import MAX_MODEL_NAME_CHARS
from isthmus.contracts.prompting import MAX_MESSAGES, MAX_TOOLS
from isthmus.contracts.sampling import MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_TOKENS_LIMIT, MAX_TOP_K
from isthmus.gateway.schema_tools import CallId, Schema, ToolName

MAX_BLOCKS = 4096
"""Content blocks of one message."""
IGNORED = ("metadata", "service_tier", "inference_geo")
UNSUPPORTED = frozenset({
    "container", "context_management", "mcp_servers", "speed", "prefill", "citations", "caller", "diagnostics",
    "user_profile_id", "workspace_id", "defer_loading", "allowed_callers", "input_examples",
})  # fmt: skip

StopSequence = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


class CacheControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mark of what to keep. Every full block of a prompt is kept anyway; a mark makes `usage` count what was new."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """Text."""

    text: str
    cache_control: CacheControl | None = None


class PlainText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Text where nothing else may stand. A lone struct's tag may be left out of a body; this `type` may not."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ThinkingBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="thinking"):
    """What an assistant thought before it answered, as an answer gave it. The signature is not looked at."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="redacted_thinking"):
    """Thinking of another server that nobody here can read; it is left out."""

    data: str


class ToolUseBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tool_use"):
    """A call that an assistant made."""

    id: CallId
    name: ToolName
    input: Schema
    cache_control: CacheControl | None = None


class ToolResultBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tool_result"):
    """What a tool answered."""

    tool_use_id: CallId
    content: str | Annotated[list[PlainText], Meta(max_length=MAX_BLOCKS)] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class MessageIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Meta(min_length=1, max_length=MAX_BLOCKS)]


class ToolIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool of the client's own. `strict`: calls keep the schema also when the model calls of its own accord."""

    name: ToolName
    input_schema: Schema
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ChoiceAuto(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="auto"):
    """The model decides whether it calls a tool."""

    disable_parallel_tool_use: bool | None = None


class ChoiceAny(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="any"):
    """The model calls some tool."""

    disable_parallel_tool_use: bool | None = None


class ChoiceTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tool"):
    """The model calls this tool."""

    name: ToolName
    disable_parallel_tool_use: bool | None = None


class ChoiceNone(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="none"):
    """The model calls no tool."""


class ThinkingEnabled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="enabled"):
    """The model thinks first. `budget_tokens` is not enforced: thinking counts towards `max_tokens`."""

    budget_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS_LIMIT)]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="adaptive"):
    """The model may think first: it is asked to."""

    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="disabled"):
    """The model is asked not to think."""


class OutputFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer is JSON that keeps this schema."""

    type: Literal["json_schema"]
    schema: Schema


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of the answer. `effort` asks the model to think first, where `thinking` says nothing."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who asks, in the client's words. Ignored, and counted."""

    user_id: str | None = None


class CountRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a conversation consists of: the body of `/v1/messages/count_tokens`, and most of `/v1/messages`."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_NAME_CHARS)]
    messages: Annotated[list[MessageIn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[list[PlainText], Meta(max_length=MAX_BLOCKS)] | None = None
    tools: Annotated[list[ToolIn], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ChoiceAuto | ChoiceAny | ChoiceTool | ChoiceNone | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `/v1/messages`. `seed` is an addition of ours, as everywhere: an answer can be drawn again."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS_LIMIT)]
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=MAX_TOP_K)] | None = None
    stop_sequences: Annotated[list[StopSequence], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class CacheUsage(msgspec.Struct, frozen=True):
    """Tokens. The prompt is the sum of `input_tokens` and both cache fields; each of its tokens counts once."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class TextOut(msgspec.Struct, frozen=True, tag="text"):
    """Text of an answer."""

    text: str


class ThinkingOut(msgspec.Struct, frozen=True, tag="thinking"):
    """What the model thought. It is not signed: nothing here relies on it when it comes back."""

    thinking: str
    signature: str = ""


class ToolUseOut(msgspec.Struct, frozen=True, tag="tool_use"):
    """A call that the client is to make."""

    id: str
    name: str
    input: dict[str, Any]


BlockOut = TextOut | ThinkingOut | ToolUseOut


class MessageOut(msgspec.Struct, frozen=True, tag="message"):
    """A whole answer; `stop_reason` is null only at the start of a stream."""

    id: str
    role: Literal["assistant"]
    model: str
    content: list[BlockOut]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: CacheUsage


class TokenCount(msgspec.Struct, frozen=True):
    """The answer of `count_tokens`."""

    input_tokens: int


class AnthropicErrorObject(msgspec.Struct, frozen=True):
    """What went wrong, in Anthropic's kinds."""

    type: str
    message: str


class AnthropicError(msgspec.Struct, frozen=True, tag="error"):
    """The body of every refusal of this dialect, and the last event of a stream that failed."""

    error: AnthropicErrorObject
    request_id: str


class MessageStart(msgspec.Struct, frozen=True, tag="message_start"):
    """The stream's first event: the message without content."""

    message: MessageOut


class BlockStart(msgspec.Struct, frozen=True, tag="content_block_start"):
    """A block begins; what is in it comes in deltas."""

    index: int
    content_block: BlockOut


class TextPart(msgspec.Struct, frozen=True, tag="text_delta"):
    """More text."""

    text: str


class ThinkingPart(msgspec.Struct, frozen=True, tag="thinking_delta"):
    """More thinking."""

    thinking: str


class InputPart(msgspec.Struct, frozen=True, tag="input_json_delta"):
    """More of a call's input, as JSON text."""

    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, tag="content_block_delta"):
    """More of the block that is open."""

    index: int
    delta: TextPart | ThinkingPart | InputPart


class BlockStop(msgspec.Struct, frozen=True, tag="content_block_stop"):
    """The block is whole."""

    index: int


class MessageEnd(msgspec.Struct, frozen=True):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag="message_delta"):
    """The message's end, with the final counts."""

    delta: MessageEnd
    usage: CacheUsage


class MessageStop(msgspec.Struct, frozen=True, tag="message_stop"):
    """The stream's last event."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Nothing; clients pass over it."""


StreamEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping | AnthropicError
