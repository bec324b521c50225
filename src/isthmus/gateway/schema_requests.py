"""Request bodies: OpenAI's dialect as typed structs, strict, every field named.

A field that is not here is refused by name. Three kinds of fields are here: those that do something; `IGNORED_FIELDS`,
which are accepted because they describe the caller and change no answer; and `UNSUPPORTED_FIELDS`, which are taken only
with the value that means "off", so that a client that always sends them works and one that needs them is told.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from isthmus.contracts.blocks import MAX_SESSION_CHARS, HintKind
from isthmus.contracts.ids import MAX_MODEL_NAME_CHARS
from isthmus.contracts.prompting import MAX_MESSAGES, MAX_TOOL_CALLS, MAX_TOOLS
from isthmus.contracts.requests import MAX_DEADLINE_S, MAX_PROMPT_TOKENS, PRIORITY_RANGE
from isthmus.contracts.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS_LIMIT,
    MAX_TOP_K,
)
from isthmus.gateway.schema_tools import (
    CallId,
    Choices,
    Effort,
    MessageToolCall,
    NamedTool,
    Pattern,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    TemplateOptions,
    Tool,
)

MAX_N = 64
MAX_PROMPTS = 64
MAX_TOKEN_ID = 2**31 - 1
MAX_INT = 2**63 - 1

IGNORED_FIELDS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "refusal",
})  # fmt: skip
UNSUPPORTED_FIELDS = frozenset({
    "functions", "function_call", "modalities", "audio", "prediction", "web_search_options", "verbosity", "suffix",
    "best_of", "lora", "adapter", "media", "images", "annotations",
})  # fmt: skip

ModelName = Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_NAME_CHARS)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Nothing = Annotated[list[Any], Meta(max_length=0)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
Bias = dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], Annotated[float, Meta(ge=-100, le=100)]]
MaxTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS_LIMIT)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream carries besides text. `include_usage`: a last chunk with the token counts."""

    include_usage: bool | None = None


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message. Text parts are joined with newlines; null content is empty text.

    Calls and reasoning are an assistant's, as an answer gave them, and the id of the call that is answered is a tool's:
    elsewhere they are refused. `reasoning` is another name of `reasoning_content`.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: CallId | None = None
    tool_calls: Annotated[list[MessageToolCall], Meta(max_length=MAX_TOOL_CALLS)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    function_call: None = None
    audio: None = None
    annotations: Nothing | None = None

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or ())


class SamplingFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What chat and completions have in common. null means the default."""

    model: ModelName | None = None
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS_LIMIT)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOP_K)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[Bias, Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[int, Meta(ge=-MAX_INT - 1, le=MAX_INT)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=PRIORITY_RANGE[0], le=PRIORITY_RANGE[1])] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | Pattern | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    lora: None = None
    adapter: None = None
    media: Nothing | None = None
    images: Nothing | None = None


class ChatRequest(SamplingFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions. `max_completion_tokens` and `max_tokens` are the same limit; both must agree."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    parallel_tool_calls: bool | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateOptions | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    verbosity: None = None


class CompletionRequest(SamplingFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions. `prompt`: a string, a list of strings, token ids, or a list of lists of token ids."""

    prompt: str | Annotated[list[str | TokenId | TokenIds], Meta(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /tokenize: `prompt` or `messages`, one of them (vLLM's shape). `tools` are those of a conversation."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize (vLLM's shape)."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_PROMPT_TOKENS)]


class HintRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/state/hints."""

    session: Annotated[str, Meta(min_length=1, max_length=MAX_SESSION_CHARS)]
    hint: HintKind
    seconds: Annotated[float, Meta(ge=0, le=MAX_DEADLINE_S)] = 0.0
