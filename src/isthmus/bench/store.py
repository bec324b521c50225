"""`isthmus bench store`: the same records into and out of every store, in turn, in one run.

In each round every store answers every question, in an order that turns; the others are stopped meanwhile, and the
disk is measured once without any store. A record is put from the producer's memory and got into the consumer's, which
are the same memory for all, and what arrived is compared with what was sent. Blocks come back in the order in which
they were put, as those of a prefix do.

An answer during which other processes kept more than `MOST_OTHER_LOAD` cores busy is thrown away and asked for again,
a few times at most; then it is kept and marked. Throughput is that of the best round, for noise only takes away;
latencies are those of all calls of all rounds that count.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.bench.client import BadAnswer
from isthmus.bench.disk_limits import DiskRate, disk_rates
from isthmus.bench.meters import memory_bytes, other_load, read
from isthmus.bench.targets import LinesTarget
from isthmus.config import show_size

MOST_OTHER_LOAD = 0.3
MOST_TRIES = 3
MOST_BATCH = 32
MOST_BATCH_BYTES = 128 << 20
MOST_RECORDS = 1024
OPERATIONS = ("put", "get")
DISK_SECONDS = 0.15
_DISK_LEAST, _DISK_MOST = 64 << 20, 512 << 20
_SETTLE_S = 0.1
_DIGITS = 4
_SECTOR = 512

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """So many records of one size, `batch` of them in a call."""

    size: int
    records: int
    batch: int

    @property
    def label(self) -> str:
        """For people and for JSON."""
        return f"{show_size(self.size)} x{self.batch}"

    @property
    def total(self) -> int:
        """Bytes of all records."""
        return self.size * self.records


def cases(sizes: Sequence[int], total: int) -> list[Case]:
    """One record a call and several, for each size: at most `total` bytes."""
    found: list[Case] = []
    for size in sizes:
        records = max(1, min(total // size, MOST_RECORDS))
        batches = {1, max(1, min(MOST_BATCH, MOST_BATCH_BYTES // size, records))}
        found += [Case(size, records - records % batch, batch) for batch in sorted(batches)]
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. Once `seconds` are over nothing is asked for again and, after the first round, nothing at all.

    `disk_seconds`: of each measurement of the disk without a store.
    """

    cases: Sequence[Case]
    rounds: int
    seed: int
    seconds: float
    folder: Path
    disk_seconds: float = DISK_SECONDS


@dataclass(slots=True)
class StoreRuns:
    """What one store did: seconds to start, its answers to each case, and how many were thrown away."""

    start_s: float
    answers: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)
    discarded: int = 0


@dataclass(slots=True)
class Found:
    """Everything that was measured. `rounds` is how many there were time for; most bytes of memory that all stores
    together took, and of files.
    """

    stores: dict[str, StoreRuns] = field(default_factory=dict)
    disk: list[DiskRate] = field(default_factory=list)
    disk_load: list[float] = field(default_factory=list)
    rounds: int = 0
    memory_bytes: int = 0
    file_bytes: int = 0


def disk_bytes(total: int) -> int:
    """Of the file in which the disk is measured, beside cases of at most `total` bytes."""
    return min(_DISK_MOST, max(_DISK_LEAST, 2 * total))


def measure(targets: Sequence[LinesTarget], plan: Plan, say: Say) -> Found:
    """Start every target, run the plan, end them. Raises `BadAnswer`."""
    found, until = Found(), time.monotonic() + plan.seconds
    try:
        for target in targets:
            say(f"starting {target.name}")
            found.stores[target.name] = StoreRuns(target.start())
            for case in plan.cases:
                _ask(target, case, -1 - plan.seed)
            target.pause()
        for number in range(plan.rounds):
            _round(targets, plan, number, until, found=found, say=say)
    finally:
        for target in targets:
            target.stop()
    return found


def _round(targets: Sequence[LinesTarget], plan: Plan, number: int, until: float, *, found: Found, say: Say) -> None:
    """One round, or the part of it that there is time for."""
    if number and time.monotonic() > until:
        return
    say(f"round {number + 1}: the disk")
    own = [os.getpid()]
    before = read(own)
    total = max(case.total for case in plan.cases)
    found.disk += disk_rates(plan.folder, plan.disk_seconds, disk_bytes(total))
    found.disk_load.append(round(other_load(before, read(own)), _DIGITS))
    for case in plan.cases:
        if number and time.monotonic() > until:
            return
        for place in range(len(targets)):
            target = targets[(place + number) % len(targets)]
            seed = (plan.seed * 1000 + number) * MOST_TRIES
            say(_measure_one(target, case, seed, until, found.stores[target.name]))
    found.rounds += 1
    taken = sum(memory_bytes(target.processes()) for target in targets) + memory_bytes(own)
    found.memory_bytes = max(found.memory_bytes, taken)
    files = sum(path.stat().st_blocks * _SECTOR for path in plan.folder.rglob("*") if path.is_file())
    found.file_bytes = max(found.file_bytes, files + disk_bytes(total))


def _measure_one(target: LinesTarget, case: Case, seed: int, until: float, into: StoreRuns) -> str:
    """An answer that counts, or the last of several that do not, marked so. What to say of it."""
    for attempt in range(MOST_TRIES):
        target.resume()
        try:
            answer = _ask(target, case, seed + attempt)
        finally:
            target.pause()
        quiet = answer["other_load"] <= MOST_OTHER_LOAD
        if quiet or attempt == MOST_TRIES - 1 or time.monotonic() > until:
            into.answers.setdefault(case, []).append(answer if quiet else {**answer, "noisy": True})
            break
        into.discarded += 1
    speeds = ", ".join(f"{name} {case.total / answer[name]['wall_s'] / 1e9:.2f} GB/s" for name in OPERATIONS)
    return f"{target.name} {case.label}: {speeds}" + ("" if quiet else " (noisy)")


def _ask(target: LinesTarget, case: Case, seed: int) -> dict[str, Any]:
    time.sleep(_SETTLE_S)
    own = [os.getpid(), *target.processes()]
    before = read(own)
    answer = target.ask({**asdict(case), "seed": seed})
    load = other_load(before, read(own))
    if not answer.get("intact"):
        raise BadAnswer(f"{target.name} {case.label}: what came back is not what was put")
    return {**answer, "other_load": round(load, 3)}


def figures(case: Case, answers: Sequence[dict[str, Any]], operation: str) -> dict[str, Any]:
    """One operation of one store in one case: GB/s (1e9 bytes) of the best round and of each, milliseconds of a call,
    milliseconds of CPU a GB (median of the rounds). Of rounds marked noisy only when there is no other.
    """
    counted = [answer for answer in answers if not answer.get("noisy")] or list(answers)
    gigabytes = case.total / 1e9
    runs = [answer[operation] for answer in counted]
    speeds = [gigabytes / run["wall_s"] for run in runs]
    calls = np.array([seconds for run in runs for seconds in run["calls_s"]]) * 1e3
    return {
        "gb_per_s": round(max(speeds), _DIGITS),
        "gb_per_s_rounds": [round(speed, _DIGITS) for speed in speeds],
        "p50_ms": round(float(np.percentile(calls, 50)), _DIGITS),
        "p99_ms": round(float(np.percentile(calls, 99)), _DIGITS),
        "calls": len(calls),
        "cpu_ms_per_gb": round(statistics.median(run["cpu_s"] * 1e3 / gigabytes for run in runs), 1),
        "noisy": bool(counted[0].get("noisy")),
    }


def best_disk(rates: Iterable[DiskRate]) -> list[DiskRate]:
    """The best round of each combination."""
    found: dict[tuple[str, str, int, int], DiskRate] = {}
    for rate in rates:
        key = (rate.backend, rate.operation, rate.size, rate.depth)
        if key not in found or found[key].gb_per_s < rate.gb_per_s:
            found[key] = rate
    return list(found.values())


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """What the targets left on the disk."""
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
