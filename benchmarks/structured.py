"""Structured output (M4): random JSON schemas on the embedded model; what a mask and a constrained token cost.

    python -m benchmarks.structured [--schemas 1000] [--drafts 0]

Every output must keep its schema (judged by `jsonschema`), be refused with a reason, or be cut by max_tokens; else
the exit status is 1. Once as the model goes, which often writes a free string until max_tokens; once with a logit
bias for what ends strings, lists and objects, so that nearly every output comes to its end and can be judged. Then
the same prompts, seeds and lengths run with a constraint that allows nearly anything and without one, for the
overhead a token.
The result is benchmarks/results/structured.json.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import jsonschema
from tests.support.requests import make_request
from tests.support.schemas import random_schema
from tests.support.structured import PROMPT, Texts, ask_all, constrained, engine, verdict

from benchmarks.common import Run
from isthmus.contracts.constraints import ConstraintKind
from isthmus.execution.inference.grammar.settings import GrammarSettings

AT_ONCE = 16
MAX_TOKENS = 96
BRIEF_TOKENS = 384
OVERHEAD_REQUESTS = 32
ANYTHING = r"[\s\S]*"


async def schemas(count: int, drafts: int, seed: int, brief: bool) -> dict[str, Any]:
    """Run `count` random schemas, with `brief` under the bias that ends what is open."""
    brevity: dict[str, Any] = {"logit_bias": Texts().brevity(), "frequency_penalty": 2.0} if brief else {}
    made = [random_schema(seed * 1_000_000 + number) for number in range(count)]
    requests = [
        constrained(
            f"r{number}",
            ConstraintKind.JSON_SCHEMA,
            json.dumps(schema),
            seed=number,
            max_tokens=BRIEF_TOKENS if brief else MAX_TOKENS,
            **brevity,
        )
        for number, schema in enumerate(made)
    ]
    verdicts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    broken: list[int] = []
    async with engine(GrammarSettings(), max_running=AT_ONCE, draft_tokens=drafts) as process:
        start = time.perf_counter()
        outcomes = await ask_all(process, requests, AT_ONCE)
        seconds = time.perf_counter() - start
        stats = process.stats
    for number, (schema, outcome) in enumerate(zip(made, outcomes, strict=True)):
        try:
            verdicts[verdict(schema, outcome)] += 1
        except (AssertionError, ValueError, jsonschema.ValidationError):
            broken.append(number)
        if outcome.error is not None:
            reasons[str(outcome.error).split(":", 1)[-1].strip()[:60]] += 1
    return {
        "schemas": count,
        "validated": verdicts["valid"],
        "truncated_by_max_tokens": verdicts["truncated"],
        "refused": verdicts["refused"],
        "refused_by_reason": dict(reasons.most_common()),
        "broken": broken,
        "output_tokens": stats.output_tokens,
        "seconds": round(seconds, 1),
        "masks": stats.masks_computed,
        "wait_ms_a_mask": round(1000 * stats.mask_wait_s / max(1, stats.masks_computed), 3),
        "grammar_restarts": stats.grammar_restarts,
        "accepted_drafts": stats.accepted_drafts,
        "steps": stats.steps,
    }


async def overhead(at_once: int) -> dict[str, Any]:
    """Milliseconds a token at `at_once` outputs together: without a constraint, and with one that allows anything."""
    found: dict[str, Any] = {"at_once": at_once}
    async with engine(GrammarSettings(), max_running=AT_ONCE) as process:
        await ask_all(process, [constrained("warm", ConstraintKind.REGEX, "ab")])
        for name in ("free", "held"):
            requests = [
                make_request(f"{name}{number}", list(PROMPT), max_tokens=64, seed=number, ignore_eos=True)
                if name == "free"
                else constrained(
                    f"{name}{number}", ConstraintKind.REGEX, ANYTHING, max_tokens=64, min_tokens=64, seed=number
                )
                for number in range(OVERHEAD_REQUESTS)
            ]
            before, start = process.stats, time.perf_counter()
            await ask_all(process, requests, at_once)
            seconds = time.perf_counter() - start
            tokens = process.stats.output_tokens - before.output_tokens
            found[name] = {
                "ms_a_token": round(1000 * seconds / tokens, 3),
                "steps": process.stats.steps - before.steps,
                "tokens": tokens,
            }
    waited = process.stats.mask_wait_s / max(1, process.stats.masks_computed)
    found["wait_ms_a_mask"] = round(1000 * waited, 3)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run both parts and write the result. Exits with 1 when an output breaks its schema."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=1000, help="random schemas (default 1000)")
    parser.add_argument("--drafts", type=int, default=0, help="drafts a step (default 0)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    settings = {"schemas": options.schemas, "drafts": options.drafts, "at_once": AT_ONCE, "max_tokens": MAX_TOKENS}
    run = Run("structured", options.seed, settings)
    results: dict[str, Any] = {}
    for name, brief in (("schemas", False), ("schemas_with_bias_to_end", True)):
        results[name] = asyncio.run(schemas(options.schemas, options.drafts, options.seed, brief))
        run.write(results)
    results["overhead"] = [asyncio.run(overhead(count)) for count in (1, 8)]
    run.write(results)
    print(json.dumps(results, indent=1))
    if any(results[name]["broken"] for name in ("schemas", "schemas_with_bias_to_end")):
        sys.exit("an output broke its schema")


if __name__ == "__main__":
    main()
