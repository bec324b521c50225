"""Which way of writing tool calls and reasoning a model was taught, and the marks that it uses for them.

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once a call        Hermes 2, Qwen 2.5, Qwen 3
    llama    {"name": ..., "parameters": {...}}, bare or after <|python_tag|>, `;` between  Llama 3.1 to 3.3
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]                          tokenizers v3 and v7
             [TOOL_CALLS]name[ARGS]{...}, once a call                                      tokenizers v11 and later

Reasoning comes first, as `<think>...</think>` (Qwen 3, DeepSeek R1) or `[THINK]...[/THINK]` (Mistral).
A template shows by the marks in its source what the model writes; a setting can say otherwise.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.contracts.errors import ModelInvalid
from isthmus.contracts.prompting import PROMPT_TAIL_TOKENS
from isthmus.execution.prompting.vocabulary import Vocabulary


class ToolDialect(enum.StrEnum):
    """How calls are written."""

    HERMES = "hermes"
    LLAMA = "llama"
    MISTRAL = "mistral"


class ReasoningDialect(enum.StrEnum):
    """How reasoning is set apart."""

    THINK = "think"
    MISTRAL = "mistral"


AUTO, NONE = "auto", "none"
TOOL_PARSERS = (AUTO, *ToolDialect, NONE)
REASONING_PARSERS = (AUTO, *ReasoningDialect, NONE)

HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
MISTRAL_CALLS, MISTRAL_ARGS, MISTRAL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_REASONING_MARKS = {
    ReasoningDialect.THINK: ("<think>", "</think>"),
    ReasoningDialect.MISTRAL: ("[THINK]", "[/THINK]"),
}
_TOOL_MARKS = {
    ToolDialect.HERMES: (HERMES_OPEN, HERMES_CLOSE),
    ToolDialect.LLAMA: (PYTHON_TAG,),
    ToolDialect.MISTRAL: (MISTRAL_CALLS, MISTRAL_ARGS, MISTRAL_ID),
}
# Other families put XML within the same mark (Qwen 3 Coder, GLM 4.5): reading that as Hermes would find nothing.
_NOT_HERMES = ("<function=", "<arg_key>")


class Opening(enum.Enum):
    """What the end of a prompt says of the reasoning that its answer may start with."""

    UNSAID = enum.auto()
    OPENED = enum.auto()
    CLOSED = enum.auto()


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one model writes; None where it is not known to write any. `named`: Mistral's later form of calls."""

    tools: ToolDialect | None = None
    reasoning: ReasoningDialect | None = None
    named: bool = False

    @property
    def reasoning_marks(self) -> tuple[str, str] | None:
        """The marks that open and close the reasoning."""
        return None if self.reasoning is None else _REASONING_MARKS[self.reasoning]

    @property
    def tool_marks(self) -> tuple[str, ...]:
        """The marks of calls."""
        return () if self.tools is None else _TOOL_MARKS[self.tools]


def detect(template: str | None, tool_parser: str = AUTO, reasoning_parser: str = AUTO) -> Dialect:
    """The dialect that the source of a chat template shows, or that the settings name. Raises `ModelInvalid`."""
    source = template or ""
    for name, value, accepted in (
        ("tool_parser", tool_parser, TOOL_PARSERS),
        ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
    ):
        if value not in accepted:
            raise ModelInvalid(f"{name} is {value!r}, accepted: {', '.join(accepted)}")
    tools = _detect_tools(source) if tool_parser == AUTO else None
    if tool_parser not in (AUTO, NONE):
        tools = ToolDialect(tool_parser)
    reasoning = _detect_reasoning(source) if reasoning_parser == AUTO else None
    if reasoning_parser not in (AUTO, NONE):
        reasoning = ReasoningDialect(reasoning_parser)
    return Dialect(tools, reasoning, named=MISTRAL_ARGS in source)


def _detect_tools(source: str) -> ToolDialect | None:
    if HERMES_OPEN in source:
        return None if any(mark in source for mark in _NOT_HERMES) else ToolDialect.HERMES
    if MISTRAL_CALLS in source:
        return ToolDialect.MISTRAL
    if "tools" in source and '"parameters": ' in source and "<|start_header_id|>" in source:
        return ToolDialect.LLAMA
    return None


def _detect_reasoning(source: str) -> ReasoningDialect | None:
    for dialect, (opening, closing) in _REASONING_MARKS.items():
        if opening in source and closing in source:
            return dialect
    return None


def opening(dialect: Dialect, vocabulary: Vocabulary, prompt_tail: Sequence[int]) -> Opening:
    """Whether the prompt ends within reasoning (after its opening mark and white space) or after an empty one."""
    marks = dialect.reasoning_marks
    if marks is None:
        return Opening.UNSAID
    data = b"".join(vocabulary.token_bytes(token_id) for token_id in prompt_tail[-PROMPT_TAIL_TOKENS:])
    text = data.decode(errors="replace").rstrip()
    if text.endswith(marks[1]):
        return Opening.CLOSED
    return Opening.OPENED if text.endswith(marks[0]) else Opening.UNSAID
