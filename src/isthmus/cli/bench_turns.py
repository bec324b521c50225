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
from isthmus.bench.targets import end_when_told
from isthmus.cli.bench_engine import own_server, own_state, peer_server
from isthmus.cli.failure import FAILED, OK, USAGE, CommandFailed
from isthmus.cli.terminal import BOLD, DIM, Screen

OURS, STATELESS = "isthmus", "isthmus-stateless"
MOST_TURNS = 22
POOL_TOKENS = 9536
"""The pool holds the longest conversation, and less than what is asked between two turns."""
_ARENA, _DISK = "64MiB", "6GiB"
_CROWDED, _ROOMY = "128MiB", "1GiB"
_BLOCK_TOKENS = 16


def run(arguments: argparse.Namespace) -> int:
    """Measure and report."""
    if not 2 <= arguments.turns <= MOST_TURNS:
        raise CommandFailed(f"--turns is 2 to {MOST_TURNS}", USAGE)
    end_when_told()
    screen = Screen()

    def say(text: str) -> None:
        screen.err.write(f"{text}\n")
        screen.err.flush()

    plan = replace(turns.TurnsPlan(), turns=arguments.turns, seed=arguments.seed)
    model.make(arguments.folder, 1, lambda _: None)
    threads = len(os.sched_getaffinity(0))
    head_settings = {
        "plan": asdict(plan),
        "pool": _pool(arguments.dtype),
        "arena": _ARENA,
        "disk": _DISK,
        "dtype": arguments.dtype,
    }
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
    block = _block_bytes(arguments.dtype)
    limits, store = ["--kv-memory", _pool(arguments.dtype)], ["--store-memory", _ARENA, "--store-disk", _DISK]
    for name, flags in ((OURS, store), (STATELESS, ["--store", "off"])):
        target = own_server(name, [*limits, *flags, "--store-file", str(work / f"{name}.store")], common, work)
        kept = name == OURS
        memory = turns.StoreMemory(own_state(common, name) / "store" / "store.sock") if kept else turns.NoMemory()
        say(f"starting {name}")
        target.start()
        try:
            run_ = turns.run_turns(target, plan, memory, block, say, every=kept)
        finally:
            target.stop()
        results["turns"][name] = asdict(run_)
        if kept:
            ours, results["not_from_disk"] = turns.times(run_), turns.not_from_disk(run_)
        else:
            results["theirs_over_ours"] = {name: _over(turns.times(run_), ours)}
    if arguments.peer:
        target = peer_server(arguments.peer, arguments.peers_dir, common, work)
        run_ = turns.run_restarted(target, plan, say)
        results["turns"][arguments.peer] = asdict(run_)
        results["theirs_over_ours"][arguments.peer] = _over(turns.times(run_), ours)
    if arguments.paging:
        results |= _paging(turns.PagingPlan(seed=plan.seed), common, store, work, say)
    return results


def _over(theirs: dict[int, float], ours: dict[int, float]) -> dict[int, float]:
    return {turn: round(seconds / ours[turn], 3) for turn, seconds in theirs.items()}


def _pool(dtype: str) -> str:
    return f"{POOL_TOKENS * _block_bytes(dtype) // _BLOCK_TOKENS // 1024}KiB"


def _block_bytes(dtype: str) -> int:
    item = 4 if dtype == "f32" else 2
    return model.read_bytes(_BLOCK_TOKENS, item) - model.read_bytes(0, item)


def _paging(plan: turns.PagingPlan, common: list[str], store: list[str], work: Path, say: turns.Say) -> dict[str, Any]:
    results: dict[str, Any] = {}
    block = _block_bytes(common[-1])
    for name, pool in (("paging", _CROWDED), ("resident", _ROOMY)):
        flags = ["--kv-memory", pool, *store, "--store-file", str(work / f"{name}.store")]
        target = own_server(f"isthmus-{name}", flags, common, work)
        target.start()
        try:
            results[name] = turns.run_paging(target, plan, block, say)
        finally:
            target.stop()
    return results


def lines(results: dict[str, Any]) -> list[str]:
    """The result for people."""
    found = ["time to the first token by turn (ms)"]
    for name, run_ in results["turns"].items():
        shown = {int(number): turn for number, turn in run_["turns"].items()}
        cells = " ".join(f"{number}:{turn['ttft_s'] * 1000:.0f}" for number, turn in sorted(shown.items()))
        found.append(f"  {name:<20}{cells}")
        starts = [turn["start_s"] for turn in shown.values() if turn["start_s"]]
        if starts:
            found.append(f"    restarted before each turn, which took {min(starts):.1f} to {max(starts):.1f} s more")
        last = shown[max(shown)]
        if last["reused_tokens"]:
            mb = {tier: round(bytes_ / 1e6, 1) for tier, bytes_ in last["loaded_bytes"].items()}
            found.append(f"    the last: reused tokens {json.dumps(last['reused_tokens'])}, loaded MB {json.dumps(mb)}")
        even = {
            k.removeprefix("break_even_tokens_"): v for k, v in run_["gauges"].items() if k.startswith("break_even")
        }
        if even:
            found.append(f"    break-even length in tokens: {json.dumps(even)}")
    if results["not_from_disk"]:
        found.append(f"  NOT all from NVMe: turns {results['not_from_disk']}")
    for name, ratios in results["theirs_over_ours"].items():
        cells = " ".join(f"{number}:{ratio:.2f}" for number, ratio in ratios.items())
        found.append(f"  {name} over ours, by turn: {cells}")
    if "paging" not in results:
        return found
    found.append("gaps between the tokens of others while conversations come back")
    for name, where in (("paging", "from the disk"), ("resident", "on the device")):
        for row in results[name]:
            rate, p50, p99 = row["loaded_bytes_per_s"] / 1e6, row["gap_p50_s"] * 1000, row["gap_p99_s"] * 1000
            found.append(
                f"  {where}, {row['returns_per_s']:4.0f}/s  {rate:5.0f} MB/s  p50 {p50:6.1f} ms  p99 {p99:6.1f} ms"
            )
    return found
