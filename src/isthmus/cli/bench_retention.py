"""`isthmus bench retention` once its arguments are parsed: reads the traces, replays them, shows a table."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.bench import meters, report, traces
from isthmus.bench.retention import POLICIES, RECORD_BLOCKS, SIZES, measure
from isthmus.cli.failure import OK, USAGE, CommandFailed
from isthmus.cli.terminal import BOLD, DIM, Screen

_LOCK = Path("build/bench-model/.lock")
"""That of `isthmus bench engine` in its default folder: one benchmark at a time."""
_MOST_SIZES = 32


def run(arguments: argparse.Namespace) -> int:
    """Measure and report."""
    sizes = sorted(set(arguments.size or SIZES))
    if not all(0 < size <= 100 for size in sizes) or len(sizes) > _MOST_SIZES:
        raise CommandFailed(f"--size is over 0 and up to 100 percent, at most {_MOST_SIZES} of them", USAGE)
    if not 1 <= arguments.seeds <= 100 or not 0 <= arguments.record_blocks <= traces.MAX_BLOCKS:
        raise CommandFailed(f"--seeds is 1 to 100, --record-blocks 0 to {traces.MAX_BLOCKS}", USAGE)
    policies = [policy for policy in POLICIES if policy in (arguments.policy or POLICIES)]
    names = [name for name in traces.NAMES if name in (arguments.trace or traces.NAMES)]
    records = {name: arguments.record_blocks or RECORD_BLOCKS[name] for name in names}
    screen = Screen()

    def say(text: str) -> None:
        screen.err.write(f"{text}\n")
        screen.err.flush()

    settings = {"policies": policies, "sizes_percent": sizes, "seeds": arguments.seeds, "record_blocks": records}
    found: dict[str, Any] = {}
    with meters.lock(_LOCK):
        head = report.header("retention", 0, {**settings, "hints": "off", "warm_up": "none"})
        for name in names:
            say(f"reading {name}")
            workload = traces.cut(traces.read(name, arguments.traces), records[name])
            found[name] = measure(workload, policies, sizes, arguments.seeds, say)
    for name, figures in found.items():
        for line in lines(name, figures):
            screen.line(line, *([] if line.startswith(" ") else [BOLD]))
    if arguments.json is not None:
        report.write(arguments.json, head, {"traces": found})
        screen.line(f"wrote {arguments.json}", DIM)
    return OK


def lines(name: str, figures: Mapping[str, Any]) -> list[str]:
    """One trace for people: a line a size, a column a policy; with CPU microseconds an access in parentheses."""
    policies: Mapping[str, Mapping[str, Any]] = figures["policies"]
    tokens = figures["block_tokens"]
    top = f"{name}: {figures['requests']:,} requests, {figures['distinct_blocks']:,} blocks of {tokens} tokens"
    found = [f"{top}; everything kept: {figures['unbounded']:.3f} of the tokens hit"]
    found.append("  " + f"{'size':>6}" + "".join(f"{policy:>17}" for policy in policies))
    for size in next(iter(policies.values()), {}):
        row = [(each[size]["hit"], each[size]["cpu_us"]) for each in policies.values()]
        found.append("  " + f"{size + '%':>6}" + "".join(f"{f'{hit:.3f} ({us:.1f} us)':>17}" for hit, us in row))
    return found
