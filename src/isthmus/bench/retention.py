"""What `isthmus bench retention` measures: the prefix-consistent token hit ratio of each policy, beside Belady's.

How a figure is made

- A request hits the longest prefix of its blocks that is present: min(blocks hit x block size, its input tokens). The
ratio is the sum of those over all input tokens, from the first request on an empty cache: no warm-up. What a request
generates is not kept (the traces have no ids for it).
- A cache of s% holds s% of the trace's distinct blocks, every block counted as one.
- A request uses what it hits, then the rest comes in; its own records are held meanwhile. When it alone is larger than
the cache, as much of its beginning is kept as fits.
- Blocks that no request ever has one without the other are cut into records (`traces.cut`, at most `RECORD_BLOCKS`), so
that a long prompt is not thousands of accesses; a record comes and goes whole. Up to 64 blocks of the agentic trace in
a record instead of 8 lower the ratios at 0.2% by .002 and above by less; the tree and the most possible are the same.
- Belady's (Foresight) knows each record's next use. A request uses whole prefixes, so the next use of a record is that
of the subtree on it, and the farthest next use, leaves first, is what goes; what will not be used again before what is
here is not kept at all.
- Sessions without absolute times start uniformly over 4 h, drawn by the seed. No hints are given.
- CPU is this thread's time inside the policy (use, choice of victims, removal, insertion) over all records of all
requests, of the arrival order in which it was least.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.bench.traces import Ids, Workload
from isthmus.state.kv.retention.hints import HintLimits
from isthmus.state.kv.retention.leaf_first import LeafFirst
from isthmus.state.kv.retention.leaves import Leaves
from isthmus.state.kv.retention.order import UNQUEUED, Order, Record
from isthmus.state.kv.retention.policies import NAMES, NO_QUOTAS, make
from isthmus.state.kv.retention.port import Entry, Retention

BELADY = "belady"
POLICIES = (*NAMES, BELADY)
SIZES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0)
RECORD_BLOCKS = {"conversation": 1, "agentic": 64, "synthetic": 1}
"""Most blocks in a record of each trace."""
_TENANT = "all"
_NEVER = 1 << 40


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of one trace through one cache."""

    hit_tokens: int
    tokens: int
    accesses: int
    cpu_s: float

    @property
    def ratio(self) -> float:
        """Tokens hit over tokens asked for."""
        return self.hit_tokens / self.tokens

    @property
    def cpu_us(self) -> float:
        """CPU microseconds an access."""
        return self.cpu_s * 1e6 / self.accesses


class Foresight:
    """Belady's order: implements `Order` over records whose next uses are told before each request."""

    def __init__(self, _records: Mapping[int, Record[int]], serials: Iterator[int]) -> None:
        self._leaves: Leaves[int] = Leaves(serials)
        self._next: dict[int, int] = {}

    def expect(self, next_uses: dict[int, int]) -> None:
        """A request comes: when each of its records is used next after it."""
        self._next = next_uses

    def admit(self, record: Record[int]) -> None:
        """See `Order`."""
        if not record.rank:
            record.rank = -self._next[record.key]

    def used(self, records: Sequence[Record[int]], now: float) -> None:
        """See `Order`. A use moves a leaf to the front, not to the back, so its place is renewed at once."""
        for record in records:
            record.rank = -self._next[record.key]
            record.used = now
            if record.place > UNQUEUED:
                record.place = UNQUEUED
                if not record.children:
                    self.offer(record)

    def offer(self, record: Record[int]) -> None:
        """See `Order`."""
        self._leaves.push(record, record.rank)

    def take(self, tenant: Hashable | None) -> Record[int] | None:
        """See `Order`."""
        found = self._leaves.pop(tenant)
        return None if found is None else found[1]

    def renew(self, record: Record[int]) -> None:
        """See `Order`. Nothing is held when victims are asked for."""

    def leave(self, record: Record[int], evicted: bool) -> None:
        """See `Order`. Nothing is remembered."""

    def check(self, records: Iterable[Record[int]]) -> set[int]:  # noqa: ARG002 - nothing is counted
        """See `Order`."""
        return self._leaves.serials()


def _present(keys: Sequence[int], here: set[int]) -> int:
    """How many of a chain are here: a record that is here has its prefix here."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high + 1) // 2
        if keys[middle - 1] in here:
            low = middle
        else:
            high = middle - 1
    return low


def replay(policy: str, workload: Workload, arrivals: Sequence[tuple[float, int]], capacity: int) -> Replay:
    """Send the requests of `workload` in the order of `arrivals` through a cache of `capacity` blocks."""
    if policy == BELADY:
        return _replay_ahead(workload, arrivals, capacity)
    retention: Retention[int] = make(policy, capacity)
    here: set[int] = set()
    blocks, sizes = workload.blocks, workload.blocks.tolist()
    meter = _Meter(workload)
    for moment, at in arrivals:
        path = workload.paths[at]
        keys: list[int] = path.tolist()
        known = meter.count(at, path, keys, here)
        # As much of its beginning as fits: its own records are held, so room for more cannot be made.
        fits = int(np.searchsorted(np.cumsum(blocks[path]), capacity, side="right"))
        missing = int(blocks[path[known:fits]].sum())
        begin = time.thread_time()
        retention.touch(keys[:known], moment)
        victims = _make_room(retention, retention.used() + missing - capacity, moment, keys)
        _insert(retention, keys[:fits], known, sizes, moment)
        meter.cpu_s += time.thread_time() - begin
        here.difference_update(victims)
        here.update(keys[known:fits])
    return meter.replay()


class _Meter:
    """Adds up what is hit."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._hit_tokens = self._tokens = self._accesses = 0
        self.cpu_s = 0.0

    def count(self, at: int, path: Ids, keys: Sequence[int], here: set[int]) -> int:
        """Request `at` comes. Returns how many of its records are here."""
        known = _present(keys, here)
        tokens = self._workload.trace.requests[at].tokens
        hit = int(self._workload.blocks[path[:known]].sum()) * self._workload.trace.block_tokens
        self._tokens += tokens
        self._hit_tokens += min(hit, tokens)
        self._accesses += len(keys)
        return known

    def replay(self) -> Replay:
        """All that was counted."""
        return Replay(self._hit_tokens, self._tokens, self._accesses, self.cpu_s)


def _make_room(retention: Retention[int], excess: int, now: float, keys: Sequence[int]) -> list[int]:
    if excess <= 0:
        return []
    victims = retention.victims(excess, now, frozenset(keys).__contains__)
    for key in victims:
        retention.remove(key)
    return victims


def _insert(retention: Retention[int], keys: Sequence[int], known: int, sizes: Sequence[int], now: float) -> None:
    """Insert a chain from its `known`-th record on."""
    parent = keys[known - 1] if known else None
    for at in range(known, len(keys)):
        key = keys[at]
        retention.insert(Entry(key, parent, sizes[key], _TENANT), now)
        parent = key


def next_uses(paths: Sequence[Ids], arrivals: Sequence[tuple[float, int]], keys: int) -> list[npt.NDArray[np.int64]]:
    """For each arrival, in order: when each record of its path is used next, as a position in `arrivals`."""
    upcoming = np.full(keys, _NEVER, np.int64)
    found = []
    for position in range(len(arrivals) - 1, -1, -1):
        path = paths[arrivals[position][1]]
        found.append(upcoming[path])
        upcoming[path] = position
    found.reverse()
    return found


def _replay_ahead(workload: Workload, arrivals: Sequence[tuple[float, int]], capacity: int) -> Replay:
    """Belady's: what came in goes at once when all else is wanted sooner."""
    order: list[Foresight] = []

    def make_order(records: Mapping[int, Record[int]], serials: Iterator[int]) -> Order[int]:
        order.append(Foresight(records, serials))
        return order[0]

    retention: LeafFirst[int] = LeafFirst(make_order, NO_QUOTAS, HintLimits(0))
    here: set[int] = set()
    sizes = workload.blocks.tolist()
    meter = _Meter(workload)
    ahead = next_uses(workload.paths, arrivals, len(workload.blocks))
    for (now, at), uses in zip(arrivals, ahead, strict=True):
        path = workload.paths[at]
        keys: list[int] = path.tolist()
        known = meter.count(at, path, keys, here)
        begin = time.thread_time()
        order[0].expect(dict(zip(keys, uses.tolist(), strict=True)))
        retention.touch(keys[:known], now)
        _insert(retention, keys, known, sizes, now)
        here.update(keys)
        victims = _make_room(retention, retention.used() - capacity, now, ())
        meter.cpu_s += time.thread_time() - begin
        here.difference_update(victims)
    return meter.replay()


def unbounded(workload: Workload, arrivals: Sequence[tuple[float, int]]) -> float:
    """The ratio of a cache that keeps everything: the most that any can reach."""
    seen = np.zeros(len(workload.blocks), bool)
    hit_tokens = tokens = 0
    for _, at in arrivals:
        path, wanted = workload.paths[at], workload.trace.requests[at].tokens
        known = seen[path]
        hits = len(path) if bool(known.all()) else int(np.argmin(known))
        hit_tokens += min(int(workload.blocks[path[:hits]].sum()) * workload.trace.block_tokens, wanted)
        tokens += wanted
        seen[path] = True
    return hit_tokens / tokens


def measure(
    workload: Workload, policies: Sequence[str], sizes: Sequence[float], seeds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """All figures of one trace. Its own times are one order of arrival, so there is one run of each then."""
    trace = workload.trace
    runs = [trace.arrivals(seed) for seed in range(seeds if trace.window_s else 1)]
    found: dict[str, Any] = {
        "requests": len(trace.requests),
        "input_tokens": sum(request.tokens for request in trace.requests),
        "distinct_blocks": trace.distinct,
        "block_tokens": trace.block_tokens,
        "record_blocks": workload.most,
        "records": int(np.count_nonzero(workload.blocks)),
        "accesses": sum(len(path) for path in workload.paths),
        "arrival_orders": len(runs),
        "unbounded": round(fmean(unbounded(workload, arrivals) for arrivals in runs), 4),
        "policies": {policy: {} for policy in policies},
    }
    for size in sizes:
        capacity = max(1, round(trace.distinct * size / 100))
        for policy in policies:
            replays = [replay(policy, workload, arrivals, capacity) for arrivals in runs]
            ratios = [round(each.ratio, 4) for each in replays]
            # Noise only ever adds.
            micros = round(min(each.cpu_us for each in replays), 3)
            figures = {"hit": round(fmean(ratios), 4), "hits": ratios, "cpu_us": micros}
            found["policies"][policy][f"{size:g}"] = figures
            say(f"{trace.name} {size:g}%: {policy} {figures['hit']:.3f}, {micros:.2f} us an access")
    return found
