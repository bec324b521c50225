"""From the figures of a run of `isthmus bench store` to how far it is from what the machine allows, and from others.

Every ratio is of throughputs of best rounds, and over 1 is better, but for `verified`: seconds with verification over
seconds without.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.bench.disk_limits import SIZES, DiskRate
from isthmus.bench.store import OPERATIONS, Case
from isthmus.bench.store_targets import ARENA, LOG, MEMCPY, RIVALS, STORE, UNVERIFIED

WRITES = {"put": "write", "get": "read"}
BATCHED_BYTES = 1 << 20

Speeds = Mapping[str, Mapping[Case, Mapping[str, dict[str, Any]]]]
"""Figures of each operation of each case of each store."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """`ours` in one case and operation over (or under: `verified`) `other`."""

    kind: str
    ours: str
    other: str
    case: Case
    operation: str
    value: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "case": self.case.label, "value": round(self.value, 4)}


@dataclass(frozen=True, slots=True)
class Goal:
    """What ratios of a kind should be: at least `bound`, or at most when `most`."""

    name: str
    kind: str
    ours: Sequence[str]
    operations: Sequence[str]
    bound: float
    most: bool = False
    batched: bool = False
    least_size: int = 0

    def covers(self, ratio: Ratio) -> bool:
        """Whether the goal is about it."""
        named = ratio.kind == self.kind and ratio.ours in self.ours and ratio.operation in self.operations
        return named and (not self.batched or ratio.case.batch > 1) and ratio.case.size >= self.least_size

    def met(self, value: float) -> bool:
        """Whether a ratio is what it should be."""
        return value <= self.bound if self.most else value >= self.bound


GOALS = (
    Goal("arena get over memcpy", "memcpy", (ARENA,), ("get",), 0.75),
    Goal("log put and get over the disk's best queue depth", "disk", (LOG,), OPERATIONS, 0.9),
    Goal("log put and get in batches over the disk's best queue depth", "disk", (LOG,), OPERATIONS, 0.9, batched=True),
    Goal("log get, one record a call, over the disk at queue depth 1", "depth", (LOG,), ("get",), 0.9),
    Goal("log, seconds verified over unverified", "verified", (LOG,), OPERATIONS, 1.05, most=True),
    Goal(
        "over the best peer, batches of 1 MiB and more",
        "peer",
        tuple(RIVALS),
        OPERATIONS,
        1.0,
        batched=True,
        least_size=BATCHED_BYTES,
    ),
)


def ratios(speeds: Speeds, disk: Sequence[DiskRate]) -> list[Ratio]:
    """Every ratio for which both sides were measured."""
    return [*_to_memcpy(speeds), *_to_disk(speeds, disk), *_verified(speeds), *_to_peers(speeds)]


def _pairs(speeds: Speeds, ours: str, other: str) -> Iterator[tuple[Case, str, float, float]]:
    """Throughput of both, for every case and operation that both have."""
    for case, operations in speeds.get(ours, {}).items():
        for operation, figures in operations.items():
            theirs = speeds.get(other, {}).get(case, {}).get(operation)
            if theirs is not None:
                yield case, operation, figures["gb_per_s"], theirs["gb_per_s"]


def _to_memcpy(speeds: Speeds) -> Iterator[Ratio]:
    for case, operation, mine, theirs in _pairs(speeds, ARENA, MEMCPY):
        yield Ratio("memcpy", ARENA, MEMCPY, case, operation, mine / theirs)


def _to_disk(speeds: Speeds, disk: Sequence[DiskRate]) -> Iterator[Ratio]:
    """Against transfers of the largest size measured that is not over a record's."""
    for ours in (LOG, STORE):
        for case, operations in speeds.get(ours, {}).items():
            size = max((one for one in SIZES if one <= case.size), default=min(SIZES))
            for operation, figures in operations.items():
                rates = [one for one in disk if one.size == size and one.operation == WRITES[operation]]
                kinds = {"disk": rates}
                if case.batch == 1 and operation == "get":  # one transfer after the other is all that it can be
                    kinds["depth"] = [one for one in rates if one.depth == 1]
                for kind, among in kinds.items():
                    if among:
                        best = max(among, key=lambda rate: rate.gb_per_s)
                        name = f"{best.backend} depth {best.depth}"
                        yield Ratio(kind, ours, name, case, operation, figures["gb_per_s"] / best.gb_per_s)


def _verified(speeds: Speeds) -> Iterator[Ratio]:
    for ours in (ARENA, LOG):
        for case, operation, with_digests, without in _pairs(speeds, ours, ours + UNVERIFIED):
            yield Ratio("verified", ours, ours + UNVERIFIED, case, operation, without / with_digests)


def _to_peers(speeds: Speeds) -> Iterator[Ratio]:
    for ours, rivals in RIVALS.items():
        for case, operations in speeds.get(ours, {}).items():
            for operation, figures in operations.items():
                theirs = {
                    name: speeds[name][case][operation]["gb_per_s"] for name in rivals if case in speeds.get(name, {})
                }
                if theirs:
                    best = max(theirs, key=lambda name: theirs[name])
                    yield Ratio("peer", ours, best, case, operation, figures["gb_per_s"] / theirs[best])


def judged(found: Sequence[Ratio]) -> list[dict[str, Any]]:
    """Each goal of which something was measured: how many of its ratios reach it, and the worst of them."""
    results = []
    for goal in GOALS:
        covered = [ratio for ratio in found if goal.covers(ratio)]
        if covered:
            worst = (max if goal.most else min)(covered, key=lambda ratio: ratio.value)
            reached = sum(goal.met(ratio.value) for ratio in covered)
            results.append(
                {
                    "goal": goal.name,
                    "bound": f"{'<=' if goal.most else '>='} {goal.bound}",
                    "reached": reached,
                    "of": len(covered),
                    "worst": worst.as_dict(),
                }
            )
    return results
