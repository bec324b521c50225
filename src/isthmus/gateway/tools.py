"""OpenAI's side of a conversation with tools: its messages, tools and switches in our terms. Pure."""

from collections.abc import Sequence

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.prompting import ChatMessage, ChatOptions, ToolCall
from isthmus.gateway.output_form import tool_choice, tool_definitions
from isthmus.gateway.schema_requests import ChatRequest, Message
from isthmus.gateway.schema_tools import Effort, TemplateOptions

_NO_THINKING = frozenset({"none", "minimal"})


def chat_messages(messages: Sequence[Message]) -> list[ChatMessage]:
    """The messages of a body as the prompting plane takes them. Raises `InvalidInput` naming the message."""
    return [_chat_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _chat_message(message: Message, place: str) -> ChatMessage:
    reasoning = message.reasoning_content or message.reasoning or None
    if message.role != "assistant":
        if message.tool_calls:
            raise InvalidInput("only a message of an assistant has tool calls", f"{place}.tool_calls")
        if reasoning is not None:
            field = "reasoning_content" if message.reasoning_content else "reasoning"
            raise InvalidInput("only a message of an assistant has reasoning", f"{place}.{field}")
    if message.tool_call_id is not None and message.role != "tool":
        raise InvalidInput("only a message of a tool answers a call", f"{place}.tool_call_id")
    calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ())
    return ChatMessage(message.role, message.text(), message.name, calls, message.tool_call_id, reasoning)


def chat_options(body: ChatRequest) -> ChatOptions:
    """The tools offered, how they are chosen, and whether the model thinks first. Raises `InvalidInput`."""
    return ChatOptions(
        tools=tool_definitions(body.tools),
        choice=tool_choice(body.tool_choice, body.parallel_tool_calls),
        thinking=thinking(body.chat_template_kwargs, body.reasoning_effort),
    )


def thinking(said: TemplateOptions | None, effort: Effort | None = None) -> bool | None:
    """Whether the model is asked to think first; None leaves it to the template. Raises `InvalidInput`.

    An effort of `none` or `minimal` means no; every other one yes. What is said to the template goes before it.
    """
    if said is not None:
        one, other = said.enable_thinking, said.thinking
        if one is not None and other is not None and one != other:
            raise InvalidInput("enable_thinking and thinking disagree", "chat_template_kwargs.thinking")
        if one is not None or other is not None:
            return bool(one) or bool(other)
    return None if effort is None else effort not in _NO_THINKING
