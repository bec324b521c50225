"""The embedded model of its own accord: it calls the tool that is described to it, and its answer uses the result."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from tests.support.server import Served, serve
from tests.support.tool_cases import ALLOWED_FAILURES, ASKED, OFFERED, Case

TOOLS = [
    {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}
    for name, about, schema in OFFERED
]


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


def problem(client: openai.OpenAI, case: Case, **how: Any) -> str:
    """What is wrong with how the model goes about one request; empty when nothing is."""
    messages: list[Any] = [{"role": "user", "content": case.question}]
    message = complete(client, messages, **how)
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    if calls != [(case.name, case.arguments)]:
        return f"{case.question}: called {calls}, said {message.content!r}"
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": json.dumps(case.result)},
    ]
    answer = complete(client, messages, **how)
    return "" if case.said in (answer.content or "") else f"{case.question}: answered {answer.content!r}"


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
    messages = [{"role": "user", "content": ASKED[0].question}]
    message = complete(client, messages, stream=True, reasoning_effort="low")
    assert message.model_extra["reasoning_content"]
    assert not message.content
    assert message.tool_calls


def test_no_tool_is_called_where_none_is_meant(client: openai.OpenAI) -> None:
    message = complete(client, [{"role": "user", "content": "Hello!"}], stream=False)
    assert message.tool_calls is None
    assert message.content


def test_a_tool_that_is_not_to_be_called_is_not(client: openai.OpenAI) -> None:
    message = complete(client, [{"role": "user", "content": ASKED[0].question}], stream=False, tool_choice="none")
    assert message.tool_calls is None
