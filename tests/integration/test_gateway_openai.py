"""The official OpenAI client against the gateway: what it sends is understood, what it gets back it can read."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import openai
import pytest
import uvloop
from tests.integration.gateway_fakes import MODEL, Site, serving

Check = Callable[[openai.AsyncOpenAI, Site], Awaitable[None]]
USER = [{"role": "user", "content": "hi"}]


def with_client(check: Check, **options: object) -> None:
    async def main() -> None:
        async with serving(**options) as site:
            async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client:
                await check(client, site)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_a_chat_completion_streams() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        stream = await client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, seed=7, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "seed 7 says héllo."
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage.completion_tokens == len(text.encode()) + 1
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 4
        assert len({c.id for c in chunks}) == 1
        assert site.engine.aborted == []

    with_client(check)


def test_a_chat_completion_comes_whole() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        answer = await client.chat.completions.create(model=MODEL, messages=USER, seed=7)
        assert answer.choices[0].message.content == "seed 7 says héllo."
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        (fact,) = site.kept.facts
        assert (fact.request_id, fact.seed, fact.outcome, fact.status) == (answer.id, 7, "stop", 200)

    with_client(check)
