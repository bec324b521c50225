"""`isthmus bench index` once its arguments are parsed: measures, shows a table."""

import argparse
from pathlib import Path
from typing import Any

from isthmus.bench import index, meters, report
from isthmus.cli.failure import OK, USAGE, CommandFailed
from isthmus.cli.terminal import BOLD, DIM, Screen

LOCK = Path("build/bench-model/.lock")  # what `isthmus bench engine` holds too: one benchmark at a time


def run(arguments: argparse.Namespace) -> int:
    """Measure and report."""
    if not index.LEAST_KEYS <= arguments.keys <= index.MOST_KEYS:
        raise CommandFailed(f"--keys is {index.LEAST_KEYS} to {index.MOST_KEYS}", USAGE)
    screen = Screen()

    def say(text: str) -> None:
        screen.err.write(f"{text}\n")
        screen.err.flush()

    with meters.lock(LOCK):
        head = report.header("index", arguments.seed, {"keys": arguments.keys})
        found = index.measure(arguments.keys, arguments.seed, say)
    for line in lines(found):
        screen.line(line, *([] if line.startswith(" ") else [BOLD]))
    if arguments.json is not None:
        report.write(arguments.json, head, found)
        screen.line(f"wrote {arguments.json}", DIM)
    return OK


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people: a block a size."""
    shown: list[str] = []
    for size, table in found["table"].items():
        other = found["dict"][size]
        guessed = " (extrapolated)" if other.get("extrapolated") else ""
        shown.append(f"{size} keys: {table['bytes_per_key']} bytes each, dict {other['bytes_per_key']}{guessed}")
        for name in ("put_ns", "find_hit_ns", "find_miss_ns", "remove_ns"):
            figures, beside = (
                ", ".join(f"{batch}: {ns}" for batch, ns in side.get(name, {}).items()) for side in (table, other)
            )
            words = f"  {name.removesuffix('_ns'):<9} ns a key by batch  {figures}"
            shown.append(f"{words}; dict  {beside}" if beside else words)
        single = table["put_single_ms"]
        pauses = f"longest single put {single['longest']} ms (CPU {single['longest_cpu']}), p99.9 {single['p99.9']} ms"
        wrong = f"{table['false_positives']} of {table['false_positives_of']}"
        shown.append(f"  {pauses}; found by mistake {wrong}")
    return shown
