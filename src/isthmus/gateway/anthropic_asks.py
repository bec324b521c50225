"""Anthropic's side of a conversation: its bodies in the gateway's terms. Pure.

A message of theirs may hold what is several of ours: results of tools and text of the user. Blocks keep their order.
"""

import json
from collections.abc import Iterator, Sequence

from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.prompting import ChatMessage, ChatOptions, ToolCall, ToolChoice, ToolMode
from isthmus.gateway.anthropic_schema import (
    Block,
    ChoiceAny,
    ChoiceAuto,
    ChoiceNone,
    ChoiceTool,
    CountRequest,
    MessageIn,
    MessagesRequest,
    PlainText,
    TextBlock,
    ThinkingBlock,
    ThinkingDisabled,
    ToolResultBlock,
    ToolUseBlock,
)
from isthmus.gateway.conversation import Ask
from isthmus.gateway.output_form import schema_text, tool_definition
from isthmus.gateway.plan import Limits
from isthmus.gateway.schema_requests import SamplingFields

FORMAT_FIELD = "output_config.format"


def ask_of(body: MessagesRequest) -> Ask:
    """What `body` asks for. Raises `InvalidInput` naming the field."""
    sampling = SamplingFields(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=list(body.stop_sequences) if body.stop_sequences else None,
        seed=body.seed,
    )
    response = _response(body)
    return Ask(
        messages=chat_messages(body),
        sampling=sampling,
        limits=Limits(body.max_tokens, "max_tokens", cut_to_context=True),
        options=chat_options(body),
        response=response,
        response_field=FORMAT_FIELD if response else "",
        tool_fields=tuple(f"tools[{index}].input_schema" for index in range(len(body.tools or ()))),
    )


def _response(body: CountRequest) -> Constraint | None:
    if body.output_config is None or body.output_config.format is None:
        return None
    return Constraint(ConstraintKind.JSON_SCHEMA, schema_text(body.output_config.format.schema, FORMAT_FIELD))


def chat_options(body: CountRequest) -> ChatOptions:
    """The tools offered, how they are chosen, and whether the model thinks first. Raises `InvalidInput`."""
    tools = tuple(
        tool_definition(
            tool.name, tool.description, tool.input_schema, f"tools[{index}].input_schema", strict=bool(tool.strict)
        )
        for index, tool in enumerate(body.tools or ())
    )
    return ChatOptions(tools=tools, choice=_choice(body), thinking=_thinking(body))


def _choice(body: CountRequest) -> ToolChoice:
    choice = body.tool_choice
    match choice:
        case None:
            return ToolChoice()
        case ChoiceNone():
            return ToolChoice(ToolMode.NONE)
        case ChoiceAuto():
            mode, name = ToolMode.AUTO, None
        case ChoiceAny():
            mode, name = ToolMode.REQUIRED, None
        case ChoiceTool():
            mode, name = ToolMode.NAMED, choice.name
    return ToolChoice(mode, name, parallel=not choice.disable_parallel_tool_use)


def _thinking(body: CountRequest) -> bool | None:
    if body.thinking is None:
        effort = body.output_config.effort if body.output_config is not None else None
        return None if effort is None else True
    return not isinstance(body.thinking, ThinkingDisabled)


def hides_thinking(body: CountRequest) -> bool:
    """Whether the client wants to be told that the model thought, but not what."""
    thinking = body.thinking
    return not isinstance(thinking, ThinkingDisabled | None) and thinking.display == "omitted"


def marks_cache(body: CountRequest) -> bool:
    """Whether anything in the body is marked to be kept."""
    held: list[PlainText | Block] = [block for message in body.messages for block in _blocks(message)]
    held += body.system if isinstance(body.system, list) else []
    marked = any(getattr(block, "cache_control", None) is not None for block in held)
    return marked or body.cache_control is not None or any(tool.cache_control for tool in body.tools or ())


def chat_messages(body: CountRequest) -> list[ChatMessage]:
    """The conversation as the prompting plane takes it. Raises `InvalidInput` naming the message."""
    found: list[ChatMessage] = []
    if body.system:
        system = body.system if isinstance(body.system, str) else "\n".join(block.text for block in body.system)
        found.append(ChatMessage("system", system))
    called: dict[str, str] = {}
    for index, message in enumerate(body.messages):
        field = f"messages[{index}]"
        if message.role == "assistant":
            found.append(_assistant(_blocks(message), field))
            called.update({call.id: call.name for call in found[-1].tool_calls})
        else:
            found.extend(_user(_blocks(message), called, field))
    if body.messages[-1].role == "assistant":
        field = f"messages[{len(body.messages) - 1}]"
        raise InvalidInput("a conversation ends with a message of the user; answers are not continued here", field)
    return found


def _blocks(message: MessageIn) -> Sequence[Block]:
    return [TextBlock(message.content)] if isinstance(message.content, str) else message.content


def _assistant(blocks: Sequence[Block], field: str) -> ChatMessage:
    text, thoughts, calls = [], [], []
    for place, block in enumerate(blocks):
        match block:
            case TextBlock():
                text.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                calls.append(ToolCall(block.id, block.name, json.dumps(block.input, ensure_ascii=False)))
            case ToolResultBlock():
                raise InvalidInput("a tool's result is in a message of the user", f"{field}.content[{place}]")
    reasoning = "".join(thoughts) or None
    return ChatMessage("assistant", "".join(text), tool_calls=tuple(calls), reasoning=reasoning)


def _user(blocks: Sequence[Block], called: dict[str, str], field: str) -> Iterator[ChatMessage]:
    text: list[str] = []
    for place, block in enumerate(blocks):
        match block:
            case TextBlock():
                text.append(block.text)
            case ToolResultBlock():
                if text:
                    yield ChatMessage("user", "\n".join(text))
                    text = []
                name = called.get(block.tool_use_id)
                if name is None:
                    where = f"{field}.content[{place}].tool_use_id"
                    raise InvalidInput("no earlier message of the assistant made this call", where)
                yield ChatMessage("tool", _result(block), name=name, tool_call_id=block.tool_use_id)
            case _:
                raise InvalidInput("a message of the user holds text and tool results", f"{field}.content[{place}]")
    if text:
        yield ChatMessage("user", "\n".join(text))


def _result(block: ToolResultBlock) -> str:
    """A result as text. No chat template knows failures, so one is told as a JSON object with an `error`."""
    content = block.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
    return json.dumps({"error": text}, ensure_ascii=False) if block.is_error else text
