"""Exactness: does a request give the same whatever runs beside it?

In `exact` mode the BLAKE3 chain over the float32 logits of every sampled position must equal that of the same request
alone, for greedy and seeded sampling alike. In the default modes tokens may differ only where the reference's two best
log probabilities lie closer together than epsilon, twice the largest difference of a log probability measured on equal
prefixes; divergences are counted and written. `python -m benchmarks.exactness --help`.
"""

import argparse
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs
from rich.progress import track
from tests.support.tiny_models import make_model

from benchmarks.common import Run
from benchmarks.mixes import REQUESTS, Item, Trace, library, random_mix, run_alone, run_mix
from isthmus.config import Settings
from isthmus.contracts.events import Finish
from isthmus.execution.inference.batch import Runner
from isthmus.execution.inference.runner import open_runner
from isthmus.execution.inference.settings import EngineSettings

EMBEDDED = "embedded"
NAMES = (
    EMBEDDED,
    "llama-llama3",
    "qwen3-odd-tied-bias",
    "qwen2-odd-tied-window-upper",
    "mistral",
    "qwen3-moe",
    "qwen3-moe-window",
    "qwen3-next",
    "qwen3-next-dense-odd-tied",
)
LIBRARY = 300
LONGEST = 200
POOL_BLOCKS = 20
STATE_SLOTS = 24


def open_for(folder: Path, dtype: str, *, exact: bool) -> Runner:
    """A runner whose small pools of blocks and state slots make preemptions and evictions likely."""
    probe = EngineSettings(model=str(folder), name="mix", dtype=dtype, exact=exact, kv_bytes=1 << 24)
    runner = open_runner(probe, lambda stage, fraction: None)
    kv_bytes = max(runner.info.block_bytes * POOL_BLOCKS, 1 << 16)
    states = runner.info.states
    slots = STATE_SLOTS * states.state_bytes if states is not None else probe.state_bytes
    runner.close()
    return open_runner(structs.replace(probe, kv_bytes=kv_bytes, state_bytes=slots), lambda stage, fraction: None)


def compare_exact(
    runner: Runner, items: list[Item], mixes: int, rng: random.Random, *, crowded: bool = False
) -> dict[str, Any]:
    """Run mixes in exact mode; every difference is a failure. `crowded`: all at once, so that every mix preempts."""
    references: dict[int, Trace] = {}
    counts = {"mixes": 0, "requests": 0, "tokens": 0, "aborted": 0, "preemptions": 0, "different": 0}
    for _ in track(range(mixes), "exact"):
        mix = random_mix(rng, items)
        if crowded:
            settings = structs.replace(mix.settings, max_running=REQUESTS, max_batch_tokens=2048)
            mix = replace(mix, settings=settings)
        traces, preemptions = run_mix(runner, mix)
        counts["mixes"] += 1
        counts["preemptions"] += preemptions
        for item, trace in zip(mix.items, traces, strict=True):
            if item.serial not in references:
                references[item.serial] = run_alone(runner, item)
            reference = references[item.serial]
            counts["requests"] += 1
            counts["tokens"] += len(trace.tokens)
            aborted = trace.finish is Finish.ABORT
            counts["aborted"] += aborted
            same = trace.tokens == reference.tokens[: len(trace.tokens)]
            if not aborted:
                same = same and trace.digest == reference.digest and trace.digest is not None
            counts["different"] += not same
    return counts


def compare_default(runner: Runner, items: list[Item], mixes: int, rng: random.Random) -> dict[str, Any]:
    """Run mixes in a default mode: measure epsilon on equal prefixes, count divergences and their gaps."""
    references: dict[int, Trace] = {}
    largest, tokens, requests = 0.0, 0, 0
    gaps: list[float] = []
    sampled = 0
    for _ in track(range(mixes), "default"):
        mix = random_mix(rng, items)
        traces, _ = run_mix(runner, mix)
        for item, trace in zip(mix.items, traces, strict=True):
            if item.serial not in references:
                references[item.serial] = run_alone(runner, item)
            reference = references[item.serial]
            requests += 1
            for index, token in enumerate(trace.tokens):
                expected = reference.logprobs[index]
                if token != reference.tokens[index]:
                    if item.sampling.greedy:
                        gaps.append(expected.top[0][1] - expected.top[1][1])
                    else:
                        sampled += 1
                    break
                tokens += 1
                largest = max(largest, abs(trace.logprobs[index].logprob - expected.logprob))
    epsilon = 2 * largest
    return {
        "mixes": mixes,
        "requests": requests,
        "tokens_compared": tokens,
        "epsilon": epsilon,
        "divergences_greedy": len(gaps),
        "divergences_sampled": sampled,
        "largest_gap_at_divergence": max(gaps, default=0.0),
        "divergences_over_epsilon": sum(gap > epsilon for gap in gaps),
    }


def make_folder(name: str, scratch: Path) -> Path:
    """The folder of the embedded model, or of a tiny random one made in `scratch`."""
    if name == EMBEDDED:
        return Settings().model_folder
    folder = scratch / name
    make_model(folder, name)
    return folder


def measure(name: str, folder: Path, options: argparse.Namespace) -> None:
    """All modes of one model; writes benchmarks/results/exactness-<model>.json."""
    settings = {"model": name, "requests_a_mix": REQUESTS, "pool_blocks": POOL_BLOCKS}
    run = Run(f"exactness-{name}", options.seed, settings)
    results: dict[str, Any] = {}
    for mode, dtype, exact in (("exact", "f32", True), ("f32", "f32", False), ("bf16", "bf16", False)):
        rng = random.Random(f"{options.seed}/{name}")
        runner = open_for(folder, dtype, exact=exact)
        items = library(rng, runner.info.vocab_size, LIBRARY, LONGEST)
        compare = compare_exact if exact else compare_default
        results[mode] = compare(runner, items, options.mixes if exact else options.default_mixes, rng)
        runner.close()
        print(name, mode, results[mode])
    run.write(results)
    if results["exact"]["different"] or any(results[mode]["divergences_over_epsilon"] for mode in ("f32", "bf16")):
        sys.exit(f"{name}: the promise does not hold")


def main(arguments: list[str] | None = None) -> None:
    """Run every model that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixes", type=int, default=200, help="mixes a model in exact mode (default 200)")
    parser.add_argument("--default-mixes", type=int, default=20, help="mixes a model in each default mode (default 20)")
    parser.add_argument("--models", nargs="*", default=NAMES, help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            measure(name, make_folder(name, Path(scratch)), options)


if __name__ == "__main__":
    main()
