"""What requests with tools and demanded forms become, field by field, and which of them are refused and how."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from tests.integration.gateway_fakes import BytePrompting, FakeEngine, Site, model_info, post, raw, serving
from tests.integration.test_gateway_bad_input import CHAT, chat, error_of, status_of

from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import InvalidInput, TooLarge, Unsupported
from isthmus.contracts.events import ErrorInfo, Finish, RequestOutput
from isthmus.contracts.prompting import (
    ChatMessage,
    ChatOptions,
    OutputParse,
    ToolCall,
    ToolChoice,
    ToolDefinition,
    ToolMode,
)
from isthmus.contracts.sampling import SamplingDefaults

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
SCHEMA_TEXT = '{"type":"object","properties":{"city":{"type":"string"}}}'
CITY = {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time", "strict": True}}
NAMED = {"type": "function", "function": {"name": "time"}}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
WEATHER = ToolDefinition("weather", "Tells.", SCHEMA_TEXT)
CLOCK = ToolDefinition("time", strict=True)


def run(check: Callable[[Site], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with serving(**options) as site:
            await check(site)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def ask(site: Site, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await raw(site, post(path, json.dumps(body).encode()))
    assert status_of(answer) == 200, answer
    return json.loads(answer.partition(b"\r\n\r\n")[2])


OPTIONS = [
    ({}, ChatOptions()),
    ({"tools": None, "tool_choice": None, "parallel_tool_calls": None, "reasoning_effort": None}, ChatOptions()),
    ({"tools": []}, ChatOptions()),
    ({"tool_choice": "auto"}, ChatOptions()),
    ({"tool_choice": "none"}, ChatOptions(choice=ToolChoice(ToolMode.NONE))),
    ({"tools": [CITY, TIME]}, ChatOptions((WEATHER, CLOCK))),
    ({"tools": [CITY], "tool_choice": "none"}, ChatOptions((WEATHER,), ToolChoice(ToolMode.NONE))),
    ({"tools": [CITY], "tool_choice": "required"}, ChatOptions((WEATHER,), ToolChoice(ToolMode.REQUIRED))),
    ({"tools": [CITY, TIME], "tool_choice": NAMED}, ChatOptions((WEATHER, CLOCK), ToolChoice(ToolMode.NAMED, "time"))),
    ({"tools": [CITY], "parallel_tool_calls": False}, ChatOptions((WEATHER,), ToolChoice(parallel=False))),
    ({"tools": [CITY], "parallel_tool_calls": True}, ChatOptions((WEATHER,))),
    ({"reasoning_effort": "none"}, ChatOptions(thinking=False)),
    ({"reasoning_effort": "minimal"}, ChatOptions(thinking=False)),
    ({"reasoning_effort": "low"}, ChatOptions(thinking=True)),
    ({"reasoning_effort": "xhigh"}, ChatOptions(thinking=True)),
    ({"chat_template_kwargs": {}}, ChatOptions()),
    ({"chat_template_kwargs": {"enable_thinking": False}}, ChatOptions(thinking=False)),
    ({"chat_template_kwargs": {"thinking": True}}, ChatOptions(thinking=True)),
    ({"chat_template_kwargs": {"thinking": True, "enable_thinking": True}}, ChatOptions(thinking=True)),
    # What is said to the template itself goes before the effort.
    ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, ChatOptions(thinking=False)),
]


def test_tools_and_switches_become_chat_options() -> None:
    async def check(site: Site) -> None:
        for fields, expected in OPTIONS:
            await ask(site, CHAT, {"messages": [USER], **fields})
            messages, options = site.prompting.chats[-1]
            assert (messages, options) == ([ChatMessage("user", "hi")], expected), fields
            called = expected.choice.mode is not ToolMode.NONE and bool(expected.tools)
            tail = tuple(site.engine.submitted[-1].prompt_ids[-32:])
            names = tuple(tool.name for tool in expected.tools) if called else ()
            assert site.prompting.parses[-1] == OutputParse(called, True, tail, names), fields
            assert site.prompting.constraints[-1] == (expected, None, tail)

    run(check)


def test_conversations_with_calls_reach_the_template() -> None:
    async def check(site: Site) -> None:
        messages = [
            {"role": "developer", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm.", "refusal": None,
             "annotations": None, "audio": None, "function_call": None},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "17"}]},
            {"role": "assistant", "content": "17.", "reasoning": "So.", "tool_calls": None},
        ]  # fmt: skip
        await ask(site, CHAT, {"messages": messages, "tools": [CITY]})
        asked, _ = site.prompting.chats[-1]
        assert asked == [
            ChatMessage("developer", "Be brief."),
            ChatMessage("user", "hi"),
            ChatMessage(
                "assistant", "", tool_calls=(ToolCall("call_1", "weather", '{"city": "Rome"}'),), reasoning="Hm."
            ),
            ChatMessage("tool", "17", tool_call_id="call_1"),
            ChatMessage("assistant", "17.", reasoning="So."),
        ]
        counted = await ask(site, "/tokenize", {"messages": messages, "tools": [CITY]})
        again, options = site.prompting.chats[-1]
        assert (again, options) == (asked, ChatOptions((WEATHER,)))
        assert counted["tokens"] == site.engine.submitted[-1].prompt_ids

    run(check)


def json_schema(**fields: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", **fields}}}


SCHEMA_FORM = Constraint(ConstraintKind.JSON_SCHEMA, SCHEMA_TEXT)
OBJECT_FORM = Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')
REGEX_FORM = Constraint(ConstraintKind.REGEX, "a+")
CHOICE_FORM = Constraint(ConstraintKind.CHOICE, '["yes", "no"]')
GRAMMAR_FORM = Constraint(ConstraintKind.GRAMMAR, 'start: "a"')
FORMS = [
    ({}, None),
    ({"response_format": None, "guided_json": None, "structured_outputs": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, OBJECT_FORM),
    (json_schema(schema=SCHEMA), SCHEMA_FORM),
    (json_schema(schema=SCHEMA, strict=True, description="x"), SCHEMA_FORM),
    (json_schema(schema=SCHEMA, strict=False), SCHEMA_FORM),
    (json_schema(), OBJECT_FORM),
    (json_schema(schema={}), Constraint(ConstraintKind.JSON_SCHEMA, "{}")),
    ({"guided_json": SCHEMA}, SCHEMA_FORM),
    ({"guided_json": json.dumps(SCHEMA, indent=1)}, SCHEMA_FORM),
    ({"guided_regex": "a+"}, REGEX_FORM),
    ({"guided_choice": ["yes", "no"]}, CHOICE_FORM),
    ({"guided_grammar": 'start: "a"'}, GRAMMAR_FORM),
    ({"structured_outputs": {}}, None),
    ({"structured_outputs": {"json": SCHEMA}}, SCHEMA_FORM),
    ({"structured_outputs": {"json": SCHEMA_TEXT, "json_object": False}}, SCHEMA_FORM),
    ({"structured_outputs": {"json_object": True}}, OBJECT_FORM),
    ({"structured_outputs": {"regex": "a+"}}, REGEX_FORM),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, CHOICE_FORM),
    ({"structured_outputs": {"grammar": 'start: "a"'}, "response_format": {"type": "text"}}, GRAMMAR_FORM),
]


def test_every_way_of_demanding_a_form_reaches_the_engine_from_both_routes() -> None:
    async def check(site: Site) -> None:
        for fields, expected in FORMS:
            await ask(site, CHAT, {"messages": [USER], **fields})
            assert site.engine.submitted[-1].constraint == expected, fields
            assert site.prompting.constraints[-1][1] == expected
            await ask(site, "/v1/completions", {"prompt": ["a", "b"], "n": 2, **fields})
            assert [request.constraint for request in site.engine.submitted[-4:]] == [expected] * 4, fields
            assert site.prompting.parses[-1] is None
        await ask(site, CHAT, {"messages": [USER], "tools": [CITY, TIME], "tool_choice": NAMED, "n": 2})
        demanded = Constraint(ConstraintKind.GRAMMAR, "call time")
        assert [request.constraint for request in site.engine.submitted[-2:]] == [demanded] * 2

    run(check)


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def tool(**fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", **fields}}


def says(**fields: object) -> dict[str, object]:
    return {"messages": [USER, fields]}


DISAGREE = {"thinking": True, "enable_thinking": False}
LONG = {"description": "x" * 65536}
BAD = [
    ({"tools": [{"type": "function"}]}, "missing_field", "tools[0].function"),
    ({"tools": [{"function": {"name": "f"}}]}, "missing_field", "tools[0].type"),
    ({"tools": [{"type": "web_search"}]}, "unsupported", "tools[0].type"),
    ({"tools": [tool(name="a b")]}, "invalid_input", "tools[0].function.name"),
    ({"tools": [tool(name="")]}, "invalid_input", "tools[0].function.name"),
    ({"tools": [tool(name="x" * 129)]}, "invalid_input", "tools[0].function.name"),
    ({"tools": [tool(parameters=[])]}, "invalid_input", "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"type": "array"})]}, "invalid_input", "tools[0].function.parameters"),
    ({"tools": [tool(parameters="{}")]}, "invalid_input", "tools[0].function.parameters"),
    ({"tools": [CITY, tool(parameters=nested(33))]}, "too_large", "tools[1].function.parameters"),
    ({"tools": [tool(parameters=LONG)]}, "too_large", "tools[0].function.parameters"),
    ({"tools": [tool(extra=1)]}, "unknown_field", "tools[0].function.extra"),
    ({"tools": [CITY, CITY]}, "invalid_input", "tools"),
    ({"tools": [CITY] * 129}, "invalid_input", "tools"),
    ({"tools": {}}, "invalid_input", "tools"),
    ({"tool_choice": "required"}, "invalid_input", "tool_choice"),
    ({"tool_choice": NAMED}, "invalid_input", "tool_choice"),
    ({"tools": [CITY], "tool_choice": NAMED}, "invalid_input", "tool_choice"),
    ({"tools": [CITY], "tool_choice": "sometimes"}, "invalid_input", "tool_choice"),
    ({"tools": [CITY], "tool_choice": {"type": "allowed_tools"}}, "unsupported", "tool_choice.type"),
    ({"parallel_tool_calls": 1}, "invalid_input", "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "unsupported", "functions"),
    ({"function_call": {"name": "f"}}, "unsupported", "function_call"),
    ({"reasoning_effort": "much"}, "invalid_input", "reasoning_effort"),
    ({"chat_template_kwargs": {"x": 1}}, "unknown_field", "chat_template_kwargs.x"),
    ({"chat_template_kwargs": DISAGREE}, "invalid_input", "chat_template_kwargs.thinking"),
    ({"response_format": {"type": "xml"}}, "unsupported", "response_format.type"),
    ({"response_format": {}}, "missing_field", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "missing_field", "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "unknown_field", "response_format.schema"),
    (json_schema(schema=nested(33)), "too_large", "response_format"),
    (json_schema(schema=LONG), "too_large", "response_format"),
    (json_schema(name="a b"), "invalid_input", "response_format.json_schema.name"),
    (json_schema(schema=3), "invalid_input", "response_format.json_schema.schema"),
    ({"guided_json": "{"}, "invalid_input", "guided_json"),
    ({"guided_json": "[]"}, "invalid_input", "guided_json"),
    ({"guided_json": '{"a": "\\ud800"}'}, "invalid_input", "guided_json"),
    ({"guided_json": '{"a":' * 5000 + "1" + "}" * 5000}, "invalid_input", "guided_json"),
    ({"guided_regex": ""}, "invalid_input", "guided_regex"),
    ({"guided_regex": "a" * 262_145}, "too_large", "guided_regex"),
    ({"guided_choice": []}, "invalid_input", "guided_choice"),
    ({"guided_choice": [""]}, "invalid_input", "guided_choice[0]"),
    ({"guided_choice": ["a"] * 1025}, "invalid_input", "guided_choice"),
    ({"structured_outputs": {"backend": "x"}}, "unknown_field", "structured_outputs.backend"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "invalid_input", "structured_outputs.regex"),
    ({"structured_outputs": {"json": nested(33)}}, "too_large", "structured_outputs.json"),
    ({"guided_json": {}, "response_format": {"type": "json_object"}}, "invalid_input", "guided_json"),
    ({"guided_json": {}, "structured_outputs": {"regex": "a"}}, "invalid_input", "guided_json"),
    (says(role="assistant", tool_calls=[{"id": "x"}]), "missing_field", "messages[1].tool_calls[0].type"),
    (says(role="assistant", tool_calls=[{**CALL, "id": ""}]), "invalid_input", "messages[1].tool_calls[0].id"),
    (says(role="assistant", tool_calls=[CALL] * 129), "invalid_input", "messages[1].tool_calls"),
    (says(role="user", tool_calls=[CALL]), "invalid_input", "messages[1].tool_calls"),
    (says(role="user", reasoning="x"), "invalid_input", "messages[1].reasoning"),
    (says(role="tool", reasoning_content="x"), "invalid_input", "messages[1].reasoning_content"),
    (says(role="user", tool_call_id="x"), "invalid_input", "messages[1].tool_call_id"),
    (says(role="tool", tool_call_id=""), "invalid_input", "messages[1].tool_call_id"),
]  # fmt: skip


def test_what_cannot_be_meant_is_refused_with_the_field_named() -> None:
    async def check(site: Site) -> None:
        wrong = []
        for fields, code, param in BAD:
            answer = await raw(site, post(CHAT, chat(**fields)))
            error = error_of(answer)
            if (status_of(answer), error["code"], error["param"]) != (400, code, param):
                wrong.append((str(fields)[:80], error))
            assert 10 < len(error["message"]) < 200, error
        assert wrong == []
        assert site.engine.submitted == []
        assert site.prompting.chats == []

    run(check)


def test_a_deprecated_field_says_what_to_send_instead() -> None:
    async def check(site: Site) -> None:
        error = error_of(await raw(site, post(CHAT, chat(functions=[{"name": "f"}]))))
        assert "send tools" in error["message"]
        assert status_of(await raw(site, post(CHAT, chat(functions=[], function_call="auto")))) == 200

    run(check)


def test_limits_on_nesting_are_met_exactly() -> None:
    async def check(site: Site) -> None:
        await ask(site, CHAT, {"messages": [USER], **json_schema(schema=nested(32))})
        await ask(site, CHAT, {"messages": [USER], "tools": [tool(parameters=nested(32))]})

    run(check)


REFUSED_FIELDS = [
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": SCHEMA}, "guided_json"),
    ({"structured_outputs": {"regex": "a"}, "tools": [CITY]}, "structured_outputs.regex"),
    ({"tools": [TIME]}, "tools[0].function.parameters"),
    ({"tools": [CITY, TIME], "tool_choice": NAMED}, "tools[1].function.parameters"),
    ({"tools": [CITY, TIME], "tool_choice": "required"}, "tools"),
]


def test_a_constraint_that_is_refused_goes_by_the_name_its_client_gave_it() -> None:
    async def check(site: Site) -> None:
        for fields, param in REFUSED_FIELDS:
            for failure, code in (
                (InvalidInput("the schema is unsatisfiable", "constraint"), "invalid_input"),
                (Unsupported("the keyword not is not supported", "constraint"), "unsupported"),
                (TooLarge("over the limit of 9 rules", "constraint"), "too_large"),
            ):
                site.prompting.refusal = None
                info = ErrorInfo(failure.code, str(failure), failure.field)
                # An engine may say so in an output, or raise it from its port.
                for said in (
                    lambda request, info=info: RequestOutput(request.request_id, finish=Finish.REJECTED, error=info),
                    lambda _, failure=failure: failure,
                ):
                    site.engine.failure = said
                    for stream in (False, True):
                        answer = await raw(site, post(CHAT, chat(**fields, stream=stream)))
                        error = error_of(answer)
                        assert (status_of(answer), error["code"], error["param"]) == (400, code, param)
                        assert error["message"] == str(failure)
                site.prompting.refusal = failure
                error = error_of(await raw(site, post(CHAT, chat(**fields))))
                assert (error["code"], error["param"]) == (code, param)
        site.prompting.refusal = Unsupported("the model has no known way of writing tool calls", "tool_choice")
        error = error_of(await raw(site, post(CHAT, chat(tools=[CITY], tool_choice="required"))))
        assert (error["code"], error["param"]) == ("unsupported", "tool_choice")

    run(check)


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_the_models_own_sampling_holds_where_a_request_says_nothing(route: str) -> None:
    own = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.05)
    path, body = (CHAT, {"messages": [USER]}) if route == "chat" else ("/v1/completions", {"prompt": "a"})

    async def check(site: Site) -> None:
        await ask(site, path, body)
        sampling = site.engine.submitted[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.95)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.05)
        said = {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        await ask(site, path, {**body, **said})
        sampling = site.engine.submitted[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0, 0, 1)
        assert (sampling.min_p, sampling.repetition_penalty) == (0, 1)

    run(check, engine=FakeEngine(model_info()), prompting=BytePrompting(), defaults=own)
