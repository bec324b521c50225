"""Anthropic's dialect: the exact JSON and events, what the official client makes of them, and every refusal."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import pytest
import uvloop
from tests.integration.gateway_fakes import MODEL, FakeEngine, Site, model_info, post, raw, serving

from isthmus.contracts.constraints import ConstraintKind
from isthmus.contracts.errors import InvalidInput, Overloaded
from isthmus.contracts.events import ErrorInfo, Finish, RequestOutput
from isthmus.contracts.prompting import ChatMessage, ToolCall, ToolMode
from isthmus.contracts.requests import EngineRequest

Check = Callable[[anthropic.AsyncAnthropic, Site], Awaitable[None]]
PATH = "/v1/messages"
HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"name": name, "description": "x", "input_schema": {"type": "object"}} for name in ("weather", "time")]
TWO = '<think>Both.</think>Let me see.<tool_call>weather|{"city": "Zürich"}</tool_call><tool_call>time|{}</tool_call>'
CALL_ID = re.compile(r"toolu_[A-Za-z0-9]{24}")


def replying(text: str, step: int = 1, **info: object) -> FakeEngine:
    def reply(_: EngineRequest) -> str:
        return text

    return FakeEngine(model_info(**info), reply, step)


def with_client(check: Check, **options: Any) -> None:
    async def main() -> None:
        async with serving(**options) as site:
            client = anthropic.AsyncAnthropic(base_url=site.url, api_key="none", max_retries=0, timeout=20)
            async with client:
                await check(client, site)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def body(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "max_tokens": 200, "messages": HI, **fields}).encode()


async def answer(site: Site, path: str = PATH, **fields: object) -> tuple[int, bytes]:
    """Status and body of an answer, chunks joined."""
    got = await raw(site, post(path, body(**fields)))
    head, _, rest = got.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert b"\r\nrequest-id: msg-" in head or status >= 400, head
    if b"transfer-encoding: chunked" not in head:
        return status, rest
    data = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        data, rest = data + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return status, data


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream; each one's name is its type."""
    found = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, _, value = event.partition("\n")
        found.append(json.loads(value.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_whole_answer_has_thinking_text_and_calls_as_blocks(step: int) -> None:
    async def check(_: anthropic.AsyncAnthropic, site: Site) -> None:
        status, data = await answer(site, tools=TOOLS, thinking={"type": "enabled", "budget_tokens": 64})
        found = json.loads(data)
        first, second = (block for block in found["content"] if block["type"] == "tool_use")
        assert CALL_ID.fullmatch(first["id"])
        assert first["id"] != second["id"]
        prompt = len("<user>hi\n<assistant>") + 1
        assert status == 200
        assert found == {
            "id": found["id"],
            "type": "message",
            "role": "assistant",
            "model": MODEL,
            "content": [
                {"type": "thinking", "thinking": "Both.", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": first["id"], "name": "weather", "input": {"city": "Zürich"}},
                {"type": "tool_use", "id": second["id"], "name": "time", "input": {}},
            ],
            "stop_reason": "tool_use",
            "stop_sequence": None,
            "usage": {
                "input_tokens": prompt - 4, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4,
                "output_tokens": len(TWO.encode()) + 1,
            },
        }  # fmt: skip
        assert site.prompting.chats[-1][1].thinking is True

    with_client(check, engine=replying(TWO, step))


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_a_stream_opens_and_closes_each_block_in_turn(step: int) -> None:
    async def check(_: anthropic.AsyncAnthropic, site: Site) -> None:
        status, data = await answer(site, tools=TOOLS, stream=True)
        found = events(data)
        assert status == 200
        assert [one["type"] for one in found[:2]] == ["message_start", "ping"]
        assert found[0]["message"]["content"] == []
        assert found[0]["message"]["stop_reason"] is None
        assert [one["type"] for one in found[-2:]] == ["message_delta", "message_stop"]
        assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
        assert found[-2]["usage"]["cache_read_input_tokens"] == 4
        opened, blocks = None, []
        for one in found[2:-2]:
            kind = one["type"]
            if kind == "content_block_start":
                assert opened is None
                opened = one["index"]
                blocks.append([one["content_block"]["type"], ""])
            elif kind == "content_block_delta":
                assert one["index"] == opened
                delta = one["delta"]
                blocks[-1][1] += delta.get("text", "") + delta.get("thinking", "") + delta.get("partial_json", "")
            else:
                assert (kind, one["index"]) == ("content_block_stop", opened)
                opened = None
        assert opened is None
        assert blocks == [
            ["thinking", "Both."], ["text", "Let me see."], ["tool_use", '{"city": "Zürich"}'], ["tool_use", "{}"],
        ]  # fmt: skip

    with_client(check, engine=replying(TWO, step))


def test_the_official_client_reads_answers_and_streams() -> None:
    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        whole = await client.messages.create(model=MODEL, max_tokens=200, messages=HI, tools=TOOLS)
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
        async with client.messages.stream(model=MODEL, max_tokens=200, messages=HI, tools=TOOLS) as stream:
            texts = [text async for text in stream.text_stream]
            streamed = await stream.get_final_message()
        assert "".join(texts) == "Let me see."
        assert streamed.stop_reason == whole.stop_reason == "tool_use"
        assert streamed.usage.output_tokens == whole.usage.output_tokens
        assert streamed.usage.cache_read_input_tokens == whole.usage.cache_read_input_tokens == 4
        calls = [(block.name, block.input) for block in streamed.content if block.type == "tool_use"]
        assert calls == [("weather", {"city": "Zürich"}), ("time", {})]
        counted = await client.messages.count_tokens(model=MODEL, messages=HI, tools=TOOLS)
        assert counted.input_tokens == len("<user>hi\n<assistant>") + 1

    with_client(check, engine=replying(TWO))


def test_a_conversation_with_results_goes_back_as_it_was() -> None:
    said: Any = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "see"},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
            {"type": "tool_use", "id": "toolu_2", "name": "time", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"},
            {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True,
             "content": [{"type": "text", "text": "no clock"}]},
            {"type": "text", "text": "well?"},
        ]},
    ]  # fmt: skip
    calls = (ToolCall("toolu_1", "weather", '{"city": "Rome"}'), ToolCall("toolu_2", "time", "{}"))

    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        system: Any = [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}]
        got = await client.messages.create(
            model=MODEL, max_tokens=20, messages=said, system=system, tools=TOOLS,
            tool_choice={"type": "tool", "name": "time", "disable_parallel_tool_use": True},
        )  # fmt: skip
        messages, options = site.prompting.chats[-1]
        assert messages == [
            ChatMessage("system", "be"),
            ChatMessage("user", "a\nb"),
            ChatMessage("assistant", "see", tool_calls=calls, reasoning="hm"),
            ChatMessage("tool", "sunny", name="weather", tool_call_id="toolu_1"),
            ChatMessage("tool", '{"error": "no clock"}', name="time", tool_call_id="toolu_2"),
            ChatMessage("user", "well?"),
        ]
        assert (options.choice.mode, options.choice.name, options.choice.parallel) == (ToolMode.NAMED, "time", False)
        assert options.thinking is None
        # Marked: what was new and fills whole blocks counts as written to the cache.
        usage = got.usage
        assert usage.cache_creation_input_tokens is not None
        prompt = usage.input_tokens + usage.cache_creation_input_tokens + (usage.cache_read_input_tokens or 0)
        assert usage.cache_creation_input_tokens == prompt // 16 * 16 - 4 > 0

    with_client(check, engine=replying("ok"))


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"output_config": {"effort": "low"}}, True),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}}, False),
        ({}, None),
    ],
)
def test_thinking_is_asked_for_and_can_be_hidden(fields: dict[str, Any], thinking: bool | None) -> None:
    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        await client.messages.create(model=MODEL, max_tokens=50, messages=HI, **fields)
        assert site.prompting.chats[-1][1].thinking is thinking
        hidden = await client.messages.create(
            model=MODEL, max_tokens=50, messages=HI, thinking={"type": "adaptive", "display": "omitted"}
        )
        assert [(block.type, getattr(block, "thinking", None)) for block in hidden.content] == [
            ("thinking", ""),
            ("text", None),
        ]

    with_client(check, engine=replying("<think>secret</think>yes"))


def test_why_an_answer_ended() -> None:
    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        ask: Any = {"model": MODEL, "messages": HI}
        done = await client.messages.create(**ask, max_tokens=50)
        assert (done.stop_reason, done.stop_sequence) == ("end_turn", None)
        cut = await client.messages.create(**ask, max_tokens=3)
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
        stopped = await client.messages.create(**ask, max_tokens=50, stop_sequences=["xyz", "lo"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "lo")
        assert stopped.content[0].type == "text"
        assert stopped.content[0].text == "hel"
        async with client.messages.stream(**ask, max_tokens=50, stop_sequences=["lo"]) as stream:
            assert (await stream.get_final_message()).stop_sequence == "lo"

    with_client(check, engine=replying("hello, world"))


def test_a_limit_over_the_context_is_cut_to_it_and_said() -> None:
    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        got = await client.messages.create(model=MODEL, max_tokens=4000, messages=HI)
        assert got.stop_reason == "model_context_window_exceeded"
        assert got.usage.input_tokens + (got.usage.cache_read_input_tokens or 0) + got.usage.output_tokens == 64

    with_client(check, engine=replying("x" * 500, max_model_len=64))


def test_a_call_that_was_cut_off_is_no_call() -> None:
    async def check(_: anthropic.AsyncAnthropic, site: Site) -> None:
        _, data = await answer(site, tools=TOOLS, max_tokens=26)
        found = json.loads(data)
        assert found["stop_reason"] == "max_tokens"
        assert found["content"] == [{"type": "text", "text": 'weather({"city"'}]

    with_client(check, engine=replying('<tool_call>weather|{"city": "Rome"}</tool_call>', step=100))


def test_a_form_of_the_answer_is_a_constraint_and_its_refusal_names_the_field() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}

    def failure(request: EngineRequest) -> RequestOutput | None:
        if request.sampling.max_tokens != 7:
            return None
        info = ErrorInfo("invalid_input", "this schema cannot be kept", "constraint")
        return RequestOutput(request.request_id, finish=Finish.REJECTED, error=info)

    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        await client.messages.create(model=MODEL, max_tokens=9, messages=HI, output_config=config)
        constraint = site.engine.submitted[-1].constraint
        assert constraint is not None
        assert constraint.kind is ConstraintKind.JSON_SCHEMA
        assert json.loads(constraint.text) == schema
        for stream in (False, True):
            status, data = await answer(site, max_tokens=7, output_config=config, stream=stream)
            assert status == 400
            error = json.loads(data)["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith("output_config.format: ")

    with_client(check, engine=FakeEngine(model_info(), failure=failure))


def test_errors_are_in_the_dialect() -> None:
    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await client.messages.create(model="other", max_tokens=5, messages=HI)
        assert unknown.value.type == "not_found_error"
        site.prompting.failure = Overloaded("full", 3.0)
        with pytest.raises(anthropic.InternalServerError) as full:
            await client.messages.create(model=MODEL, max_tokens=5, messages=HI)
        assert full.value.status_code == 503
        assert full.value.response.headers["retry-after"] == "3"
        assert json.loads(full.value.response.text)["error"]["type"] == "overloaded_error"
        site.prompting.failure = None

    with_client(check, engine=replying("hello"))


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    def reply(request: EngineRequest) -> list[int]:
        return [*(byte + 3 for byte in b"hel"), 10**9]

    class Broken(FakeEngine):
        def _output(self, request: EngineRequest, part: list[int], **how: bool) -> RequestOutput:
            if part[0] == 10**9:
                error = ErrorInfo("engine_failed", "the step failed")
                return RequestOutput(request.request_id, finish=Finish.ERROR, error=error)
            return super()._output(request, part, **how)

    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        status, data = await answer(site, stream=True)
        found = events(data)
        assert status == 200
        assert found[0]["type"] == "message_start"
        assert found[-1]["type"] == "error"
        assert found[-1]["error"]["message"] == "the step failed"
        async with client.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream:
            with pytest.raises(anthropic.APIStatusError):
                await stream.get_final_message()

    with_client(check, engine=Broken(model_info(), reply))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    ({"messages": [*HI, {"role": "assistant", "content": "Sure"}]}, "messages[1]"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]}]},
        "messages[0].content[0].tool_use_id",
    ),
    ({"temperature": 1.5}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
    ({"system": [{"text": "a"}]}, "system[0]"),
    ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, "tools[0]"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"container": "x"}, "container"),
    ({"unheard_of": 1}, "unheard_of"),
]


@pytest.mark.parametrize(("fields", "named"), BAD)
def test_a_bad_request_is_refused_by_the_name_of_the_field(fields: dict[str, Any], named: str) -> None:
    async def check(_: anthropic.AsyncAnthropic, site: Site) -> None:
        status, data = await answer(site, **fields)
        found = json.loads(data)
        assert status == 400
        assert found["type"] == "error"
        assert found["error"]["type"] == "invalid_request_error"
        assert named in found["error"]["message"]
        assert found["request_id"].startswith("msg-")
        assert not site.engine.submitted

    with_client(check)


def test_a_prompting_refusal_names_the_schema_of_the_tool() -> None:
    async def check(_: anthropic.AsyncAnthropic, site: Site) -> None:
        site.prompting.refusal = InvalidInput("cannot be kept", "constraint")
        status, data = await answer(site, tools=TOOLS[:1], tool_choice={"type": "any"})
        assert status == 400
        assert json.loads(data)["error"]["message"].startswith("tools[0].input_schema: ")

    with_client(check)


def test_ignored_fields_are_counted() -> None:
    async def check(client: anthropic.AsyncAnthropic, site: Site) -> None:
        before = site.counted("ignored_field")
        await client.messages.create(
            model=MODEL, max_tokens=5, messages=HI, metadata={"user_id": "u"}, service_tier="auto"
        )
        assert site.counted("ignored_field") == before + 2

    with_client(check)
