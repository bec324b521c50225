"""The index of the block store: bytes and time a key, at 1, 10 and 100 million keys, beside a dictionary.

Keys are drawn from the seed, a million at a time, and forgotten except for a sample; the table grows through all sizes
and is measured at each. Times are wall time on one core, the median of five rounds, in nanoseconds a key. The
dictionary (bytes to int) is measured up to 10 million keys; beyond, its bytes follow from how CPython sizes it, and no
time is given. Its lookups of many keys are a list comprehension.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.bench import meters
from isthmus.contracts.errors import StoreCorrupt
from isthmus.contracts.keys import KEY_BYTES
from isthmus.state.kv.index.table import FingerprintTable

SIZES = (1_000_000, 10_000_000, 100_000_000)
LEAST_KEYS, MOST_KEYS = 10_000, 1_000_000_000
BATCHES = (1, 64, 4096)
DICT_MOST = 10_000_000
_PIECE = 1_000_000
_ROUNDS = 5
_SAMPLE = 200_000
_NEW = 100_000
_ASKED = {1: 10_000, 64: 64_000, 4096: 196_608}
_ALIGNED = 16
Keys = NDArray[np.uint8]
Say = Callable[[str], None]


def sizes(keys: int) -> list[int]:
    """At how many keys to measure."""
    return [size for size in SIZES if size < keys] + [keys]


def drawn(seed: int, stream: int, count: int) -> Keys:
    """`count` keys; each stream of a seed has others."""
    data = np.random.default_rng([seed, stream]).bytes(count * KEY_BYTES)
    return np.frombuffer(data, np.uint8).reshape(count, KEY_BYTES)


def measure(keys: int, seed: int, say: Say) -> dict[str, Any]:
    """Table and dictionary at every size up to `keys`."""
    found: dict[str, Any] = {"table": {}, "dict": {}}
    for size in sizes(keys):
        if size <= DICT_MOST:
            say(f"dict, {size} keys")
            found["dict"][size] = _dict(size, seed)
        else:
            found["dict"][size] = {"bytes_per_key": round(dict_bytes(size) / size, 1), "extrapolated": True}
    grown = _Grown(seed)
    for size in sizes(keys):
        say(f"table, {size} keys")
        found["table"][size] = grown.to(size, say)
    return found


class _Grown:
    """A table that grows from size to size."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._resident = meters.memory_bytes([os.getpid()])
        self._table = FingerprintTable()
        self._sample: list[Keys] = []
        self._worst = 0.0
        self._stream = 0

    def to(self, size: int, say: Say) -> dict[str, Any]:
        """Grow to `size` keys, and the figures there."""
        table, spent, before = self._table, 0.0, len(self._table)
        while (have := len(table)) < size:
            count = min(_PIECE, size - have)
            keys = self._next(count)
            started = time.perf_counter()
            table.put(keys, np.arange(have, have + count, dtype=np.uint64))
            spent += time.perf_counter() - started
            self._worst = max(self._worst, table.memory_bytes / len(table))
            self._sample.append(keys[: max(100, _SAMPLE * count // size)].copy())
            if (have // _PIECE + 1) % 20 == 0:
                say(f"  {len(table)} put")
        resident = meters.memory_bytes([os.getpid()]) - self._resident - sum(keys.nbytes for keys in self._sample)
        figures: dict[str, Any] = {
            "bytes_per_key": round(table.memory_bytes / size, 2),
            "worst_bytes_per_key_until_here": round(self._worst, 2),
            "resident_bytes_per_key": round(resident / size, 2),
            "put_ns": {"1000000": round(spent / (size - before) * 1e9)},
        }
        figures |= self._found()
        figures |= self._changed(figures["put_ns"])
        return figures

    def _next(self, count: int) -> Keys:
        self._stream += 1
        return drawn(self._seed, self._stream, count)

    def _found(self) -> dict[str, Any]:
        table = self._table
        hits = np.concatenate(self._sample)
        hits = np.random.default_rng(self._seed).permutation(hits)[:_SAMPLE]
        misses = self._next(_SAMPLE)
        figures: dict[str, Any] = {"find_hit_ns": {}, "find_miss_ns": {}}
        for name, keys in (("find_hit_ns", hits), ("find_miss_ns", misses)):
            one_by_one = [row.tobytes() for row in keys[: _ASKED[1]]]
            figures[name]["get"] = _each(one_by_one, lambda part: [table.get(key) for key in part])
            for batch in BATCHES:
                figures[name][str(batch)] = _batches(keys, batch, table.find)
        figures["false_positives"] = int((table.find(misses) >= 0).sum())
        figures["false_positives_of"] = len(misses)
        if bool((table.find(hits) < 0).any()):
            raise StoreCorrupt("a key that was put is not found")
        return figures

    def _changed(self, put_ns: dict[str, int]) -> dict[str, Any]:
        """New keys one by one and in batches, put and removed again."""
        table, first = self._table, len(self._table)
        remove_ns: dict[str, int] = {}
        places = np.arange(first, first + _NEW, dtype=np.uint64)
        for batch in BATCHES[1:]:
            keys = self._next(_NEW)
            starts = range(0, len(keys) - batch + 1, batch)
            count = len(starts) * batch
            started = time.perf_counter()
            for start in starts:
                table.put(keys[start : start + batch], places[start : start + batch])
            middle = time.perf_counter()
            for start in starts:
                table.remove(keys[start : start + batch], places[start : start + batch])
            put_ns[str(batch)] = round((middle - started) / count * 1e9)
            remove_ns[str(batch)] = round((time.perf_counter() - middle) / count * 1e9)
        singles = [row.tobytes() for row in self._next(_NEW)]
        half = _NEW // 2
        started = time.perf_counter()
        for at in range(half):
            table.add(singles[at], first + at)
        put_ns["1"] = round((time.perf_counter() - started) / half * 1e9)
        wall, cpu = np.empty(_NEW - half), np.empty(_NEW - half)
        for at in range(half, _NEW):
            started, used = time.perf_counter(), time.thread_time()
            table.add(singles[at], first + at)
            wall[at - half], cpu[at - half] = time.perf_counter() - started, time.thread_time() - used
        started = time.perf_counter()
        for at, key in enumerate(singles):
            table.discard(key, first + at)
        remove_ns["1"] = round((time.perf_counter() - started) / _NEW * 1e9)
        longest = {"longest": wall.max(), "longest_cpu": cpu.max(), "p99.9": np.percentile(wall, 99.9)}
        return {"remove_ns": remove_ns, "put_single_ms": {name: round(s * 1e3, 3) for name, s in longest.items()}}


def _each(keys: list[bytes], ask: Callable[[list[bytes]], object]) -> int:
    """Nanoseconds a key when `ask` goes through a list of them: the median of the rounds."""
    rounds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        ask(keys)
        rounds.append(time.perf_counter() - started)
    return round(statistics.median(rounds) / len(keys) * 1e9)


def _batches(keys: Keys, batch: int, ask: Callable[[Keys], object]) -> int:
    """Nanoseconds a key when `ask` gets batches of them: the median of the rounds."""
    parts = [keys[start : start + batch] for start in range(0, min(len(keys), _ASKED[batch]) - batch + 1, batch)]
    rounds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for part in parts:
            ask(part)
        rounds.append(time.perf_counter() - started)
    return round(statistics.median(rounds) / (len(parts) * batch) * 1e9)


def _dict(size: int, seed: int) -> dict[str, Any]:
    """The same for a dictionary of `size` keys."""
    table: dict[bytes, int] = {}
    spent, sample, stream = 0.0, list[bytes](), 0
    while len(table) < size:
        stream += 1
        have, count = len(table), min(_PIECE, size - len(table))
        rows = [row.tobytes() for row in drawn(seed, stream, count)]
        sample += rows[: max(100, _SAMPLE * count // size)]
        started = time.perf_counter()
        table.update(zip(rows, range(have, have + count), strict=True))
        spent += time.perf_counter() - started
    hits = [sample[at] for at in np.random.default_rng(seed).permutation(len(sample)).tolist()]
    # A lookup gets a key of its own, as one that comes from outside is: not the object that the dictionary holds.
    hits = [bytes(memoryview(key)) for key in hits]
    misses = [row.tobytes() for row in drawn(seed, stream + 1, len(hits))]
    figures: dict[str, Any] = {
        "bytes_per_key": round(dict_bytes(size, table) / size, 1),
        "find_hit_ns": _dict_found(table, hits),
        "find_miss_ns": _dict_found(table, misses),
    }
    new = [row.tobytes() for row in drawn(seed, stream + 2, _NEW)]
    started = time.perf_counter()
    for at in range(_NEW):
        table[new[at]] = size + at
    middle = time.perf_counter()
    for key in new:
        del table[key]
    figures["put_ns"] = {"1000000": round(spent / size * 1e9), "1": round((middle - started) / _NEW * 1e9)}
    figures["remove_ns"] = {"1": round((time.perf_counter() - middle) / _NEW * 1e9)}
    return figures


def _dict_found(table: dict[bytes, int], keys: list[bytes]) -> dict[str, int]:
    def ask(part: Sequence[bytes]) -> list[int]:
        return [table.get(key, -1) for key in part]

    figures = {}
    for batch in BATCHES:
        count = min(len(keys), _ASKED[batch])
        parts = [keys[start : start + batch] for start in range(0, count - batch + 1, batch)]
        figures[str(batch)] = round(_each(keys[:count], lambda _, parts=parts: [ask(part) for part in parts]))  # type: ignore[misc]
    return figures


def dict_bytes(size: int, table: dict[bytes, int] | None = None) -> int:
    """Bytes of a dictionary of `size` keys, objects included, as CPython's allocator rounds them up.

    Without one at hand, by the rules of Objects/dictobject.c: two thirds of 2**n entries of 24 bytes are usable, and
    there are 2**n indices of 4 bytes.
    """
    objects = sum(-(-sys.getsizeof(held) // _ALIGNED) * _ALIGNED for held in (bytes(KEY_BYTES), 1 << 29))
    if table is not None:
        return sys.getsizeof(table) + size * objects
    slots = 8
    while slots * 2 // 3 < size:
        slots *= 2
    return slots * 4 + slots * 2 // 3 * 24 + size * objects
