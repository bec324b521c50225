"""Leases: the only way to hold blocks. A lease owns the block table of one sequence and gives everything back when
closed.

All of a sequence's blocks are held from position 0 on, so a leased block's whole prefix is leased too (but for blocks
that only wait to be written to the store, paging/).
"""

from collections.abc import Sequence
from types import TracebackType

from isthmus.execution.inference.pool import BlockPool
from isthmus.execution.inference.tree import PrefixTree


class Lease:
    """The block table of one sequence: shared blocks matched in the tree first, then blocks of its own.

    A context manager; `close` may be called twice. Not usable afterwards.
    """

    def __init__(self, pool: BlockPool, tree: PrefixTree, shared: Sequence[int] = ()) -> None:
        self._pool = pool
        self._tree = tree
        self._blocks: list[int] = []
        for block in shared:
            pool.retain(block)
            self._blocks.append(block)

    @property
    def blocks(self) -> Sequence[int]:
        """The block table, in sequence order."""
        return self._blocks

    def grow(self, count: int) -> bool:
        """Add `count` fresh blocks, evicting cached ones if need be. All or nothing: False when there is no room."""
        missing = count - self._pool.free
        if missing > self._pool.cached:
            return False
        # Fewer leave than are cached where something above them is being written to the store.
        if missing > 0 and self._tree.evict(missing) < missing:
            return False
        self._blocks.extend(self._pool.take() for _ in range(count))
        return True

    def share(self, index: int, block: int) -> None:
        """Hold `block`, which carries the same key, in place of the one at `index`.

        A step under way may go on reading that one: whoever gets it next writes in a later step.
        """
        own = self._blocks[index]
        if own != block:
            self._pool.retain(block)
            self._blocks[index] = block
            self._pool.release(own)

    def truncate(self, length: int) -> None:
        """Give back all but the first `length` blocks."""
        dropped = self._blocks[length:]
        del self._blocks[length:]
        dropped.reverse()
        became_cached = [block for block in dropped if self._pool.release(block)]
        if became_cached:
            self._tree.released(became_cached)

    def close(self) -> None:
        """Give back everything."""
        self.truncate(0)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
