"""Anthropic's client against the embedded model: tools, streamed tools, thinking and a form, from end to end.

What the model does of its own accord depends on its weights, as in `test_embedded_tools.py`; demanded forms do not.
"""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import pytest
from anthropic.types import Message
from tests.support.server import Served, serve
from tests.support.tool_cases import ALLOWED_FAILURES, ASKED, OFFERED, Case

TOOLS = [{"name": name, "description": about, "input_schema": schema} for name, about, schema in OFFERED]
THINKING = {"type": "enabled", "budget_tokens": 1024}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("serve")) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=100) as made:
        yield made


def ask(client: anthropic.Anthropic, messages: list[Any], *, stream: bool = False, **fields: Any) -> Message:
    """The answer to `messages`, greedy; a streamed one as the client put it together."""
    given: dict[str, Any] = {"model": "isthmus", "messages": messages, "max_tokens": 96, **fields}
    given["extra_body"] = {"temperature": 0}
    if not stream:
        return client.messages.create(**given)  # type: ignore[no-any-return]
    with client.messages.stream(**given) as events:
        for _ in events:
            pass
        return events.get_final_message()


def problem(client: anthropic.Anthropic, case: Case, **how: Any) -> str:
    """What is wrong with how the model goes about one request; empty when nothing is."""
    messages: list[Any] = [{"role": "user", "content": case.question}]
    asked = ask(client, messages, tools=TOOLS, **how)
    uses = [block for block in asked.content if block.type == "tool_use"]
    if [(use.name, use.input) for use in uses] != [(case.name, case.arguments)] or asked.stop_reason != "tool_use":
        return f"{case.question}: {asked.content}"
    result = {"type": "tool_result", "tool_use_id": uses[0].id, "content": json.dumps(case.result)}
    messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    answer = ask(client, messages, tools=TOOLS, **how)
    said = "".join(block.text for block in answer.content if block.type == "text")
    reused = answer.usage.cache_read_input_tokens or 0
    if case.said not in said or answer.stop_reason != "end_turn":
        return f"{case.question}: answered {answer.content}"
    return "" if reused else f"{case.question}: the second turn reused nothing"


@pytest.mark.parametrize("how", [{}, {"stream": True}, {"thinking": THINKING}], ids=["whole", "streamed", "thinking"])
def test_the_tool_is_called_and_its_result_used(client: anthropic.Anthropic, how: dict[str, Any]) -> None:
    problems = [found for case in ASKED if (found := problem(client, case, **how))]
    assert len(problems) <= ALLOWED_FAILURES, problems


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_thinking_is_a_block_before_the_call(client: anthropic.Anthropic, stream: bool) -> None:
    messages = [{"role": "user", "content": ASKED[0].question}]
    asked = ask(client, messages, stream=stream, tools=TOOLS, thinking=THINKING)
    assert [block.type for block in asked.content] == ["thinking", "tool_use"]
    assert asked.content[0].type == "thinking"
    assert asked.content[0].thinking


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_demanded_call_keeps_its_schema(client: anthropic.Anthropic, stream: bool) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    tool = {"name": "register", "description": "Register a person", "input_schema": PERSON}
    asked = ask(client, messages, stream=stream, tools=[*TOOLS, tool], tool_choice={"type": "tool", "name": "register"})
    (use,) = asked.content
    assert use.type == "tool_use"
    assert use.name == "register"
    jsonschema.validate(use.input, PERSON)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_keeps_its_form(client: anthropic.Anthropic, stream: bool) -> None:
    form = {"format": {"type": "json_schema", "schema": PERSON}}
    messages = [{"role": "user", "content": "Who are you, and how old?"}]
    answer = ask(client, messages, stream=stream, output_config=form)
    (block,) = answer.content
    assert block.type == "text"
    jsonschema.validate(json.loads(block.text), PERSON)


def test_tokens_are_counted_as_they_are_used(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": ASKED[0].question}]
    counted = client.messages.count_tokens(model="isthmus", messages=messages, tools=TOOLS)  # type: ignore[arg-type]
    usage = ask(client, messages, tools=TOOLS).usage
    used = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert counted.input_tokens == used
