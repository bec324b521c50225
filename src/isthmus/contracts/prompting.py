"""Values of the prompting plane: conversations and tools in; text, reasoning and tool calls out."""

import enum
import json

import msgspec

from isthmus.contracts.errors import InvalidInput, TooLarge

MAX_MESSAGES = 4096
MAX_TEXT_BYTES = 8 * 1024 * 1024
MAX_TOOLS = 128
MAX_TOOL_NAME_CHARS = 128
MAX_TOOL_CALLS = 128
PROMPT_TAIL_TOKENS = 32
"""How many of the last token ids of a prompt `OutputParse` and `Prompting.constraint` want to see."""
ROLES = ("system", "developer", "user", "assistant", "tool")


class ToolCall(msgspec.Struct, frozen=True):
    """A call that an assistant made. `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation. Raises `InvalidInput` for an unknown role.

    `tool_calls` and `reasoning` are an assistant's; `tool_call_id` is the call that a tool's message answers.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidInput(f"role is not one of {', '.join(ROLES)}", "messages.role")
        if len(self.content) > MAX_TEXT_BYTES:
            raise TooLarge(f"a message has at most {MAX_TEXT_BYTES} characters", "messages.content")
        if self.role != "assistant" and (self.tool_calls or self.reasoning):
            raise InvalidInput("only an assistant has tool calls and reasoning", "messages.tool_calls")
        if len(self.tool_calls) > MAX_TOOL_CALLS:
            raise TooLarge(f"a message has at most {MAX_TOOL_CALLS} tool calls", "messages.tool_calls")


class ToolDefinition(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tool that the model may call. `parameters` is a JSON Schema of an object, as JSON text.

    `strict`: the arguments are held to the schema also when the model calls the tool of its own accord.
    """

    name: str
    description: str = ""
    parameters: str = "{}"
    strict: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_TOOL_NAME_CHARS or not self.name.isprintable():
            raise InvalidInput(f"a tool's name has 1 to {MAX_TOOL_NAME_CHARS} printable characters", "tools.name")
        try:
            schema = json.loads(self.parameters)
        except (ValueError, RecursionError) as error:
            raise InvalidInput("a tool's parameters are a JSON Schema", "tools.parameters") from error
        if not isinstance(schema, dict):
            raise InvalidInput("a tool's parameters are a JSON Schema of an object", "tools.parameters")


class ToolMode(enum.StrEnum):
    """What the model may do with the tools."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


class ToolChoice(msgspec.Struct, frozen=True):
    """How tools are chosen: `name` is the tool of NAMED; `parallel` allows several calls in one answer."""

    mode: ToolMode = ToolMode.AUTO
    name: str | None = None
    parallel: bool = True


class ChatOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a conversation is put into words: the tools offered, and whether the model is asked to think first.

    `thinking` None leaves it to the template. Raises `InvalidInput` for tools with one name or a choice of none.
    """

    tools: tuple[ToolDefinition, ...] = ()
    choice: ToolChoice = ToolChoice()
    thinking: bool | None = None
    add_generation_prompt: bool = True

    def __post_init__(self) -> None:
        names = {tool.name for tool in self.tools}
        if len(self.tools) > MAX_TOOLS:
            raise TooLarge(f"a request has at most {MAX_TOOLS} tools", "tools")
        if len(names) != len(self.tools):
            raise InvalidInput("two tools have the same name", "tools")
        if self.choice.mode is ToolMode.NAMED and self.choice.name not in names:
            raise InvalidInput("tool_choice names a tool that is not offered", "tool_choice")
        if self.choice.mode in (ToolMode.NAMED, ToolMode.REQUIRED) and not self.tools:
            raise InvalidInput("tool_choice demands a call but no tools are offered", "tool_choice")


class OutputParse(msgspec.Struct, frozen=True):
    """What to look for in an output: calls of tools, reasoning. `prompt_tail` is the end of the prompt (its last
    `PROMPT_TAIL_TOKENS` ids): it says whether the template opened the reasoning already. `names` are the tools offered:
    where a call looks like any other JSON (Llama), only JSON that names one of them is a call.
    """

    tools: bool = False
    reasoning: bool = False
    prompt_tail: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


class ToolDelta(msgspec.Struct, frozen=True):
    """A part of the `index`-th tool call of an output: its name comes first and once, then pieces of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


class Piece(msgspec.Struct, frozen=True):
    """What some tokens added: `text` is ready to be sent, `stopped` says that a stop string was met, `stop` which.

    `reasoning` came before the answer, `calls` are parts of tool calls; both only when they were looked for.
    """

    text: str
    stopped: bool = False
    reasoning: str = ""
    calls: tuple[ToolDelta, ...] = ()
    stop: str = ""
