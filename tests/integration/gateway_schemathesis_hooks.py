"""What JSON Schema cannot say about the gateway's bodies, for schemathesis."""

from typing import Any

import schemathesis
from schemathesis.core.parameters import ParameterLocation

DEFAULT_MAX_TOKENS = 4096


def fractions(value: Any) -> bool:
    """Whether a whole number is written as a fraction (28.0), which the gateway does not take for an integer."""
    if isinstance(value, dict):
        return any(fractions(item) for item in value.values())
    if isinstance(value, list):
        return any(fractions(item) for item in value)
    return isinstance(value, float) and value.is_integer()


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    body = case.body
    if not isinstance(body, dict):
        return True
    least, most = body.get("min_tokens"), body.get("max_completion_tokens") or body.get("max_tokens")
    numbers = isinstance(least, int) and isinstance(most or DEFAULT_MAX_TOKENS, int)
    return not fractions(body) and not (numbers and least > (most or DEFAULT_MAX_TOKENS))


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Reach further: valid deadlines are too long to be met (a 504 that was asked for), most models are served."""
    headers, body = case.headers or {}, case.body
    timeout = str(headers.get("x-request-timeout-ms", ""))
    if timeout.isdigit() and 1 <= int(timeout) < 60_000:
        headers["x-request-timeout-ms"] = "60000"
    model = body.get("model") if isinstance(body, dict) else None
    if isinstance(model, str) and 1 <= len(model) <= 256 and len(model) % 4:
        body["model"] = "fake/bytes"
    if isinstance(body, dict) and case.meta.components[ParameterLocation.BODY].mode.is_positive:
        if case.path.startswith("/v1/messages"):
            anthropic_agrees(body)
        else:
            one_form(body)
            tools_agree(body)
            roles_agree(body)
    return case


def one_form(body: dict[str, Any]) -> None:
    """Leave one demand for a form of the output, and schemas in text that are schemas."""
    demands: list[tuple[dict[str, Any], str]] = []
    if (body.get("response_format") or {}).get("type", "text") != "text":
        demands.append((body, "response_format"))
    forms = body.get("structured_outputs") or {}
    demands += [(forms, name) for name, value in forms.items() if value not in (None, False)]
    guided = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    demands += [(body, name) for name in guided if body.get(name) is not None]
    for place, name in demands[1:]:
        del place[name]
    for place, name in demands[:1]:
        if name in ("json", "guided_json") and isinstance(place[name], str):
            place[name] = '{"type": "object"}'


def tools_agree(body: dict[str, Any]) -> None:
    """Give tools different names, choose one that is offered, make the switches of the template agree."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    for index, tool in enumerate(tools):
        tool["function"]["name"] = f"tool_{index}"
    if isinstance(choice, dict) and tools:
        choice["function"]["name"] = "tool_0"
    elif choice == "required" or isinstance(choice, dict):
        body["tool_choice"] = "auto" if tools else None
    switches = body.get("chat_template_kwargs")
    if switches:
        body["chat_template_kwargs"] = dict.fromkeys(switches, True)


def roles_agree(body: dict[str, Any]) -> None:
    """Leave calls and reasoning to assistants, the ids of calls that are answered to tools."""
    for message in body.get("messages") or []:
        theirs = {"assistant": {"tool_calls", "reasoning_content", "reasoning"}, "tool": {"tool_call_id"}}
        for name in set().union(*theirs.values()) - theirs.get(message["role"], set()):
            message.pop(name, None)


def anthropic_agrees(body: dict[str, Any]) -> None:
    """Blocks in the messages of those who may say them, a user's message last, and tools as in `tools_agree`."""
    for message in body["messages"]:
        content = message["content"]
        if isinstance(content, list):
            said = {"assistant": ("text", "thinking", "redacted_thinking", "tool_use")}.get(message["role"], ("text",))
            content[:] = [block for block in content if block["type"] in said] or [{"type": "text", "text": "hi"}]
    body["messages"][-1] = {"role": "user", "content": "hi"}
    tools, choice = body.get("tools") or [], body.get("tool_choice") or {}
    for index, tool in enumerate(tools):
        tool["name"] = f"tool_{index}"
    if choice.get("type") == "tool":
        choice["name"] = "tool_0"
    if choice.get("type") in ("tool", "any") and not tools:
        body["tool_choice"] = None
