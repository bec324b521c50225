"""OpenAI's client against a real `isthmus serve`: tools and forms that are demanded hold whatever the weights say.

The grammar keeps the form, so nothing here depends on how good the embedded model is; what it does of its own accord is
in `test_embedded_tools.py`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel
from tests.support.server import Served, serve

from isthmus.config import Settings

TEMPLATE = Path(__file__).parents[2] / "training" / "embedded" / "chat_template.jinja"
USER = [{"role": "user", "content": "What is the weather in Rome?"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
SWITCH = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
SCHEMAS = {"get_weather": CITY, "set_light": {**SWITCH, "additionalProperties": False}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Do {name}.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded weights with the chat template that they are trained for."""
    folder = tmp_path_factory.mktemp("model") / "embedded"
    shutil.copytree(Settings().model_folder, folder)
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    with serve(tmp_path_factory.mktemp("serve"), "--model", str(folder), "--model-name", "isthmus") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=100) as made:
        yield made


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    """One choice of a chat answer."""
    given = {"model": "isthmus", "messages": USER, "max_tokens": 96, "seed": 1, **fields}
    return client.chat.completions.create(**given).choices[0]


def check_calls(calls: Any) -> list[str]:
    """The names of the calls, whose arguments keep the schemas of their tools."""
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert call.id.startswith("call_")
    return [call.function.name for call in calls]


@pytest.mark.parametrize("temperature", [0, 2])
def test_a_demanded_call_is_made_and_keeps_its_schema(client: openai.OpenAI, temperature: float) -> None:
    shared = {"tools": TOOLS, "temperature": temperature, "parallel_tool_calls": False}
    for name in SCHEMAS:
        named = {"type": "function", "function": {"name": name}}
        choice = ask(client, **shared, tool_choice=named)
        assert choice.finish_reason == "tool_calls"
        assert check_calls(choice.message.tool_calls) == [name]
        assert not choice.message.content
    choice = ask(client, **shared, tool_choice="required")
    assert choice.finish_reason == "tool_calls"
    assert len(check_calls(choice.message.tool_calls)) == 1


def test_a_streamed_call_is_the_whole_one(client: openai.OpenAI) -> None:
    given = {
        "model": "isthmus", "messages": USER, "max_tokens": 96, "temperature": 0, "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**given)
    state, pieces = ChatCompletionStreamState(), 0
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        state.handle_chunk(chunk)
        pieces += sum(len(choice.delta.tool_calls or ()) for choice in chunk.choices)
    streamed = state.get_final_completion()
    (one,), (other,) = whole.choices[0].message.tool_calls, streamed.choices[0].message.tool_calls
    assert (one.function.name, one.function.arguments) == (other.function.name, other.function.arguments)
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason == "tool_calls"
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens
    # The arguments come as they are written, not at the end.
    assert pieces > 3


def test_a_call_and_its_result_go_back_and_reuse_what_was_computed(client: openai.OpenAI) -> None:
    shared = {"tools": TOOLS, "temperature": 0, "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "get_weather"}}
    message = ask(client, **shared, tool_choice=named).message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 17}'}
    given = {"model": "isthmus", "max_tokens": 24, **shared, "tool_choice": "none"}
    answer = client.chat.completions.create(**given, messages=[*USER, message.model_dump(), result])
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason in ("stop", "length")
    auto = client.chat.completions.create(
        **{**given, "tool_choice": "auto"}, messages=[*USER, message.model_dump(), result]
    )
    assert auto.usage.prompt_tokens_details.cached_tokens > 0


class Report(BaseModel):
    """What a structured answer looks like."""

    unit: Literal["celsius", "fahrenheit"]
    rain: bool
    days: Literal[1, 2, 3]


@pytest.mark.parametrize("temperature", [0, 2])
def test_an_answer_keeps_its_schema(client: openai.OpenAI, temperature: float) -> None:
    shared = {
        "model": "isthmus", "messages": USER, "max_tokens": 96, "temperature": temperature, "seed": 2,
        "reasoning_effort": "none",
    }  # fmt: skip
    parsed = client.chat.completions.parse(**shared, response_format=Report)
    assert isinstance(parsed.choices[0].message.parsed, Report)
    assert parsed.choices[0].finish_reason == "stop"
    text = ""
    with client.chat.completions.stream(**shared, response_format=Report) as stream:
        for event in stream:
            if event.type == "content.delta":
                text += event.delta
    assert text == parsed.choices[0].message.content


def test_every_kind_of_form_is_kept_by_chat_and_completions(client: openai.OpenAI) -> None:
    words = ["certainly", "never", "perhaps"]
    for fields, accepted in (
        ({"guided_choice": words}, words),
        ({"structured_outputs": {"choice": words}}, words),
        ({"guided_regex": "[ab]{3}"}, [a + b + c for a in "ab" for b in "ab" for c in "ab"]),
        ({"structured_outputs": {"grammar": 'start: "x" ("y" | "z")'}}, ["xy", "xz"]),
        ({"guided_json": {"enum": [{"a": 1}]}}, [{"a": 1}]),
    ):
        chat = ask(client, max_tokens=32, reasoning_effort="none", extra_body=fields)
        text = client.completions.create(model="isthmus", prompt="Say", max_tokens=32, extra_body=fields).choices[0]
        for answer, finish in ((chat.message.content, chat.finish_reason), (text.text, text.finish_reason)):
            assert finish == "stop", fields
            assert (json.loads(answer) if "guided_json" in fields else answer) in accepted, fields


def test_a_schema_that_cannot_be_kept_is_refused_with_the_reason(client: openai.OpenAI, served: Served) -> None:
    unknown = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {"type": "string"}}}}
    bad_tool = {"type": "function", "function": {"name": "f", "parameters": {"$ref": "https://example.com/a"}}}
    for fields, param in (
        ({"response_format": unknown}, "response_format"),
        ({"response_format": unknown, "stream": True}, "response_format"),
        ({"tools": [bad_tool], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"extra_body": {"guided_regex": "(a"}}, "guided_regex"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: unknown"}}}, "structured_outputs.grammar"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="isthmus", messages=USER, max_tokens=32, **fields)
        assert caught.value.param == param, fields
        assert caught.value.code in {"invalid_input", "unsupported", "too_large"}
        assert len(caught.value.body["message"]) > 10
    # An expression of 729 million states costs what its output does.
    hostile = {"guided_regex": "((a{1,900}){1,900}){1,900}b"}
    answer = client.completions.create(model="isthmus", prompt="Say", max_tokens=8, extra_body=hostile).choices[0]
    assert set(answer.text.removesuffix("b")) == {"a"}
    assert ask(client, max_tokens=4).finish_reason in ("stop", "length")
    assert served.process.poll() is None


def test_thinking_is_set_apart(client: openai.OpenAI) -> None:
    """The prompt opens the reasoning; what an untrained model goes on to write is reasoning until it closes it."""
    for said in ({"reasoning_effort": "low"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}):
        message = ask(client, **said, max_tokens=24, temperature=0).message
        assert message.model_extra["reasoning_content"]
        chunks = client.chat.completions.create(
            model="isthmus", messages=USER, max_tokens=24, temperature=0, stream=True, **said
        )
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        thought = "".join((delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas)
        assert thought == message.model_extra["reasoning_content"]
        assert "".join(delta.content or "" for delta in deltas) == message.content
    plain = ask(client, reasoning_effort="none", max_tokens=8, temperature=0).message
    assert "reasoning_content" not in (plain.model_extra or {})
    assert plain.content
