"""The README's table of engines, from benchmarks/results/engine.json: `python -m scripts.engine_table` prints it."""

import json
from pathlib import Path
from statistics import median
from typing import Any

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "engine.json"
OURS = "isthmus"


def lines(result: dict[str, Any]) -> list[str]:
    """Markdown: a row a workload, with the best run of each engine and the median of the rounds' ratios."""
    engines: dict[str, Any] = result["results"]["engines"]
    peers = [name for name in engines if name != OURS]
    found = [
        "| | " + " | ".join(engines) + " | " + " | ".join(f"ours over {name}, by round" for name in peers) + " |",
        "|---" * (1 + len(engines) + len(peers)) + "|",
    ]
    for name in engines[OURS]["runs"]:
        best = [f"{max(run['tokens_per_s'] for run in each['runs'][name]):.0f}" for each in engines.values()]
        ratios = [_ratio(engines, peer, name, "tokens_per_s") for peer in peers]
        found.append(f"| {name}, tokens/s | {' | '.join(best)} | {' | '.join(ratios)} |")
    gaps = [f"{1000 * min(run['gap_p99_s'] for run in each['runs']['mixed']):.0f}" for each in engines.values()]
    ratios = [_ratio(engines, peer, "mixed", "gap_p99_s") for peer in peers]
    found.append(f"| mixed, p99 between tokens, ms | {' | '.join(gaps)} | {' | '.join(ratios)} |")
    starts = [f"{each['start_s']:.1f}" for each in engines.values()]
    found.append(f"| start, s | {' | '.join(starts)} |" + " |" * len(peers))
    sizes = [max(run["memory_bytes"] for runs in each["runs"].values() for run in runs) for each in engines.values()]
    found.append(f"| most memory, GB | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |" + " |" * len(peers))
    return found


def _ratio(engines: dict[str, Any], peer: str, workload: str, figure: str) -> str:
    pairs = zip(engines[OURS]["runs"][workload], engines[peer]["runs"][workload], strict=True)
    return f"{median(ours[figure] / theirs[figure] for ours, theirs in pairs):.2f}"


if __name__ == "__main__":
    print("\n".join(lines(json.loads(RESULT.read_text()))))
