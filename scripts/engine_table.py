"""The README's table of engines, from benchmarks/results/engine*.json: `python -m scripts.engine_table` prints it.

Figures are of the machine measured last; of the other one, only how ours compares.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LAST, OTHER = RESULTS / "engine-avx2.json", RESULTS / "engine-amx.json"
OURS = "isthmus"


def lines(last: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Markdown: a row a workload, with the best run of each engine and the median of the rounds' ratios, ours over
    theirs, on both machines.
    """
    engines, others = last["results"]["engines"], other["results"]["engines"]
    peers = [name for name in engines if name != OURS]
    heads = [*engines, *(f"over {name}" for name in peers), *(f"AMX: over {name}" for name in peers)]
    found = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name in engines[OURS]["runs"]:
        best = [f"{max(run['tokens_per_s'] for run in each['runs'][name]):.0f}" for each in engines.values()]
        found.append(_row(f"{name}, tokens/s", best, _both(engines, others, name, "tokens_per_s")))
    gaps = [f"{1000 * min(run['gap_p99_s'] for run in each['runs']['mixed']):.0f}" for each in engines.values()]
    found.append(_row("mixed, p99 between tokens, ms", gaps, _both(engines, others, "mixed", "gap_p99_s")))
    cpu = [f"{min(run['cpu_s'] for run in each['runs']['mixed']):.0f}" for each in engines.values()]
    found.append(_row("mixed, CPU-seconds", cpu, _both(engines, others, "mixed", "cpu_s")))
    starts = [f"{each['start_s']:.1f}" for each in engines.values()]
    found.append(_row("start, s", starts, [_over(all_, peer) for all_ in (engines, others) for peer in peers]))
    sizes = [max(run["memory_bytes"] for runs in each["runs"].values() for run in runs) for each in engines.values()]
    found.append(_row("most memory, GB", [f"{size / 1e9:.1f}" for size in sizes], [""] * 2 * len(peers)))
    return found


def _row(name: str, figures: list[str], ratios: list[str]) -> str:
    return f"| {' | '.join([name, *figures, *ratios])} |"


def _both(engines: dict[str, Any], others: dict[str, Any], name: str, figure: str) -> list[str]:
    peers = [peer for peer in engines if peer != OURS]
    return [_ratio(all_, peer, name, figure) for all_ in (engines, others) for peer in peers]


def _ratio(engines: dict[str, Any], peer: str, workload: str, figure: str) -> str:
    pairs = zip(engines[OURS]["runs"][workload], engines[peer]["runs"][workload], strict=True)
    return f"{median(ours[figure] / theirs[figure] for ours, theirs in pairs):.2f}"


def _over(engines: dict[str, Any], peer: str) -> str:
    return f"{engines[OURS]['start_s'] / engines[peer]['start_s']:.2f}"


def table() -> str:
    """The table as the README has it."""
    return "\n".join(lines(json.loads(LAST.read_text()), json.loads(OTHER.read_text())))


if __name__ == "__main__":
    print(table())
