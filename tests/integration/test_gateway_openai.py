"""The official OpenAI client against the gateway: what it sends is understood, what it gets back it can read."""

import asyncio
from collections.abc import Awaitable, Callable

import openai
import pytest
import uvloop
from tests.integration.gateway_fakes import MODEL, FakeEngine, Site, ids_of, model_info, serving, until

from isthmus.contracts.errors import Overloaded
from isthmus.contracts.events import ErrorInfo, Finish, RequestOutput
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.sampling import SamplingParams

Check = Callable[[openai.AsyncOpenAI, Site], Awaitable[None]]
USER = [{"role": "user", "content": "hi"}]


def client_of(site: Site) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, timeout=20)


def with_client(check: Check, **options: object) -> None:
    async def main() -> None:
        async with serving(**options) as site, client_of(site) as client:
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


def test_n_answers_draw_from_derived_seeds() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        many = await client.chat.completions.create(model=MODEL, messages=USER, seed=7, n=3)
        again = await client.chat.completions.create(model=MODEL, messages=USER, seed=7, n=3)
        texts = [choice.message.content for choice in many.choices]
        assert texts == [choice.message.content for choice in again.choices]
        assert texts[0] == "seed 7 says héllo."
        assert len(set(texts)) == 3
        assert [choice.index for choice in many.choices] == [0, 1, 2]
        assert many.usage.prompt_tokens == len(site.engine.submitted[0].prompt_ids)
        ids = [request.request_id for request in site.engine.submitted[:3]]
        assert ids == [many.id, f"{many.id}-1", f"{many.id}-2"]
        stream = await client.chat.completions.create(model=MODEL, messages=USER, seed=7, n=3, stream=True)
        parts = ["", "", ""]
        finishes = {}
        async for chunk in stream:
            for choice in chunk.choices:
                parts[choice.index] += choice.delta.content or ""
                finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
        assert parts == texts
        assert finishes == {0: "stop", 1: "stop", 2: "stop"}

    with_client(check)


def test_a_missing_seed_is_drawn_and_recorded() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        for _ in range(2):
            await client.chat.completions.create(model=MODEL, messages=USER)
        first, second = (request.sampling.seed for request in site.engine.submitted)
        assert first != second
        assert [fact.seed for fact in site.kept.facts] == [first, second]

    with_client(check)


def test_a_stop_string_ends_the_text_and_the_work() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        answer = await client.chat.completions.create(model=MODEL, messages=USER, seed=7, stop=["says"])
        assert answer.choices[0].message.content == "seed 7 "
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len("seed 7 says")
        assert site.engine.aborted == [answer.id]
        assert site.engine.closed == [answer.id]
        assert site.counted("abort_stop_string") == 1
        stream = await client.chat.completions.create(model=MODEL, messages=USER, seed=7, stop="says", stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "seed 7 "
        assert chunks[-1].choices[0].finish_reason == "stop"

    # Five tokens a step: the stop string ends in the middle of a step, and what came after it in the step is not text.
    for step in (1, 5):
        with_client(check, engine=FakeEngine(model_info(), step=step))


def test_a_length_limit_ends_with_length() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        for limit in ({"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_tokens": 9, "max_completion_tokens": 4}):
            answer = await client.chat.completions.create(model=MODEL, messages=USER, seed=7, **limit)
            assert answer.choices[0].message.content == "seed"
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage.completion_tokens == 4

    with_client(check)


def test_chat_log_probabilities() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        ask = {"model": MODEL, "messages": USER, "seed": 7, "logprobs": True, "top_logprobs": 2}
        whole = await client.chat.completions.create(**ask)
        content = whole.choices[0].logprobs.content
        raw = b"".join(bytes(entry.bytes) for entry in content)
        assert raw.decode() == whole.choices[0].message.content
        assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in content)
        chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
        streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        assert streamed == content
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content

    with_client(check)
    with_client(check, engine=FakeEngine(model_info(), step=4))


def test_completions_take_every_form_of_prompt() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        forms = ["hi", ["hi"], [0, *ids_of("hi")], [[0, *ids_of("hi")]]]
        for prompt in forms:
            answer = await client.completions.create(model=MODEL, prompt=prompt, seed=7, echo=True)
            assert site.engine.submitted[-1].prompt_ids == [0, *ids_of("hi")]
            assert answer.choices[0].text == "hiseed 7 says héllo."
        both = await client.completions.create(model=MODEL, prompt=["a", "bb"], n=2, seed=7)
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        assert both.choices[0].text == both.choices[2].text
        assert both.choices[1].text == both.choices[3].text != both.choices[0].text
        assert both.usage.prompt_tokens == 2 + 3
        stream = await client.completions.create(model=MODEL, prompt=["a", "bb"], n=2, seed=7, stream=True)
        parts = [""] * 4
        async for chunk in stream:
            for choice in chunk.choices:
                parts[choice.index] += choice.text
        assert parts == [choice.text for choice in both.choices]

    with_client(check)


def test_completion_log_probabilities_have_offsets_into_the_text() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        answer = await client.completions.create(model=MODEL, prompt="hi", seed=7, logprobs=1)
        text, logprobs = answer.choices[0].text, answer.choices[0].logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(text.encode())
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert token.startswith("bytes:") or text[offset] == token
        chunks = [
            chunk
            async for chunk in await client.completions.create(
                model=MODEL, prompt="hi", seed=7, logprobs=1, stream=True
            )
        ]
        offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
        assert offsets == logprobs.text_offset

    with_client(check)


def test_models_are_listed_and_found_and_others_are_not() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        listed = await client.models.list()
        assert [model.id for model in listed.data] == [MODEL]
        reply = await client.get(f"/models/{MODEL}", cast_to=dict)
        assert reply["id"] == MODEL
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="other", messages=USER)
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")

    with_client(check)


def test_sampling_fields_reach_the_engine() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        extra = {
            "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True,
            "stop_token_ids": [9], "priority": -3,
        }  # fmt: skip
        await client.chat.completions.create(
            model=MODEL, messages=USER, seed=-1, temperature=0.5, top_p=0.9, presence_penalty=0.25,
            frequency_penalty=-0.5, logit_bias={"65": 3}, max_tokens=8, user="u", metadata={"a": "b"}, extra_body=extra,
            extra_headers={"x-request-timeout-ms": "5000"},
        )  # fmt: skip
        (request,) = site.engine.submitted
        assert request.sampling == SamplingParams(
            max_tokens=8, seed=2**64 - 1, temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, presence_penalty=0.25,
            frequency_penalty=-0.5, repetition_penalty=1.2, logit_bias={65: 3.0}, stop_token_ids=(9,), min_tokens=2,
            ignore_eos=True,
        )  # fmt: skip
        assert request.priority == -3
        assert 4 < request.deadline_s <= 5

    with_client(check)


def test_an_overloaded_engine_is_a_503_with_retry_after_also_for_a_stream() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model=MODEL, messages=USER, stream=stream)
            assert caught.value.status_code == 503
            assert caught.value.code == "overloaded"
            assert caught.value.response.headers["retry-after"] == "3"
        assert [fact.outcome for fact in site.kept.facts] == ["rejected", "rejected"]
        assert [fact.status for fact in site.kept.facts] == [503, 503]

    def raised(request: EngineRequest) -> Exception:
        return Overloaded("the queue is full", 2.5)

    def sent(request: EngineRequest) -> RequestOutput:
        error = ErrorInfo("overloaded", "the queue is full", retry_after_s=2.5)
        return RequestOutput(request.request_id, finish=Finish.REJECTED, error=error)

    for failure in (raised, sent):
        with_client(check, engine=FakeEngine(model_info(), failure=failure))


def test_a_refused_choice_ends_its_siblings() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        site.engine.gate = asyncio.Semaphore(0)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model=MODEL, messages=USER, n=3, stream=stream)
        first, second, third = (request.request_id for request in site.engine.submitted[:3])
        await until(lambda: len(site.kept.facts) == 6)
        assert {(f.request_id, f.outcome, f.status) for f in site.kept.facts[:3]} == {
            (first, "cancelled", 503), (second, "rejected", 503), (third, "cancelled", 503),
        }  # fmt: skip
        assert {first, third} <= set(site.engine.aborted)
        assert sorted(site.engine.closed) == sorted(request.request_id for request in site.engine.submitted)

    def refuse_second(request: EngineRequest) -> Exception | None:
        return Overloaded("the queue is full") if request.request_id.endswith("-1") else None

    with_client(check, engine=FakeEngine(model_info(), failure=refuse_second))


def test_a_failure_within_a_stream_is_its_last_event() -> None:
    async def check(client: openai.AsyncOpenAI, site: Site) -> None:
        site.engine.gate = asyncio.Semaphore(3)
        stream = await client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, extra_headers={"x-request-timeout-ms": "300"}
        )
        with pytest.raises(openai.APIError, match="deadline"):
            async for _ in stream:
                pass
        await until(lambda: bool(site.kept.records))
        assert site.kept.facts[0].outcome == "deadline"
        assert site.engine.aborted == site.engine.closed == [site.kept.facts[0].request_id]

    with_client(check)
