"""The block pool: who may use which block of KV memory. The slots of recurrent state are a second pool of the same
kind, whose index is that of the snapshots (snapshots.py).

Every block is in exactly one of three states, and the conservation law holds after every call:

    free ──take──> leased ──release, not indexed──> free
                     │ ^
      release, indexed │ match          free + cached + leased == total
                     v │
                   cached ──evict──> free

*Leased*: at least one lease refers to it. *Indexed*: the prefix tree names it, so that it may be matched; an indexed
block without leases is *cached* and may be evicted. A leased block is never evicted or handed out.
"""

from isthmus.contracts.errors import EngineFailed, InvalidInput


class PoolCorrupt(EngineFailed):
    """The conservation law does not hold: a bug in Isthmus, never caused by input."""


class BlockPool:
    """Reference counts and the free list of `total` blocks, ids 0 to total - 1."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise InvalidInput(f"a pool has at least 1 block, not {total}", "blocks")
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._refs = [0] * total
        self._indexed = [False] * total
        self._cached = 0

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that only the prefix tree names."""
        return self._cached

    @property
    def leased(self) -> int:
        """Blocks with at least one lease."""
        return self.total - self._cached - len(self._free)

    def refs(self, block: int) -> int:
        """How many leases refer to `block`."""
        return self._refs[block]

    def indexed(self, block: int) -> bool:
        """Whether the prefix tree names `block`."""
        return self._indexed[block]

    def take(self) -> int:
        """A free block, leased once. Raises `PoolCorrupt` when none is free: callers make room first."""
        if not self._free:
            raise PoolCorrupt("take from an empty pool")
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more lease on a block that is leased or cached."""
        if self._refs[block] == 0:
            if not self._indexed[block]:
                raise PoolCorrupt(f"lease of free block {block}")
            self._cached -= 1
        self._refs[block] += 1

    def release(self, block: int) -> bool:
        """One lease less. Returns whether the block became cached (last lease gone, and indexed)."""
        if self._refs[block] < 1:
            raise PoolCorrupt(f"release of unleased block {block}")
        self._refs[block] -= 1
        if self._refs[block]:
            return False
        if self._indexed[block]:
            self._cached += 1
            return True
        self._free.append(block)
        return False

    def index(self, block: int) -> None:
        """The prefix tree now names this leased block."""
        if self._refs[block] < 1 or self._indexed[block]:
            raise PoolCorrupt(f"index of block {block}, which is not leased or is indexed already")
        self._indexed[block] = True

    def unindex(self, block: int) -> None:
        """The prefix tree no longer names this cached block: it becomes free."""
        if self._refs[block] or not self._indexed[block]:
            raise PoolCorrupt(f"eviction of block {block}, which is leased or not indexed")
        self._indexed[block] = False
        self._cached -= 1
        self._free.append(block)

    def disown(self, block: int) -> None:
        """The index no longer names this block, which has one lease: whoever holds that has it for itself."""
        if self._refs[block] != 1 or not self._indexed[block]:
            raise PoolCorrupt(f"block {block} is not indexed with a single lease")
        self._indexed[block] = False

    def check(self) -> None:
        """Raise `PoolCorrupt` unless the conservation law holds, counted anew from the per-block state."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise PoolCorrupt("a block is free twice")
        cached = 0
        for block in range(self.total):
            leased, indexed = self._refs[block] > 0, self._indexed[block]
            if (block in free) == (leased or indexed):
                raise PoolCorrupt(f"block {block} is free and used, or neither")
            cached += indexed and not leased
        if cached != self._cached:
            raise PoolCorrupt(f"{cached} blocks are cached, the count says {self._cached}")
