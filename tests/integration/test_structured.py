"""Structured output end to end: the embedded model behind a real engine process and a real grammar process.

Promises: an output that ends keeps its constraint; what cannot be kept is refused with a reason; speculation, batches,
a resume and the death of the grammar process change nothing; requests without a constraint never wait for one.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec
import psutil
from tests.support.hostile import HOSTILE
from tests.support.requests import make_request
from tests.support.scale import examples
from tests.support.schemas import random_schema
from tests.support.structured import PROMPT, Outcome, Texts, ask, ask_all, constrained, engine, verdict

from isthmus.contracts.constraints import ConstraintKind
from isthmus.contracts.errors import InvalidInput, Unsupported
from isthmus.contracts.events import Finish
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.client import EngineProcess
from isthmus.execution.inference.grammar.settings import GrammarSettings

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def run(
    body: Callable[[EngineProcess], Awaitable[None]], grammar: GrammarSettings | None = None, **options: object
) -> None:
    async def main() -> None:
        async with asyncio.timeout(280), engine(grammar, **options) as process:
            await body(process)

    asyncio.run(main())


def mixed() -> list[EngineRequest]:
    """Constraints of every kind, sampled hot."""
    schema = json.dumps(PERSON)
    return [
        constrained("s1", ConstraintKind.JSON_SCHEMA, schema, seed=1),
        constrained("s2", ConstraintKind.JSON_SCHEMA, schema, seed=2, top_p=0.9, repetition_penalty=1.2),
        constrained("s3", ConstraintKind.JSON_SCHEMA, schema, seed=3, temperature=0.0),
        constrained("r", ConstraintKind.REGEX, r"\d{3}-\d{4}( ext\. \d{2})?", seed=4),
        constrained(
            "g", ConstraintKind.GRAMMAR, 'start: "fn(" arg ("," arg)* ")"\narg: /[a-z]{1,6}/', seed=5, max_tokens=40
        ),
        constrained("c", ConstraintKind.CHOICE, json.dumps(["yes", "yes, but", "no", "<|end|>"]), seed=6),
    ]


def check(outcomes: list[Outcome]) -> None:
    s1, s2, s3, regex, grammar, choice = outcomes
    assert [verdict(PERSON, one) for one in (s1, s2, s3)] == ["valid"] * 3
    assert re.fullmatch(r"\d{3}-\d{4}( ext\. \d{2})?", regex.text)
    assert grammar.finish is Finish.LENGTH or re.fullmatch(r"fn\([a-z]{1,6}(,[a-z]{1,6})*\)", grammar.text)
    assert choice.text in ("yes", "yes, but", "no", "<|end|>")
    assert all(one.finish is Finish.STOP for one in (s1, s2, s3, regex, choice))


def test_speculation_a_resume_and_the_death_of_the_process_change_no_output() -> None:
    found: dict[int, list[Outcome]] = {}

    async def body(process: EngineProcess, drafts: int) -> None:
        outcomes = await ask_all(process, mixed())
        check(outcomes)
        found[drafts] = outcomes
        assert (max(size for one in outcomes for size in one.steps) > 1) == (drafts > 0)
        resumed = [
            msgspec.structs.replace(request, request_id=f"{request.request_id}-again", output_ids=one.ids[:cut])
            for request, one in zip(mixed(), outcomes, strict=True)
            for cut in (len(one.ids) // 2, len(one.ids) - 1)
            if 0 < cut < len(one.ids)
        ]
        resumed = [msgspec.structs.replace(one, request_id=f"{one.request_id}-{n}") for n, one in enumerate(resumed)]
        whole = {request.request_id: one.ids for request, one in zip(mixed(), outcomes, strict=True)}
        for request, again in zip(resumed, await ask_all(process, resumed), strict=True):
            assert again.ids == whole[request.request_id.partition("-")[0]], request.request_id
        if not drafts:
            await killed(process, outcomes)
        assert process.stats.blocks_leased == 0

    for drafts in (0, 4):
        run(lambda process, drafts=drafts: body(process, drafts), exact=True, draft_tokens=drafts)  # type: ignore[misc]
    assert [one.ids for one in found[0]] == [one.ids for one in found[4]]


def test_random_schemas_are_kept_or_refused_with_a_reason() -> None:
    schemas = [random_schema(seed) for seed in range(examples(40, 1000))]
    brief = {"logit_bias": Texts().brevity(), "frequency_penalty": 2.0, "max_tokens": 384}

    async def body(process: EngineProcess) -> None:
        refused = 0
        for style, options in (("free", {}), ("brief", brief)):
            requests = [
                constrained(f"{style}{seed}", ConstraintKind.JSON_SCHEMA, json.dumps(schema), seed=seed, **options)
                for seed, schema in enumerate(schemas)
            ]
            outcomes = await ask_all(process, requests)
            counts = Counter(verdict(schema, one) for schema, one in zip(schemas, outcomes, strict=True))
            # Left to itself the model writes free strings without an end; with the bias all come to their end.
            assert counts["valid"] > len(schemas) // 4, (style, counts)
            assert style == "free" or counts["truncated"] <= len(schemas) // 100, counts
            refused += counts["refused"]
            assert process.stats.grammar_refused == refused
        for length in (1, 7):
            request = constrained(f"cut-{length}", ConstraintKind.JSON_SCHEMA, json.dumps(PERSON), max_tokens=length)
            outcome = await ask(process, request, Texts())
            assert outcome.finish is Finish.LENGTH
            assert len(outcome.ids) == length

    run(body, draft_tokens=3)


async def killed(process: EngineProcess, calm: list[Outcome]) -> None:
    """Run the same again and kill the grammar process twice on the way."""
    texts = Texts()
    kills = 0

    async def killing(request: EngineRequest) -> list[int]:
        nonlocal kills
        ids: list[int] = []
        async for output in process.submit(request):
            ids += output.token_ids
            if len(ids) in (3, 9):
                (child,) = psutil.Process(process.pid).children()
                child.kill()
                kills += 1
            assert output.error is None
        return ids

    again = [msgspec.structs.replace(one, request_id=f"{one.request_id}-killed") for one in mixed()]
    first, *others = await asyncio.gather(killing(again[0]), *(ask(process, one, texts) for one in again[1:]))
    assert kills == 2
    assert first == calm[0].ids
    assert [one.ids for one in others] == [one.ids for one in calm[1:]]
    assert process.stats.grammar_restarts == 2
    assert process.stats.grammar_refused == 0


def test_refusals_name_the_reason_and_come_before_any_token() -> None:
    async def body(process: EngineProcess) -> None:
        texts = Texts()
        cases = [
            (constrained("a", ConstraintKind.JSON_SCHEMA, '{"not":{}}'), Unsupported, "constraint", "not"),
            (constrained("b", ConstraintKind.REGEX, "("), InvalidInput, "constraint", "unclosed"),
            (constrained("c", ConstraintKind.GRAMMAR, "start: x"), InvalidInput, "constraint", "x"),
            (constrained("d", ConstraintKind.REGEX, "a", ignore_eos=True), Unsupported, "ignore_eos", "end"),
            (constrained("e", ConstraintKind.REGEX, "a", min_tokens=50), InvalidInput, "min_tokens", "min_tokens"),
            (constrained("f", ConstraintKind.REGEX, "a", output_ids=[3]), InvalidInput, "constraint", "output"),
        ]
        for request, kind, field, word in cases:
            outcome = await ask(process, request, texts)
            assert isinstance(outcome.error, kind), request.request_id
            assert isinstance(outcome.error, InvalidInput)
            assert outcome.error.field == field
            assert word in str(outcome.error)

    run(body)


def test_a_hostile_constraint_ends_in_time_and_holds_up_nobody() -> None:
    async def body(process: EngineProcess) -> None:
        texts = Texts()
        assert (await ask(process, constrained("warm", ConstraintKind.REGEX, "ab"), texts)).text == "ab"
        # One that is given up while it is compiled: its time counts all the same, and then it is gone.
        given_up = asyncio.create_task(ask(process, constrained("gone", *HOSTILE["many multiplesOf"]), texts))
        await ask(process, make_request("first", list(PROMPT), max_tokens=2), texts)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        outcome = await ask(process, constrained("next", ConstraintKind.REGEX, "ab"), texts)
        assert outcome.text == "ab"
        assert process.stats.grammar_refused == 0
        free = make_request("free", list(PROMPT), max_tokens=20, ignore_eos=True)
        held = mixed()[0]
        slow = constrained("slow", *HOSTILE["many multiplesOf"])
        hostile = asyncio.create_task(ask(process, slow, texts))
        plain = await ask(process, free, texts)
        assert not hostile.done(), "a free output does not wait for what is compiled"
        assert len(plain.ids) == 20
        kept, outcome = await asyncio.gather(ask(process, held, texts), hostile)
        assert verdict(PERSON, kept) == "valid"
        assert isinstance(outcome.error, InvalidInput)
        assert "took too long" in str(outcome.error)
        assert process.stats.grammar_restarts == 2

    run(body, GrammarSettings(compile_s=6.0, step_s=6.0))
