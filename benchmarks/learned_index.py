"""Would a learned index find keys in a sorted directory quicker than what needs no model?

A bounded-error piecewise-linear index over sorted 64-bit prefixes of keys (one pass with a shrinking cone: Galakatos et
al., "FITing-Tree", SIGMOD 2019; Ferragina, Vinciguerra, "The PGM-index", PVLDB 13(8), 2020), beside np.searchsorted on
the batch as it comes and on the sorted batch, interpolation search, and a two-level index of every 64th key. All are
numpy, all give exactly what np.searchsorted gives. Bytes are those beside the keys. Run by `python -m benchmarks`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.common import Run

SEED = 1
SIZES = (100, 1_000, 10_000, 100_000, 200_000, 1_000_000, 10_000_000)
BATCHES = (1, 64, 4096)
EPSILONS = (4, 16, 64)
SPACING = 64
GATHERED = 16  # a window up to so wide is read whole: that is quicker than halving it
ASKED = 65_536
ROUNDS = 7


class LearnedIndex:
    """Line segments from key to position, each off by at most `epsilon` positions for the keys it covers."""

    def __init__(self, keys: np.ndarray, epsilon: int) -> None:
        self.keys = keys
        self.epsilon = epsilon
        # Of equal keys the first one counts: that is the one searched for.
        places = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        starts, slopes = fit(keys[places], places, epsilon)
        self.starts = keys[places[starts]]
        self.first = places[starts].astype(np.float64)
        self.last = np.append(self.first[1:], len(keys))
        self.slopes = slopes

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.first.nbytes + self.slopes.nbytes

    def find(self, asked: np.ndarray) -> np.ndarray:
        segment = np.maximum(np.searchsorted(self.starts, asked, "right") - 1, 0)
        # What lies before the first key wraps around; the clip puts it where it belongs or at the other end.
        along = np.where(asked > self.starts[0], asked - self.starts.take(segment), 0)
        guess = self.first.take(segment) + self.slopes.take(segment) * along
        guess = np.minimum(guess, self.last.take(segment)).astype(np.int64)
        return within(self.keys, asked, guess - self.epsilon - 1, 2 * self.epsilon + 3)


def fit(keys: np.ndarray, places: np.ndarray, epsilon: int) -> tuple[list[int], np.ndarray]:
    """Where segments start, and their slopes: as long as one line from the first key is within `epsilon` of all."""
    starts, slopes, start = [], [], 0
    while start < len(keys):
        starts.append(start)
        low, high, at, piece = 0.0, np.inf, start + 1, 4 * epsilon * epsilon
        while at < len(keys):
            along = (keys[at : at + piece] - keys[start]).astype(np.float64)
            up = (places[at : at + piece] - places[start]).astype(np.float64)
            lows = np.maximum(np.maximum.accumulate((up - epsilon) / along), low)
            highs = np.minimum(np.minimum.accumulate((up + epsilon) / along), high)
            broken = np.flatnonzero(lows > highs)
            good = int(broken[0]) if broken.size else len(lows)
            if good:
                low, high = float(lows[good - 1]), float(highs[good - 1])
            at += good
            if broken.size:
                break
        slopes.append((low + high) / 2 if high < np.inf else 0.0)
        start = at
    return starts, np.array(slopes)


def within(keys: np.ndarray, asked: np.ndarray, first: np.ndarray, width: int) -> np.ndarray:
    """np.searchsorted, when the answer is one of `first` to `first + width` (which may pass the ends)."""
    width = min(width, len(keys))
    at = np.clip(first, 0, len(keys) - width)
    if width <= GATHERED:
        return at + (keys.take(at + np.arange(width)[:, None]) < asked).sum(axis=0)
    while width > 1:
        half = width >> 1
        at += (keys.take(at + (half - 1)) < asked) * half
        width -= half
    return at + (keys.take(at) < asked)


class Sorted:
    """np.searchsorted on the batch in order: neighbours share what the search loads."""

    nbytes = 0

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys

    def find(self, asked: np.ndarray) -> np.ndarray:
        order = np.argsort(asked)
        found = np.empty(len(asked), np.int64)
        found[order] = np.searchsorted(self.keys, asked.take(order))
        return found


class LearnedSorted(LearnedIndex):
    """The same, on the batch in order."""

    def find(self, asked: np.ndarray) -> np.ndarray:
        order = np.argsort(asked)
        found = np.empty(len(asked), np.int64)
        found[order] = super().find(asked.take(order))
        return found


class Plain(Sorted):
    """np.searchsorted on the batch as it comes."""

    def find(self, asked: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.keys, asked)


class Interpolation(Sorted):
    """Guess by the line between the ends of what is left, then look on one side; every fourth time by halves."""

    def find(self, asked: np.ndarray) -> np.ndarray:
        keys = self.keys
        low, high = np.zeros(len(asked), np.int64), np.full(len(asked), len(keys))
        left, turn = np.arange(len(asked)), 0
        while left.size:
            turn += 1
            below, above, wanted = low.take(left), high.take(left), asked.take(left)
            middle = (below + above) >> 1
            if turn % 4:
                first, last = keys.take(below), keys.take(above - 1)
                inside = (wanted > first) & (wanted < last)
                share = np.where(inside, wanted - first, 0) / np.maximum(last - first, 1)
                middle = np.where(inside, below + (share * (above - 1 - below)).astype(np.int64), middle)
                middle = np.where(wanted <= first, below, np.where(wanted >= last, above - 1, middle))
            less = keys.take(middle) < wanted
            low[left] = np.where(less, middle + 1, below)
            high[left] = np.where(less, above, middle)
            left = left[low.take(left) < high.take(left)]
        return low


class TwoLevel(Sorted):
    """Every 64th key in an array of its own, then a search within a block."""

    def __init__(self, keys: np.ndarray) -> None:
        super().__init__(keys)
        self.top = keys[::SPACING].copy()
        self.nbytes = self.top.nbytes

    def find(self, asked: np.ndarray) -> np.ndarray:
        block = np.searchsorted(self.top, asked) - 1
        return within(self.keys, asked, block * SPACING, SPACING)


def directory(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted prefixes: `uniform` as of hashes, `skewed` lognormal (sigma 2) as the papers take."""
    if kind == "uniform":
        return np.sort(rng.integers(0, 2**64, size, np.uint64))
    values = rng.lognormal(0, 2, size)
    return np.sort((values / values.max() * 2**63).astype(np.uint64))


def nanoseconds(finds: dict[str, Any], asked: np.ndarray, batch: int) -> dict[str, int]:
    """CPU time a key, in batches of this size: the medians of rounds in which all take turns."""
    count = min(len(asked), {1: 500, 64: 12_800}.get(batch, ASKED))
    parts = [asked[start : start + batch] for start in range(0, count - batch + 1, batch)]
    rounds: dict[str, list[float]] = {name: [] for name in finds}
    for _ in range(ROUNDS):
        for name, index in finds.items():
            started = time.thread_time()
            for part in parts:
                index.find(part)
            rounds[name].append(time.thread_time() - started)
    return {name: round(statistics.median(times) / (len(parts) * batch) * 1e9) for name, times in rounds.items()}


def indexes(keys: np.ndarray) -> dict[str, tuple[Any, float]]:
    """All of them, and the seconds that each took to build."""
    makers: dict[str, Callable[[], Any]] = {
        "searchsorted": lambda: Plain(keys),
        "searchsorted, sorted batch": lambda: Sorted(keys),
        "interpolation": lambda: Interpolation(keys),
        "two levels": lambda: TwoLevel(keys),
    }
    for epsilon in EPSILONS:
        makers[f"learned, epsilon {epsilon}"] = lambda epsilon=epsilon: LearnedIndex(keys, epsilon)
        makers[f"learned, epsilon {epsilon}, sorted batch"] = lambda epsilon=epsilon: LearnedSorted(keys, epsilon)
    found = {}
    for name, make in makers.items():
        started = time.perf_counter()
        index = make()
        found[name] = (index, time.perf_counter() - started)
    return found


def main(_arguments: Sequence[str]) -> None:
    run = Run("learned_index", SEED, {"sizes": SIZES, "batches": BATCHES, "epsilons": EPSILONS, "spacing": SPACING})
    results: dict[str, Any] = {}
    for kind in ("uniform", "skewed"):
        for size in SIZES:
            rng = np.random.default_rng([SEED, size])
            keys = directory(kind, size, rng)
            present = rng.choice(keys, ASKED // 2)
            absent = present + rng.integers(-1000, 1000, len(present)).astype(np.uint64)
            asked = rng.permutation(np.concatenate([present, absent]))
            built = indexes(keys)
            expected = np.searchsorted(keys, asked)
            for name, (index, _) in built.items():
                if not np.array_equal(index.find(asked), expected):
                    raise SystemExit(f"{name} is wrong at {size} {kind} keys")
            found: dict[str, Any] = {
                name: {"bytes": index.nbytes, "build_s": round(seconds, 4)} for name, (index, seconds) in built.items()
            }
            for batch in BATCHES:
                times = nanoseconds({name: index for name, (index, _) in built.items()}, asked, batch)
                for name, ns in times.items():
                    found[name][f"ns_{batch}"] = ns
            results.setdefault(kind, {})[size] = found
            print(f"{kind}, {size} keys")
            for name, figures in found.items():
                print(f"  {name:<33}" + "  ".join(f"{key} {value}" for key, value in figures.items()))
    run.write(results)


if __name__ == "__main__":
    main([])
