"""Answers with tool calls and reasoning, whole and streamed: the exact JSON, and what OpenAI's client makes of it."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
import uvloop
from openai.lib.streaming.chat import ChatCompletionStreamState
from tests.integration.gateway_fakes import MODEL, FakeEngine, Site, model_info, post, raw, serving
from tests.integration.test_gateway_bad_input import CHAT, chat

from isthmus.contracts.requests import EngineRequest
from isthmus.gateway.answer import call_id

Check = Callable[[openai.AsyncOpenAI, Site], Awaitable[None]]
USER = [{"role": "user", "content": "hi"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "time")
]
ONE = '<tool_call>weather|{"city": "Zürich"}</tool_call>'
TWO = "<think>Both.</think>Let me see." + ONE + "<tool_call>time|{}</tool_call>"
CALL_ID = re.compile(r"call_[A-Za-z0-9]{24}")


def replying(text: str, step: int = 1) -> FakeEngine:
    def reply(_: EngineRequest) -> str:
        return text

    return FakeEngine(model_info(), reply, step)


def with_client(check: Check, **options: object) -> None:
    async def main() -> None:
        async with serving(**options) as site:
            client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, timeout=20)
            async with client:
                await check(client, site)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_ids_of_calls_are_long_random_and_repeatable() -> None:
    class Entropy:
        def __init__(self) -> None:
            self.drawn = 0

        def token_bytes(self, count: int) -> bytes:
            self.drawn += 1
            return self.drawn.to_bytes(1, "little") * count

    one, other, again = call_id(first := Entropy()), call_id(first), call_id(Entropy())
    assert CALL_ID.fullmatch(one)
    assert CALL_ID.fullmatch(other)
    assert one == again != other
    assert call_id(Entropy(), "toolu_").startswith("toolu_")


async def fetch(site: Site, **fields: object) -> bytes:
    """The body of an answer, its chunks joined."""
    answer = await raw(site, post(CHAT, chat(**fields)))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), answer
    if b"transfer-encoding: chunked" not in head:
        return body
    data = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        data, body = data + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return data


def events(body: bytes) -> list[dict[str, Any]]:
    lines = body.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_whole_answer_has_calls_reasoning_and_text_apart(step: int) -> None:
    async def check(_: openai.AsyncOpenAI, site: Site) -> None:
        answer = json.loads(await fetch(site, tools=TOOLS))
        (choice,) = answer["choices"]
        ids = [call["id"] for call in choice["message"]["tool_calls"]]
        assert all(CALL_ID.fullmatch(one) for one in ids)
        assert len(set(ids)) == 2
        assert choice == {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Let me see.",
                "refusal": None,
                "reasoning_content": "Both.",
                "tool_calls": [
                    {"id": ids[0], "type": "function",
                     "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}},
                    {"id": ids[1], "type": "function", "function": {"name": "time", "arguments": "{}"}},
                ],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        }  # fmt: skip
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
        assert answer["usage"]["completion_tokens"] == len(TWO.encode()) + 1

    with_client(check, engine=replying(TWO, step))


def test_only_what_was_made_is_in_a_whole_answer() -> None:
    cases = [
        (ONE, {"tools": TOOLS}, {"role", "content", "refusal", "tool_calls"}, None, "tool_calls"),
        (ONE, {}, {"role", "content", "refusal"}, ONE, "stop"),
        (ONE, {"tools": TOOLS, "tool_choice": "none"}, {"role", "content", "refusal"}, ONE, "stop"),
        ("<think>Hm.</think>", {}, {"role", "content", "refusal", "reasoning_content"}, "", "stop"),
        ("Plain.", {"tools": TOOLS}, {"role", "content", "refusal"}, "Plain.", "stop"),
        # Cut off within the call: the length is what matters to a client, the call is not complete.
        (ONE, {"tools": TOOLS, "max_tokens": 30}, {"role", "content", "refusal", "tool_calls"}, None, "length"),
    ]

    async def check(_: openai.AsyncOpenAI, site: Site) -> None:
        for text, fields, keys, content, finish in cases:
            site.engine.reply = lambda _, text=text: text
            (choice,) = json.loads(await fetch(site, **fields))["choices"]
            assert set(choice["message"]) == keys, (text, fields)
            assert (choice["message"]["content"], choice["finish_reason"]) == (content, finish), (text, fields)

    with_client(check, engine=replying(""))


def test_the_events_of_a_streamed_call_are_openais() -> None:
    async def check(_: openai.AsyncOpenAI, site: Site) -> None:
        chunks = events(await fetch(site, tools=TOOLS, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        frame = {(chunk["id"], chunk["object"], chunk["model"], chunk["created"]) for chunk in chunks}
        assert len(frame) == 1
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
        deltas = [choice["delta"] for choice in choices]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[-1] == {}
        kinds = [next(iter(delta)) for delta in deltas[1:-1]]
        assert [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind] == [
            "reasoning_content",
            "content",
            "tool_calls",
        ]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Both."
        assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        for index, (name, arguments) in enumerate([("weather", '{"city": "Zürich"}'), ("time", "{}")]):
            first, *rest = [call for call in calls if call["index"] == index]
            assert CALL_ID.fullmatch(first["id"])
            head = {"name": name, "arguments": first["function"]["arguments"]}
            assert {**first, "id": ""} == {"index": index, "id": "", "type": "function", "function": head}
            assert rest
            assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in rest)
            assert "".join(call["function"]["arguments"] for call in (first, *rest)) == arguments

    with_client(check, engine=replying(TWO))


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_openais_client_puts_a_stream_together_as_the_whole_answer(step: int) -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        ask = {"model": MODEL, "messages": USER, "tools": TOOLS, "n": 2}
        whole = await client.chat.completions.create(**ask)
        state = ChatCompletionStreamState()
        async for chunk in await client.chat.completions.create(**ask, stream=True):
            state.handle_chunk(chunk)
            # A client puts a chunk that is the first with calls into its state as it is: an index comes once in it.
            for choice in chunk.choices:
                indices = [call.index for call in choice.delta.tool_calls or ()]
                assert len(indices) == len(set(indices))
        streamed = state.get_final_completion()
        for one, other in zip(whole.choices, streamed.choices, strict=True):
            assert one.finish_reason == other.finish_reason == "tool_calls"
            assert one.message.content == other.message.content == "Let me see."
            assert one.message.model_extra["reasoning_content"] == other.message.model_extra["reasoning_content"]
            made = [(call.function.name, call.function.arguments) for call in one.message.tool_calls]
            assert made == [(call.function.name, call.function.arguments) for call in other.message.tool_calls]
            assert made == [("weather", '{"city": "Zürich"}'), ("time", "{}")]
        ids = [
            call.id for answer in (whole, streamed) for choice in answer.choices for call in choice.message.tool_calls
        ]
        assert len(set(ids)) == 8

    with_client(check, engine=replying(TWO, step))


def test_a_conversation_goes_on_after_a_call() -> None:
    def reply(request: EngineRequest) -> str:
        return ONE if len(request.prompt_ids) < 40 else "17 degrees."

    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        first = await client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
        message = first.choices[0].message
        (call,) = message.tool_calls
        # The answer goes back as the client dumps it, every field in it.
        messages = [*USER, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "17"}]
        second = await client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
        assert second.choices[0].message.content == "17 degrees."
        asked = site.prompting.chats[-1][0]
        assert asked[1].tool_calls[0].id == asked[2].tool_call_id == call.id
        assert asked[1].tool_calls[0].arguments == '{"city": "Zürich"}'

    with_client(check, engine=FakeEngine(model_info(), reply))


def test_the_clients_helper_for_schemas_is_understood() -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        parsed = await client.chat.completions.parse(model=MODEL, messages=USER, response_format=City)
        assert parsed.choices[0].message.parsed == City(name="Rome")
        tool = openai.pydantic_function_tool(City, name="city")
        site.engine.reply = lambda _: '<tool_call>city|{"name": "Rome"}</tool_call>'
        called = await client.chat.completions.parse(model=MODEL, messages=USER, tools=[tool])
        assert called.choices[0].message.tool_calls[0].function.parsed_arguments == City(name="Rome")
        _, options = site.prompting.chats[-1]
        assert options.tools[0].strict
        async with client.chat.completions.stream(model=MODEL, messages=USER, tools=[tool]) as stream:
            names = [event.type async for event in stream]
        assert "tool_calls.function.arguments.delta" in names
        assert "tool_calls.function.arguments.done" in names

    with_client(check, engine=replying('{"name": "Rome"}'))


def test_log_probabilities_cover_every_token_of_a_call() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        ask = {"model": MODEL, "messages": USER, "tools": TOOLS, "logprobs": True}
        whole = await client.chat.completions.create(**ask)
        tokens = whole.choices[0].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in tokens).decode() == TWO
        chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
        streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        assert streamed == tokens
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Let me see."

    for step in (1, 5):
        with_client(check, engine=replying(TWO, step))


def test_a_stop_string_counts_in_text_only() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        ask = {"model": MODEL, "messages": USER, "tools": TOOLS}
        answer = await client.chat.completions.create(**ask, stop=["city", "Both"])
        assert answer.choices[0].finish_reason == "tool_calls"
        assert len(answer.choices[0].message.tool_calls) == 2
        cut = await client.chat.completions.create(**ask, stop=["me"])
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("Let ", "stop")
        assert cut.choices[0].message.tool_calls is None

    with_client(check, engine=replying(TWO))
