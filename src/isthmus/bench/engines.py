"""`isthmus bench engine`: the same asks to every engine, in turn, in one run.

Each round makes the asks anew (nothing is in a cache that should not be) and gives them to one engine after another,
in an order that turns from round to round; the others are stopped meanwhile. A run during which other processes kept
more than `MOST_OTHER_LOAD` cores busy is thrown away and repeated, a few times at most.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.bench import model
from isthmus.bench.figures import best, figures
from isthmus.bench.limits import Machine, least_seconds
from isthmus.bench.meters import cpu_seconds, memory_bytes, other_load, read
from isthmus.bench.targets import ServerTarget, Target
from isthmus.bench.workloads import Workload, build

MOST_OTHER_LOAD = 0.3
MOST_TRIES = 5
_SETTLE_S = 0.3
_DIGITS = 5
_BUILD_TIMEOUT_S = 300
_STATE = re.compile(r'^isthmus_compiled_pieces\{[^}]*state="(\w+)"[^}]*\} 1', re.MULTILINE)

Say = Callable[[str], None]


@dataclass(slots=True)
class EngineRuns:
    """What one engine did: seconds to start, and for each workload its runs, thrown away ones apart."""

    start_s: float
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    discarded: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    workloads: Sequence[str]
    rounds: int
    seed: int
    per_s: float


def compile_pieces(ours: Target, say: Say) -> str:
    """Have this engine compile its pieces: it does so beside its first requests, once on a machine. Their state."""
    if not isinstance(ours, ServerTarget):
        return ""
    say("compiling pieces, unless they are there")
    ours.start()
    until = time.monotonic() + _BUILD_TIMEOUT_S
    try:
        while time.monotonic() < until:
            found = _STATE.search(ours.page("/metrics") or "")
            if found is not None and found[1] != "building":
                return found[1]
            time.sleep(1.0)
    finally:
        ours.stop()
    return "building"


def measure(targets: Sequence[Target], plan: Plan, say: Say) -> dict[str, EngineRuns]:
    """Start every target, run the plan, end them. Raises `BadAnswer`."""
    found: dict[str, EngineRuns] = {}
    try:
        for target in targets:
            say(f"starting {target.name}")
            found[target.name] = EngineRuns(target.start())
            _run_once(target, build("B", -1, model.VOCABULARY))
            target.pause()
        for number in range(plan.rounds):
            for name in plan.workloads:
                for place in range(len(targets)):
                    target = targets[(place + number) % len(targets)]
                    say(_measure_one(target, name, number, plan, found[target.name]))
    finally:
        for target in targets:
            target.stop()
    return found


def _measure_one(target: Target, name: str, number: int, plan: Plan, into: EngineRuns) -> str:
    """One run that counts, or the last of several that do not, marked so. What to say of it."""
    for attempt in range(MOST_TRIES):
        seed = (plan.seed * 1000 + number) * MOST_TRIES + attempt
        target.resume()
        try:
            run = _run_once(target, build(name, seed, model.VOCABULARY, per_s=plan.per_s))
        finally:
            target.pause()
        quiet = run["other_load"] <= MOST_OTHER_LOAD
        if quiet or attempt == MOST_TRIES - 1:
            into.runs.setdefault(name, []).append(run if quiet else {**run, "noisy": True})
            break
        into.discarded += 1
    return f"{target.name} {name}: {run['tokens_per_s']:.0f} tokens/s" + ("" if quiet else " (noisy)")


def _run_once(target: Target, workload: Workload) -> dict[str, Any]:
    if workload.prime:
        target.run(workload.prime)
    time.sleep(_SETTLE_S)
    own = [os.getpid(), *target.processes()]
    before, spent, parts = read(own), cpu_seconds(own[1:]), target.profile()
    traces = target.run(workload.asks)
    after = read(own)
    profile = {part: round(seconds - parts.get(part, 0.0), _DIGITS) for part, seconds in target.profile().items()}
    return {
        **figures(traces).as_dict(),
        **({"profile_s": profile} if profile else {}),
        "cpu_s": round(cpu_seconds(own[1:]) - spent, 3),
        "memory_bytes": memory_bytes(own[1:]),
        "other_load": round(other_load(before, after), 3),
    }


def compare(found: dict[str, EngineRuns], ours: str, plan: Plan, machine: Machine) -> dict[str, Any]:
    """For each workload: the best run of each engine, ours over each peer's, and over what the machine allows."""
    table: dict[str, Any] = {}
    for name in plan.workloads:
        runs = {engine: best(each.runs[name]) for engine, each in found.items()}
        workload = build(name, plan.seed, model.VOCABULARY, per_s=plan.per_s)
        least = least_seconds(workload, machine)
        entry: dict[str, Any] = {"best": runs}
        if least is not None:
            entry["roofline_tokens_per_s"] = round(workload.output_tokens / least, _DIGITS)
            entry["of_roofline"] = {
                e: round(r["tokens_per_s"] * least / workload.output_tokens, 4) for e, r in runs.items()
            }
        if ours in runs:
            entry["ratio_to"] = {e: _ratios(runs[ours], run) for e, run in runs.items() if e != ours}
        table[name] = entry
    return table


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs; for times and CPU-seconds under 1 is better, for throughput over 1."""
    names = ("tokens_per_s", "decode_per_s", "ttft_median_s", "ttft_last_s", "gap_p50_s", "gap_p99_s", "cpu_s")
    return {name: round(ours[name] / theirs[name], 4) for name in names if theirs[name]}
