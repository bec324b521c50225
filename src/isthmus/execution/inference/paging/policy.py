"""Paging: which blocks and snapshots are loaded from the store, which are written to it. Pure: the threads that do it
are in pager.py, and tell what came of it by events.

A waiting sequence whose prefix reaches further in the store than on the device is *loading*: it holds a lease on the
device's blocks that are being filled, and is neither in the queue nor running, so that nothing waits for it.

    WAITING ──look──> (answer) ──worth it──> LOADING ──Loaded──> WAITING, its blocks now cached on the device
                         │                      └──early: the last layers arrive while the first compute──> RUNNING
                         └──not there, late, or recomputing is faster: goes on without

Promises
- A block that is being filled is leased by the load until `Loaded`, whatever becomes of its sequence: no thread ever
writes to a block that somebody else got.
- Loaded blocks are named in the prefix tree only when every byte was verified; what failed is recomputed, and counted
with its reason. A sequence tries once for each time that it waits.
- What is written behind is leased until it is written. At most `keep_bytes` are owed; then the newest is dropped,
counted.
- A scope that was forgotten leaves the device with everything that was computed on top of it, as soon as no request
uses it.
"""

import enum
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as View
from dataclasses import dataclass

from isthmus.contracts.blocks import Lifetime, Reason, RecordKind, Tier
from isthmus.contracts.events import ModelInfo, SessionHint
from isthmus.contracts.ids import RequestId
from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.inflight import InflightPrefixes
from isthmus.execution.inference.lease import Lease
from isthmus.execution.inference.paging.breakeven import BreakEven
from isthmus.execution.inference.paging.erased import Owners
from isthmus.execution.inference.paging.jobs import (
    Arrivals,
    Erased,
    Event,
    Found,
    Keep,
    Kept,
    Load,
    Loaded,
    Look,
    Lost,
    Pager,
)
from isthmus.execution.inference.paging.ready import Ready
from isthmus.execution.inference.paging.sessions import Sessions
from isthmus.execution.inference.paging.settings import PagingSettings
from isthmus.execution.inference.pool import BlockPool
from isthmus.execution.inference.recurrent import RecurrentStates
from isthmus.execution.inference.sequence import Sequence
from isthmus.execution.inference.tree import PrefixTree

CHEAPER = "recompute_cheaper"
CANCELLED = "cancelled"
NO_ROOM = "no_room"
ROOM_S = 15.0
"""How long a request waits for room to load in before it goes without: computing needs the room, too, and longer."""
MEASURED_TOKENS = 64
"""Steps of fewer tokens say little about how fast prompts are computed."""


class Verdict(enum.Enum):
    """What a waiting sequence is to do."""

    GO = "go"
    WAIT = "wait"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of a block and of a state snapshot, and tokens of a block."""

    block: int
    state: int
    tokens: int


@dataclass(slots=True)
class _Loading:
    sequence: Sequence
    lease: Lease
    held: int
    """Blocks of the lease that were on the device before."""
    job: Load
    arrivals: Arrivals
    tiers: View[Tier | None]
    depth: int
    """Blocks of the prefix that the state (if any) belongs to."""
    predicted_s: float
    early: bool = False


class Paging:
    """The loads and writes of one engine."""

    def __init__(
        self,
        pager: Pager,
        info: ModelInfo,
        settings: PagingSettings,
        *,
        pool: BlockPool,
        tree: PrefixTree,
        inflight: InflightPrefixes,
        states: RecurrentStates | None,
    ) -> None:
        self._pager, self._settings, self._layers = pager, settings, info.layers
        state_bytes, self._state_digest = 0, b""
        if info.states is not None:
            state_bytes, self._state_digest = info.states.state_bytes, info.states.format_digest
        self._sizes = _Sizes(info.block_bytes, state_bytes, info.block_tokens)
        self._pool, self._tree, self._inflight, self._states = pool, tree, inflight, states
        self.rates = BreakEven()
        self._owners = Owners(tree)
        self._asked: dict[int, tuple[float, Sequence]] = {}
        self._found: dict[int, Found] = {}
        self._whole: set[int] = set()
        """Those that nothing was asked for: the device had it all."""
        self._short: dict[int, tuple[float, Sequence]] = {}
        """Until when those wait that found no room for what they could load."""
        self._loading: dict[int, _Loading] = {}
        self.ready = Ready()
        self._kept: dict[RecordKind, dict[int, int]] = {RecordKind.BLOCK: {}, RecordKind.STATE: {}}
        self._under: dict[int, int] = {}
        """Blocks held for states that are being written, by slot."""
        self._sessions = Sessions(pager)
        self._owed = 0
        self.counts: dict[str, int] = {}

    def count(self, name: str, more: int = 1) -> None:
        """Add to the count called `name`."""
        self.counts[name] = self.counts.get(name, 0) + more

    # ---- loading

    def arrived(self, sequence: Sequence, now: float) -> None:
        """`sequence` waits (again): ask the store for what of it the device does not have."""
        keys = sequence.matchable()
        if self._has(keys, len(self._tree.match(keys))):
            self._whole.add(sequence.serial)
            return
        states = [] if self._states is None else sequence.state_keys(len(keys), self._state_digest)
        self._asked[sequence.serial] = (now + self._settings.look_s, sequence)
        self._pager.look(Look(sequence.serial, keys, states))

    def _has(self, keys: View[BlockKey], here: int) -> bool:
        """Whether the device has all that `keys` name, of which `here` blocks are present."""
        return here == len(keys) and (self._states is None or self._states.deepest(keys, here) == here)

    def next_deadline(self) -> float | None:
        """When the first look-up is late, or the first that found no room goes without."""
        return min((when for waits in (self._asked, self._short) for when, _ in waits.values()), default=None)

    def expire(self, now: float) -> None:
        """Let those go without that have waited too long, for an answer or for room."""
        for when, sequence in list(self._asked.values()):
            if when <= now:
                del self._asked[sequence.serial]
                self._miss(sequence, Reason.LATE)
        for when, sequence in list(self._short.values()):
            if when <= now:
                self._drop(sequence, NO_ROOM)

    def consider(
        self, sequence: Sequence, keys: View[BlockKey], present: View[int], now: float, others: int
    ) -> Verdict:
        """Whether `sequence`, of whose `keys` the blocks `present` are on the device, starts, waits, or loads (then it
        holds its blocks already, and is left to `take`), beside `others` that run.
        """
        if sequence.serial in self._asked:
            return Verdict.WAIT
        found = self._found.get(sequence.serial)
        if found is None and sequence.serial in self._whole and not self._has(keys, len(present)):
            # All was on the device when it came, and left while it waited.
            self._whole.discard(sequence.serial)
            self.arrived(sequence, now)
            return Verdict.WAIT
        if found is None:
            return Verdict.GO
        here = len(present)
        start, depth = (
            (here, self._reach(found, here)) if self._states is None else self._state_reach(found, keys, here)
        )
        if depth <= start:
            self._drop(sequence, found.reason if depth < len(keys) else None)
            return Verdict.GO
        # Whoever found no room goes first: loads that need less would keep it from finding any.
        if (
            len(self._loading) >= self._settings.max_loading
            or next(iter(self._short), sequence.serial) != sequence.serial
        ):
            return Verdict.WAIT
        sizes = self._bytes(found, here, depth)
        queued = sum(one.predicted_s for one in self._loading.values())
        if not self.rates.worth(sizes, (depth - start) * self._sizes.tokens, queued, others):
            self._drop(sequence, CHEAPER)
            return Verdict.GO
        if self._begin(sequence, found, present, depth, self.rates.load_s(sizes)):
            return Verdict.LOAD
        # Who runs or is written ends soon; whoever cannot start at all by then goes the usual way.
        self._short.setdefault(sequence.serial, (now + ROOM_S, sequence))
        return Verdict.WAIT

    def _reach(self, found: Found, here: int) -> int:
        """How far the prefix reaches with what the store has, in blocks."""
        depth = here
        while depth < len(found.tiers) and found.tiers[depth] is not None:
            depth += 1
        return depth

    def _state_reach(self, found: Found, keys: View[BlockKey], here: int) -> tuple[int, int]:
        """From where a hybrid model's sequence would start now, and from where with what the store has: the end of the
        deepest prefix whose state the store has.
        """
        states = self._states
        start = 0 if states is None else states.deepest(keys, here)
        for depth in range(min(self._reach(found, here), len(found.states)), start, -1):
            if found.states[depth - 1] is not None:
                return start, depth
        return start, start

    def _bytes(self, found: Found, here: int, depth: int) -> dict[Tier, int]:
        sizes: dict[Tier, int] = {}
        for tier in found.tiers[here:depth]:
            if tier is not None:
                sizes[tier] = sizes.get(tier, 0) + self._sizes.block
        state = found.states[depth - 1] if self._states is not None and found.states else None
        if state is not None:
            sizes[state] = sizes.get(state, 0) + self._sizes.state
        return sizes

    def _begin(self, sequence: Sequence, found: Found, present: View[int], depth: int, predicted_s: float) -> bool:
        """Start to load. False when there is no room for it."""
        here = min(len(present), depth)
        lease = Lease(self._pool, self._tree, present[:here])
        others = sum(len(one.lease.blocks) for one in self._loading.values()) + self.ready.blocks
        crowded = others and others + depth > self._pool.total * 3 // 4
        if crowded or not lease.grow(depth - here):
            lease.close()
            return False
        state = None
        if self._states is not None:
            slot = self._states.index.take()
            if slot is None:
                lease.close()
                return False
            state = (sequence.state_keys(depth, self._state_digest)[depth - 1], slot)
        keys = sequence.keys(depth)[here:depth]
        job, arrivals = Load(sequence.serial, keys, list(lease.blocks[here:]), state), Arrivals(self._layers)
        self._loading[sequence.serial] = _Loading(
            sequence, lease, here, job, arrivals, found.tiers[here:depth], depth, predicted_s
        )
        self._found.pop(sequence.serial)
        self._short.pop(sequence.serial, None)
        self._inflight.register(sequence.id, keys)
        self._pager.load(job, arrivals)
        return True

    def startable(self, most: int) -> Iterator[tuple[Sequence, Lease, int, Arrivals]]:
        """At most `most` loads whose rest is expected to arrive while the first layers compute: the
        sequence, a lease of its own on all blocks, how many of them were on the device before, and what to wait on.
        """
        for one in self._loading.values():
            arrivals = one.arrivals
            if most < 1:
                return
            if one.early or self._states is not None or one.sequence.doomed is not None or arrivals.failed:
                continue
            rest = one.sequence.length - one.depth * self._sizes.tokens
            if rest < self._settings.early_tokens:
                continue
            compute = self.rates.compute_s(rest)
            left = one.predicted_s * (1 - arrivals.fraction)
            if compute is None or arrivals.fraction == 0 or left > self._settings.early_share * compute:
                continue
            one.early = True
            most -= 1
            self.count("early_starts")
            yield one.sequence, Lease(self._pool, self._tree, one.lease.blocks), one.held, arrivals

    def cancel(self, sequence: Sequence) -> None:
        """`sequence` will not use what is being loaded for it."""
        one = self._loading.get(sequence.serial)
        if one is not None:
            one.arrivals.fail()
            self._pager.cancel(sequence.serial)

    def loads(self, sequence: Sequence) -> bool:
        """Whether something is being loaded for `sequence`."""
        return sequence.serial in self._loading

    def _count_reused(self, sequence: Sequence) -> None:
        """Count where the reused tokens of `sequence`, which ended, came from."""
        reuse = sequence.reuse.told(sequence.cached_tokens or 0)
        for tier in Tier:
            if getattr(reuse, tier.value):
                self.count(f"tokens_{tier.value}", getattr(reuse, tier.value))

    def forget(self, sequence: Sequence) -> None:
        """`sequence` ended, or runs: what was asked for it is not wanted any more."""
        self._asked.pop(sequence.serial, None)
        self._found.pop(sequence.serial, None)
        self._short.pop(sequence.serial, None)
        self._whole.discard(sequence.serial)
        self.ready.drop(sequence.serial)

    # ---- events

    def take(self, events: Iterable[Event]) -> list[tuple[Sequence, list[RequestId]]]:
        """Take what happened, and drop forgotten blocks that were in use before. Returns the sequences whose loads
        ended, to be queued again (or ended, if they are doomed), each with the ids of those that waited for its blocks.
        """
        landed = [one for one in map(self._take, events) if one is not None]
        self._owners.sweep()
        return landed

    def _take(self, event: Event) -> tuple[Sequence, list[RequestId]] | None:
        match event:
            case Found():
                if self._asked.pop(event.serial, None) is not None:
                    self._found[event.serial] = event
            case Loaded():
                return self._landed(event)
            case Kept():
                self._written(event)
            case Erased():
                self._owners.erase(event)
            case Lost():
                self.count("pager_lost")
        return None

    def _landed(self, event: Loaded) -> tuple[Sequence, list[RequestId]] | None:
        one = self._loading.pop(event.serial)
        sequence = one.sequence
        self._measure(one, event)
        woken: list[RequestId] = []
        good = 0
        if not one.early:
            good = self._name(one, event, woken)
        self._place_state(one, event, good)
        if good and sequence.doomed is None:
            self.ready.keep(sequence.serial, Lease(self._pool, self._tree, one.lease.blocks[: one.held + good]))
        one.lease.close()
        if one.early:
            return None
        woken += self._inflight.release(sequence.id)
        return sequence, woken

    def _name(self, one: _Loading, event: Loaded, woken: list[RequestId]) -> int:
        """Name in the tree what arrived, up to the first block that did not. Returns how many."""
        keys = one.sequence.keys(one.depth)
        for index, reason in enumerate(event.reasons):
            if reason is not Reason.HIT:
                return index
            place = one.held + index
            parent = keys[place - 1] if place else None
            one.lease.share(place, self._tree.insert(keys[place], parent, one.lease.blocks[place]))
            self._owners.own(keys[place], one.sequence.owner)
            woken += self._inflight.computed(one.sequence.id, keys[place])
        return len(event.reasons)

    def _place_state(self, one: _Loading, event: Loaded, good: int) -> None:
        if one.job.state is None or self._states is None:
            return
        slot = one.job.state[1]
        index = self._states.index
        complete = event.state is Reason.HIT and one.held + good == one.depth
        if complete and index.get(one.sequence.chain[one.depth - 1]) is None:
            index.insert(one.sequence.chain, one.depth, slot).keep = True
        index.release(slot)

    def _measure(self, one: _Loading, event: Loaded) -> None:
        """Count what came of a load, and learn from it."""
        failed = [reason for reason in event.reasons if reason is not Reason.HIT]
        if event.state is not None and event.state is not Reason.HIT:
            failed.append(event.state)
        for tier, reason in zip(event.tiers, event.reasons, strict=True):
            self.count(f"load_{(tier or Tier.DRAM).value}_{reason.value}")
        if event.state is not None:
            self.count(f"load_state_{event.state.value}")
        if failed:
            one.sequence.reuse.reason = failed[0].value
            return
        tiers = {tier for tier in event.tiers if tier is not None}
        if len(tiers) == 1:
            size = len(event.reasons) * self._sizes.block + (self._sizes.state if one.job.state else 0)
            self.rates.loaded(tiers.pop(), size, event.seconds)
        one.sequence.reuse.load_s += event.seconds
        for tier in event.tiers:
            one.sequence.reuse.add(tier or Tier.DRAM, self._sizes.tokens)

    def _drop(self, sequence: Sequence, reason: Reason | str | None) -> None:
        self._found.pop(sequence.serial, None)
        self._short.pop(sequence.serial, None)
        if reason is not None:
            self._miss(sequence, reason)

    def _miss(self, sequence: Sequence, reason: Reason | str) -> None:
        name = reason.value if isinstance(reason, Reason) else reason
        sequence.reuse.reason = name
        self.count(f"miss_{name}")

    # ---- writing behind

    def filled(self, sequence: Sequence, index: int, block: int) -> None:
        """Block `index` of `sequence` was computed and is named in the tree, carried by `block`: write it behind."""
        key = sequence.chain[index]
        self._owners.own(key, sequence.owner)
        if index < sequence.loaded:
            return  # it came from there
        lifetime = Lifetime.SHARED if self._pool.refs(block) > 1 else Lifetime.SESSION
        parent = sequence.chain[index - 1] if index else None
        if self._hold(RecordKind.BLOCK, self._pool, block, self._sizes.block):
            self._pager.keep(Keep(RecordKind.BLOCK, key, parent, sequence.owner, block, lifetime))

    def ended(self, sequence: Sequence) -> None:
        """`sequence` ended and holds nothing: write the snapshots behind that outlive it, and say what is known about
        its future.
        """
        self.forget(sequence)
        self._count_reused(sequence)
        states = self._states
        count = len(sequence.chain)
        if states is not None and count:
            for snapshot in states.kept(sequence.chain):
                keys = sequence.state_keys(snapshot.blocks, self._state_digest)
                slot, block = snapshot.slot, self._tree.block(snapshot.key)
                if slot is None or block is None:
                    continue
                if self._hold(RecordKind.STATE, states.pool, slot, self._sizes.state):
                    # A present snapshot's block is present: it must not leave while the state is being written.
                    self._pool.retain(block)
                    self._under[slot] = block
                    parent = sequence.chain[snapshot.blocks - 1]
                    key = keys[snapshot.blocks - 1]
                    self._pager.keep(Keep(RecordKind.STATE, key, parent, sequence.owner, slot, Lifetime.SESSION))
        if count:
            more = [] if states is None else sequence.state_keys(count, self._state_digest)
            self._sessions.ended(sequence, [*sequence.chain, *more])

    def hint(self, hint: SessionHint) -> None:
        """Pass on a hint about what a session's last request left."""
        if not self._sessions.hint(hint):
            self.count("hint_unknown_session")

    def _hold(self, kind: RecordKind, pool: BlockPool, place: int, size: int) -> bool:
        kept = self._kept[kind]
        if place in kept:
            return False
        if self._owed + size > self._settings.keep_bytes:
            self.count("keep_dropped")
            return False
        pool.retain(place)
        kept[place] = size
        self._owed += size
        return True

    def _written(self, event: Kept) -> None:
        self._owed -= self._kept[event.kind].pop(event.place)
        self.count(f"keep_{event.reason.value}")
        if event.kind is RecordKind.STATE and self._states is not None:
            self._states.index.release(event.place)
        block = self._under.pop(event.place) if event.kind is RecordKind.STATE else event.place
        if self._pool.release(block):
            self._tree.released([block])

    # ---- what others may see

    def measured(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long: what loading is weighed against."""
        if tokens >= MEASURED_TOKENS:
            self.rates.computed(tokens, seconds)

    def held(self) -> tuple[int, list[int]]:
        """How many leases on blocks this has, and which state slots it holds."""
        leases = sum(len(one.lease.blocks) for one in self._loading.values()) + len(self._kept[RecordKind.BLOCK])
        leases += len(self._under) + self.ready.blocks
        slots = [one.job.state[1] for one in self._loading.values() if one.job.state is not None]
        return leases, slots + list(self._kept[RecordKind.STATE])

    def stats(self) -> dict[str, float]:
        """Counts and gauges, by stable names."""
        lengths = self.rates.lengths(self._sizes.block / self._sizes.tokens)
        even = {f"break_even_tokens_{tier}": tokens for tier, tokens in lengths.items()}
        return {**self.counts, "loading": len(self._loading), "keep_owed_bytes": self._owed, **even}
