"""`isthmus bench restart`: what is left after kill -9, and how long it takes to be there again."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from isthmus.cli.failure import FAILED, OK, USAGE, CommandFailed
from isthmus.cli.terminal import BOLD, DIM, Screen

_MOST_RECORDS = 10_000_000
_MOST_BLOCKS = 100_000


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    restart = kinds.add_parser(
        "restart",
        help="what kill -9 of worker and store leaves, and how long a log takes to open",
        description="Hit ratio after kill -9 of the worker, of the store's daemon and of both, over that before, for\n"
        "blocks older than the durable lag; and the time to open a log of many records that was killed.",
        epilog="Takes about 6 GiB of disk below --folder for a million records, and two minutes.\n\n"
        "examples:\n  isthmus bench restart --json result.json\n"
        "  isthmus bench restart --records 100000 --rounds 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    restart.add_argument("--records", type=int, default=1_000_000, help="of 4 KiB, to recover [%(default)s]")
    restart.add_argument("--blocks", type=int, default=8192, help="of 128 KiB, there before kills [%(default)s]")
    restart.add_argument("--rounds", type=int, default=5, help="of each kind of kill, and recoveries [%(default)s]")
    restart.add_argument("--seed", type=int, default=1, help="seed of records and moments [%(default)s]")
    restart.add_argument("--folder", type=Path, default=Path("build/bench-restart"), help="on the disk [%(default)s]")
    restart.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    restart.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report."""
    from isthmus.bench import meters, report, restart  # numpy comes with them
    from isthmus.bench.client import BadAnswer
    from isthmus.cli.bench_index import LOCK

    plan = restart.Plan(
        arguments.folder.absolute(),
        arguments.seed,
        blocks=arguments.blocks,
        records=arguments.records,
        rounds=arguments.rounds,
        recoveries=arguments.rounds,
    )
    _check(arguments)
    screen = Screen()

    def say(text: str) -> None:
        screen.err.write(f"{text}\n")
        screen.err.flush()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    needed, free = max(plan.kills_disk, plan.recovery_disk), shutil.disk_usage(arguments.folder).free
    if free < needed:
        raise CommandFailed(f"{arguments.folder} has {free >> 20} MiB free, {needed >> 20} are needed")
    with meters.lock(LOCK):
        settings = {"records": plan.records, "blocks": plan.blocks, "rounds": plan.rounds}
        head = report.header("restart", plan.seed, {**settings, "block_bytes": plan.chunks * plan.chunk_bytes})
        try:
            found = {"kills": restart.kills(plan, say), "recovery": restart.recovery(plan, say)}
        except BadAnswer as error:
            raise CommandFailed(str(error), FAILED) from error
    for line in lines(found):
        screen.line(line, *([] if line.startswith(" ") else [BOLD]))
    if arguments.json is not None:
        report.write(arguments.json, head, found)
        screen.line(f"wrote {arguments.json}", DIM)
    return OK if all(kind["held"] and not kind["wrong"] for kind in found["kills"].values()) else FAILED


def _check(arguments: argparse.Namespace) -> None:
    """Raise `CommandFailed` for what cannot be measured."""
    limits = {"records": (1000, _MOST_RECORDS), "blocks": (64, _MOST_BLOCKS), "rounds": (1, 100)}
    for name, (low, high) in limits.items():
        if not low <= getattr(arguments, name) <= high:
            raise CommandFailed(f"--{name} is {low} to {high}", USAGE)


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    shown: list[str] = []
    for kind, one in found["kills"].items():
        shown.append(f"kill -9 of {kind}: {100 * one['after_over_before']:.3f}% of the hits before are left")
        words = f"  {one['kills']} kills, {one['asked']} blocks older than the lag ({one['longest_lag_s']} s at most)"
        shown.append(f"{words}, {one['wrong']} wrong; of {one['young']} younger ones {one['young_hits']} hit")
        again = (
            f"  served again after {one['served_again_s']['median']:.2f} s (most {one['served_again_s']['most']:.2f})"
        )
        ready = one["daemon_ready_s"]
        shown.append(again + (f"; the daemon took {ready['median']:.2f} s to start" if ready else ""))
    one = found["recovery"]
    million = f"{one['seconds_a_million']:.2f} s a million records of {one['record_bytes']} bytes"
    shown.append(f"recovery after kill -9: {million}")
    shown.append(
        f"  {one['records']:.0f} records in {one['seconds']:.2f} s, {one['cpu_s']:.2f} s of CPU; "
        f"{one['read_bytes'] / 1e6:.0f} MB read, {one['segments_scanned']:.0f} segments scanned"
    )
    disk = one["disk_read"]
    shown.append(
        f"  the disk alone reads that in {one['reading_alone_s']:.2f} s ({disk['gb_per_s']:.2f} GB/s, {disk['how']}); "
        f"the daemon served after {one['daemon_ready_s']:.2f} s, with an empty log {one['empty_daemon_ready_s']:.2f} s"
    )
    shown.append(f"  read back afterwards: {one['sampled_hits']} of {one['sampled']}, {one['wrong']} wrong")
    return shown
