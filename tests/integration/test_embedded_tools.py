"""The embedded model of its own accord: it calls the tool that is described to it, and its answer uses the result.

Runs with the second edition of the embedded model, which is trained for it; the first has another chat template.
"""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from tests.support.server import Served, serve

from isthmus.config import Settings
from isthmus.execution.prompting.folder import read_text_files

pytestmark = pytest.mark.skipif(
    "enable_thinking" not in (read_text_files(Settings().model_folder).template or ""),
    reason="the embedded model is of the first edition, which was not trained to call tools",
)


def tool(name: str, about: str, **properties: dict[str, object]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS = [
    tool("get_weather", "Get the weather in a city", city={"type": "string"}),
    tool("add", "Add two numbers", a={"type": "integer"}, b={"type": "integer"}),
]
# What is asked, the call that it means, what the tool says, and what the answer must then say.
ASKED = [
    ("What is the weather in Rome?", "get_weather", {"city": "Rome"}, {"temperature": 17}, "17"),
    ("What is the weather in Oslo?", "get_weather", {"city": "Oslo"}, {"condition": "snow"}, "snow"),
    ("What is the weather in Lima?", "get_weather", {"city": "Lima"}, {"temperature": 24}, "24"),
    ("What is 14 plus 27?", "add", {"a": 14, "b": 27}, {"sum": 41}, "41"),
    ("Add 8 and 35.", "add", {"a": 8, "b": 35}, {"sum": 43}, "43"),
    ("What is 61 + 12?", "add", {"a": 61, "b": 12}, {"sum": 73}, "73"),
]
ALLOWED_FAILURES = 1


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("serve")) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=100) as made:
        yield made


def complete(client: openai.OpenAI, messages: list[Any], *, stream: bool, **fields: Any) -> Any:
    """The message of the answer to `messages`."""
    given = {"model": "isthmus", "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 64, **fields}
    if not stream:
        return client.chat.completions.create(**given).choices[0].message
    state = ChatCompletionStreamState()
    for chunk in client.chat.completions.create(**given, stream=True):
        state.handle_chunk(chunk)
    return state.get_final_completion().choices[0].message


def problem(client: openai.OpenAI, case: tuple[str, str, dict[str, object], dict[str, object], str], **how: Any) -> str:
    """What is wrong with how the model goes about one request; empty when nothing is."""
    question, name, arguments, result, said = case
    messages: list[Any] = [{"role": "user", "content": question}]
    message = complete(client, messages, **how)
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    if calls != [(name, arguments)]:
        return f"{question}: called {calls}, said {message.content!r}"
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": json.dumps(result)},
    ]
    answer = complete(client, messages, **how)
    return "" if said in (answer.content or "") else f"{question}: answered {answer.content!r} to {result}"


@pytest.mark.parametrize(
    "how",
    [
        {"stream": False},
        {"stream": True},
        {"stream": False, "reasoning_effort": "low"},
    ],
    ids=["whole", "streamed", "thinking"],
)
def test_the_tool_is_called_and_its_result_used(client: openai.OpenAI, how: dict[str, Any]) -> None:
    problems = [found for case in ASKED if (found := problem(client, case, **how))]
    assert len(problems) <= ALLOWED_FAILURES, problems


def test_thinking_comes_before_the_call_and_apart_from_it(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": ASKED[0][0]}]
    message = complete(client, messages, stream=True, reasoning_effort="low")
    assert message.model_extra["reasoning_content"]
    assert not message.content
    assert message.tool_calls


def test_no_tool_is_called_where_none_is_meant(client: openai.OpenAI) -> None:
    message = complete(client, [{"role": "user", "content": "Hello!"}], stream=False)
    assert message.tool_calls is None
    assert message.content


def test_a_tool_that_is_not_to_be_called_is_not(client: openai.OpenAI) -> None:
    message = complete(client, [{"role": "user", "content": ASKED[0][0]}], stream=False, tool_choice="none")
    assert message.tool_calls is None
