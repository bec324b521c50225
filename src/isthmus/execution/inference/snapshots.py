"""State snapshots: the recurrent state of hybrid models at block boundaries, by the BlockKey of the block ending there.

A snapshot lives in a slot. Slots are a second `BlockPool`: a running sequence leases the slot of its live state, a
snapshot is what this index names, and an indexed slot without leases is *cached*. Promises

- a snapshot's block is present in the prefix tree: evicting the block evicts the snapshot (`dropped`);
- a leased snapshot is never evicted, and its slot is never written to;
- eviction takes the snapshot that is expected to save the fewest tokens a byte, where old savings fade.

All slots have one size, so tokens saved a byte is the distance to the next shallower snapshot on the same path: what a
hit would have to recompute without this one. It is weighed by how often the snapshot was hit. Fading is that of
Greedy-Dual with frequency (Cherkasova 1998, for files): a snapshot's worth is its weighed saving plus the worth of the
last one evicted when it was last used. Marconi (arXiv:2411.19379) weighs recency against FLOP saved a byte with a tuned
factor.
"""

import heapq
from collections.abc import Sequence

from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.pool import BlockPool, PoolCorrupt
from isthmus.execution.inference.tree import PrefixTree

CONTINUED = 0.25
MOST_HITS = 8


class Snapshot:
    """The state after the first `blocks` blocks of the chain `keys`. Changed by its index only, but for `claims` and
    `keep`, which say who wants it: running sequences that will replace it, and whether it outlives them.
    """

    __slots__ = ("base", "blocks", "children", "claims", "hits", "keep", "keys", "parent", "slot", "worth")

    def __init__(self, keys: Sequence[BlockKey], blocks: int, slot: int) -> None:
        self.keys = keys
        self.blocks = blocks
        self.slot: int | None = slot
        self.parent: Snapshot | None = None
        self.children: dict[BlockKey, Snapshot] = {}
        self.claims = 0
        self.keep = False
        self.hits = 0
        self.base = 0.0
        self.worth = 0.0

    @property
    def key(self) -> BlockKey:
        """The key of the block that ends here."""
        return self.keys[self.blocks - 1]

    @property
    def saved_blocks(self) -> int:
        """Blocks that a hit need not recompute and would have to without this snapshot."""
        return self.blocks - (0 if self.parent is None else self.parent.blocks)

    @property
    def weight(self) -> float:
        """How likely a hit is, against a new snapshot's: a turn's end that was hit once has most likely been continued,
        and the end of the next turn takes over; one that was hit again and again is a shared prefix.
        """
        if self.hits < 2:
            return CONTINUED if self.hits else 1.0
        return min(self.hits, MOST_HITS) / 2


class SnapshotIndex:
    """The snapshots of a pool of slots."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._by_key: dict[BlockKey, Snapshot] = {}
        self._by_slot: dict[int, Snapshot] = {}
        self._roots: dict[BlockKey, Snapshot] = {}
        self._offers: list[tuple[float, int, Snapshot]] = []
        self._serial = 0
        self._floor = 0.0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: BlockKey) -> Snapshot | None:
        """The snapshot at the end of the block with this key."""
        return self._by_key.get(key)

    def deepest(self, keys: Sequence[BlockKey], blocks: int) -> Snapshot | None:
        """The deepest snapshot within the first `blocks` of the chain `keys`. Costs a look-up a block above it."""
        if self._by_key:
            for index in range(blocks - 1, -1, -1):
                found = self._by_key.get(keys[index])
                if found is not None:
                    return found
        return None

    def take(self) -> int | None:
        """A slot, leased once; evicts a snapshot when none is free. None when every slot is leased."""
        if not self._pool.free:
            victim = self._pop_least()
            if victim is None:
                return None
            self._floor = max(self._floor, victim.worth)
            self.evictions += 1
            self._remove(victim)
        return self._pool.take()

    def insert(self, keys: Sequence[BlockKey], blocks: int, slot: int) -> Snapshot:
        """Name the leased `slot`: the state after the first `blocks` of the chain `keys`, which has none yet. `keys` is
        kept, not copied: it may only grow.
        """
        self._pool.index(slot)
        snapshot = Snapshot(keys, blocks, slot)
        key = snapshot.key
        snapshot.parent = self.deepest(keys, blocks - 1)
        siblings = self._roots if snapshot.parent is None else snapshot.parent.children
        below = [s for s in siblings.values() if s.blocks > blocks and s.keys[blocks - 1] == key]
        self._by_key[key] = self._by_slot[slot] = snapshot
        siblings[key] = snapshot
        for child in below:
            del siblings[child.key]
            snapshot.children[child.key] = child
            child.parent = snapshot
            self._offer(child)
        self._touch(snapshot)
        return snapshot

    def hit(self, snapshot: Snapshot) -> None:
        """A request starts from `snapshot`, whose slot it has leased."""
        snapshot.hits += 1
        self._touch(snapshot)

    def release(self, slot: int) -> None:
        """Give back one lease on `slot`."""
        if self._pool.release(slot):
            self._offer(self._by_slot[slot])

    def disown(self, slot: int) -> None:
        """Forget the snapshot in `slot`, whose one lease keeps the state for itself."""
        snapshot = self._by_slot[slot]
        self._pool.disown(slot)
        self._unlink(snapshot)

    def claim(self, snapshot: Snapshot) -> None:
        """One more sequence that will give `snapshot` up in time."""
        snapshot.claims += 1

    def give_up(self, snapshot: Snapshot) -> None:
        """One claim less. A snapshot that nobody claims, holds, hit or wants kept is dropped."""
        snapshot.claims -= 1
        wanted = snapshot.claims or snapshot.keep or snapshot.hits
        if snapshot.slot is not None and not wanted and self._pool.refs(snapshot.slot) == 0:
            self._remove(snapshot)

    def dropped(self, key: BlockKey) -> None:
        """The block with this key was evicted."""
        snapshot = self._by_key.get(key)
        if snapshot is not None:
            self.evictions += 1
            self._remove(snapshot)

    def _remove(self, snapshot: Snapshot) -> None:
        if snapshot.slot is not None:
            self._pool.unindex(snapshot.slot)
            self._unlink(snapshot)

    def _unlink(self, snapshot: Snapshot) -> None:
        """Take `snapshot` out; those right below it now hang from the one above it, and save more."""
        key, parent = snapshot.key, snapshot.parent
        siblings = self._roots if parent is None else parent.children
        del self._by_key[key], siblings[key]
        if snapshot.slot is not None:
            del self._by_slot[snapshot.slot]
        snapshot.slot = None
        for child in snapshot.children.values():
            child.parent = parent
            siblings[child.key] = child
            self._offer(child)
        snapshot.children = {}

    def _touch(self, snapshot: Snapshot) -> None:
        """`snapshot` is taken or hit now."""
        snapshot.base = self._floor
        self._offer(snapshot)

    def _offer(self, snapshot: Snapshot) -> None:
        """Set the worth of a snapshot and put it up for eviction, unless it is leased. Stale offers are dropped when
        popped, or here when they pile up.
        """
        snapshot.worth = snapshot.base + snapshot.weight * snapshot.saved_blocks
        if snapshot.slot is None or self._pool.refs(snapshot.slot):
            return
        if len(self._offers) > 4 * self._pool.total + 64:
            live = [s for s in self._by_key.values() if s.slot is not None and not self._pool.refs(s.slot)]
            self._offers = [(s.worth, index, s) for index, s in enumerate(live, self._serial)]
            self._serial += len(live)
            heapq.heapify(self._offers)
        self._serial += 1
        heapq.heappush(self._offers, (snapshot.worth, self._serial, snapshot))

    def _pop_least(self) -> Snapshot | None:
        """The unleased snapshot of least worth."""
        while self._offers:
            worth, _, snapshot = heapq.heappop(self._offers)
            if snapshot.slot is not None and snapshot.worth == worth and not self._pool.refs(snapshot.slot):
                return snapshot
        return None

    def check(self, tree: PrefixTree) -> None:
        """Raise `PoolCorrupt` unless every snapshot's block is present (and leased if the snapshot is), each hangs from
        the next shallower one of its path, all that may be evicted can be found, and the pool agrees.
        """
        offered = {(worth, id(snapshot)) for worth, _, snapshot in self._offers}
        for key, snapshot in self._by_key.items():
            if snapshot.key != key or snapshot.slot is None or self._by_slot.get(snapshot.slot) is not snapshot:
                raise PoolCorrupt("a snapshot is not where the index says")
            if not tree.holds(key):
                raise PoolCorrupt("a snapshot is present without its block")
            if not self._pool.indexed(snapshot.slot):
                raise PoolCorrupt(f"slot {snapshot.slot} holds a snapshot but is not indexed")
            if self._pool.refs(snapshot.slot):
                if not tree.leased(key):
                    raise PoolCorrupt("a snapshot is leased, its block is not")
            elif (snapshot.worth, id(snapshot)) not in offered:
                raise PoolCorrupt(f"snapshot in slot {snapshot.slot} cannot be evicted")
            if snapshot.parent is not self.deepest(snapshot.keys, snapshot.blocks - 1):
                raise PoolCorrupt("a snapshot does not hang from the next shallower one")
            siblings = self._roots if snapshot.parent is None else snapshot.parent.children
            if siblings.get(key) is not snapshot:
                raise PoolCorrupt("a snapshot is not among the children of its parent")
        indexed = sum(self._pool.indexed(slot) for slot in range(self._pool.total))
        if indexed != len(self._by_key) or len(self._by_slot) != indexed:
            raise PoolCorrupt(f"{indexed} slots are indexed, there are {len(self._by_key)} snapshots")
