"""`isthmus bench store`: the block store beside others, and beside what memory and disk allow."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from isthmus.cli.failure import FAILED, OK, USAGE, CommandFailed
from isthmus.cli.terminal import BOLD, DIM, Screen

PEERS = ("lmcache", "mooncake")
SIZES = (64 << 10, 1 << 20, 4 << 20, 32 << 20)
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}
_LEAST, _MOST = 64 << 10, 512 << 20
_DISK_NEEDED = 6 << 30
_MEMORY_NEEDED = 6 << 30
_USUAL_BYTES = 256 << 20


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    store = kinds.add_parser(
        "store",
        help="the block store: GB/s, latency and CPU, beside other stores and the machine's limits",
        description=__doc__,
        epilog="Takes at most 6 GiB of disk below --folder and 6 GiB of memory. Peers live in environments of their\n"
        "own: benchmarks/peers/make.sh lmcache makes one.\n\n"
        "examples:\n  isthmus bench store --json result.json --peer lmcache --peer mooncake\n"
        "  isthmus bench store --size 1MiB --rounds 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = "64KiB, 1MiB, 4MiB, 32MiB"
    store.add_argument("--size", action="append", type=_size, help=f"of a record; again for more [{sizes}]")
    store.add_argument("--peer", action="append", default=[], choices=PEERS, help="measure it too; again for more")
    store.add_argument("--peers-dir", type=Path, default=Path("build/peers"), help="their environments [%(default)s]")
    store.add_argument("--rounds", type=int, default=3, help="rounds that count [%(default)s]")
    store.add_argument("--minutes", type=float, default=12.0, help="begin no round after so many [%(default)s]")
    store.add_argument("--bytes", type=_size, default=256 << 20, help="of a case's records, at most [256MiB]")
    store.add_argument("--seed", type=int, default=1, help="seed of the keys [%(default)s]")
    store.add_argument("--kind", action="append", help="of ours, only this; again for more [all]")
    store.add_argument("--folder", type=Path, default=Path("build/bench-store"), help="on the disk [%(default)s]")
    store.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    store.set_defaults(run=run)


def _size(text: str) -> int:
    """A size as `64KiB` or `1MiB`. Raises `ArgumentTypeError`."""
    number, unit = text[:-3], text[-3:]
    size = int(number) * _UNITS.get(unit, 0) if number.isdecimal() else 0
    if not _LEAST <= size <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no size from 64KiB to 512MiB (KiB, MiB)")
    return size


def run(arguments: argparse.Namespace) -> int:
    """Measure and report."""
    from isthmus.bench import meters, report, store, store_records, store_report, store_targets  # numpy comes with them
    from isthmus.bench.client import BadAnswer
    from isthmus.cli.bench_index import LOCK

    kinds = arguments.kind or store_targets.OURS
    sizes = arguments.size or SIZES
    total = max(arguments.bytes, *sizes)
    plan = store.Plan(
        store.cases(sizes, total), arguments.rounds, arguments.seed, arguments.minutes * 60, arguments.folder
    )
    screen = Screen()

    def say(text: str) -> None:
        screen.err.write(f"{text}\n")
        screen.err.flush()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    _check(arguments, kinds, store_targets.OURS)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as work, meters.lock(LOCK):
        memory = store_records.create_memory(total)
        path = f"/proc/{os.getpid()}/fd/{memory}"
        places = store_targets.Places(arguments.folder, Path(work), path, total, arguments.peers_dir)
        targets = store_targets.make_targets(kinds, arguments.peer, places)
        settings = {"cases": [case.label for case in plan.cases], "bytes": total, "rounds": plan.rounds}
        head = report.header("store", plan.seed, {**settings, "peers": arguments.peer, "kinds": list(kinds)})
        try:
            found = store.measure(targets, plan, say)
        except BadAnswer as error:
            raise CommandFailed(str(error), FAILED) from error
        finally:
            os.close(memory)
            store.remove_files(arguments.folder, [target.name for target in targets])
    speeds = store_report.speeds_of(found)
    for line in store_report.lines(found, speeds):
        screen.line(line, *([] if line.startswith(" ") else [BOLD]))
    if arguments.json is not None:
        report.write(arguments.json, head, store_report.results(found, speeds))
        screen.line(f"wrote {arguments.json}", DIM)
    return OK


def _check(arguments: argparse.Namespace, kinds: Sequence[str], known: Sequence[str]) -> None:
    """Raise `CommandFailed` for what cannot be measured, before anything is started."""
    from isthmus.state.kv.arena.limits import available_memory  # numpy comes with it

    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise CommandFailed(f"--kind is one of {', '.join(known)}, not {unknown[0]}", USAGE)
    if not 1 <= arguments.rounds <= 100 or not 0 < arguments.minutes <= 600:
        raise CommandFailed("--rounds is 1 to 100, --minutes up to 600", USAGE)
    for peer in arguments.peer:
        if not (arguments.peers_dir / peer / "bin" / "python").exists():
            raise CommandFailed(f"{peer} has no environment; make it: sh benchmarks/peers/make.sh {peer}", USAGE)
    free = shutil.disk_usage(arguments.folder).free
    if free < _DISK_NEEDED:
        raise CommandFailed(f"{arguments.folder} has {free >> 20} MiB free, {_DISK_NEEDED >> 20} are needed")
    available, limit = available_memory()
    if available < _MEMORY_NEEDED:
        raise CommandFailed(f"{limit} leaves {available >> 20} MiB of memory, {_MEMORY_NEEDED >> 20} are needed")
