"""The result of a run of `isthmus bench store`, for JSON and for a terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from isthmus.bench.disk_limits import DiskRate
from isthmus.bench.store import OPERATIONS, Case, Found, best_disk, figures
from isthmus.bench.store_ratios import Ratio, Speeds, judged, ratios

_NAMES = {
    "memcpy": "of memcpy",
    "disk": "of the disk",
    "depth": "of the disk at depth 1",
    "verified": "of the time unverified",
    "peer": "of the best peer",
}


def speeds_of(found: Found) -> Speeds:
    """The figures of everything that was measured."""
    return {
        name: {
            case: {operation: figures(case, answers, operation) for operation in OPERATIONS}
            for case, answers in runs.answers.items()
        }
        for name, runs in found.stores.items()
    }


def results(found: Found, speeds: Speeds) -> dict[str, Any]:
    """Everything, for JSON."""
    disk = best_disk(found.disk)
    compared = ratios(speeds, disk)
    stores = {}
    for name, runs in found.stores.items():
        cases = {
            case.label: {
                **speeds[name][case],
                "records": case.records,
                "other_load": [answer["other_load"] for answer in answers],
            }
            for case, answers in runs.answers.items()
        }
        stores[name] = {"start_s": round(runs.start_s, 2), "discarded": runs.discarded, "cases": cases}
    return {
        "rounds": found.rounds,
        "memory_bytes": found.memory_bytes,
        "file_bytes": found.file_bytes,
        "disk": [asdict(rate) for rate in disk],
        "disk_other_load": found.disk_load,
        "stores": stores,
        "ratios": [ratio.as_dict() for ratio in compared],
        "goals": judged(compared),
    }


def lines(found: Found, speeds: Speeds) -> list[str]:
    """For people: the disk, a block a case with a line a store, and what ratios there should be."""
    disk = best_disk(found.disk)
    compared = ratios(speeds, disk)
    shown = [*_disk_lines(disk)]
    for case in dict.fromkeys(case for cases in speeds.values() for case in cases):
        shown.append(f"{case.label}  ({case.records} records; GB/s, p50 and p99 of a call in ms, CPU ms/GB)")
        shown += [_store_line(name, cases[case], case, compared) for name, cases in speeds.items() if case in cases]
    shown.append("goals")
    for goal in judged(compared):
        worst = goal["worst"]
        shown.append(
            f"  {goal['goal']}: {goal['bound']} in {goal['reached']} of {goal['of']}; "
            f"worst {worst['value']:.2f} ({worst['ours']} {worst['operation']} {worst['case']} to {worst['other']})"
        )
    return shown


def _store_line(name: str, operations: Any, case: Case, compared: Sequence[Ratio]) -> str:
    parts = [f"  {name:<19}"]
    for operation in OPERATIONS:
        one = operations[operation]
        noisy = "~" if one["noisy"] else " "
        parts.append(
            f"{operation} {one['gb_per_s']:6.2f}{noisy} {one['p50_ms']:8.3f} {one['p99_ms']:8.3f}"
            f" {one['cpu_ms_per_gb']:6.0f}  "
        )
    mine = [ratio for ratio in compared if ratio.ours == name and ratio.case == case and ratio.operation == "get"]
    parts.append(", ".join(f"get {ratio.value:.2f} {_NAMES[ratio.kind]}" for ratio in mine))
    return "".join(parts).rstrip()


def _disk_lines(disk: Sequence[DiskRate]) -> list[str]:
    """The disk at every queue depth, by the backend that is faster there."""
    shown = ["the disk, O_DIRECT at random places (GB/s by queue depth)"] if disk else []
    for operation, size in dict.fromkeys((rate.operation, rate.size) for rate in disk):
        best: dict[int, float] = {}
        for rate in disk:
            if (rate.operation, rate.size) == (operation, size):
                best[rate.depth] = max(best.get(rate.depth, 0.0), rate.gb_per_s)
        speeds = "  ".join(f"{depth}: {speed:.2f}" for depth, speed in sorted(best.items()))
        shown.append(f"  {operation:<6}{size >> 10:6d} KiB  {speeds}")
    return shown
