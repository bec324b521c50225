"""The prefix tree: which computed blocks can be reused, by BlockKey.

A BlockKey chains over everything before it, so the tree is a table key -> node whose edges are the parents. Promise:
**a present block implies its prefix** (children are evicted before their parent), so the longest match is a binary
search. Eviction takes the least recently used leaf whose block has no lease; leases always cover a prefix, so a leased
block's ancestors are never leaves.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.pool import BlockPool, PoolCorrupt


@dataclass(slots=True)
class _Node:
    key: BlockKey
    block: int
    parent: "_Node | None"
    children: int
    used: int
    """The tick of the last match or release."""


def _depth(node: _Node) -> int:
    depth, at = 0, node.parent
    while at is not None:
        depth, at = depth + 1, at.parent
    return depth


class PrefixTree:
    """The index of a pool's computed blocks."""

    def __init__(self, pool: BlockPool, evicted: Callable[[BlockKey], None] | None = None) -> None:
        """`evicted` is told the key of every block that leaves."""
        self._pool = pool
        self._evicted = evicted
        self._nodes: dict[BlockKey, _Node] = {}
        self._by_block: dict[int, _Node] = {}
        self._leaves: list[tuple[int, int]] = []
        self._tick = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def holds(self, key: BlockKey) -> bool:
        """Whether `key` is present."""
        return key in self._nodes

    def leased(self, key: BlockKey) -> bool:
        """Whether the block of `key` is present and leased."""
        node = self._nodes.get(key)
        return node is not None and self._pool.refs(node.block) > 0

    def block(self, key: BlockKey) -> int | None:
        """The block that carries `key`."""
        node = self._nodes.get(key)
        return None if node is None else node.block

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """The blocks of the longest present prefix of the chain `keys`. They are not leased yet: lease them before
        anything else touches the pool.
        """
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high + 1) // 2
            if keys[middle - 1] in self._nodes:
                low = middle
            else:
                high = middle - 1
        return [self._nodes[key].block for key in keys[:low]]

    def insert(self, key: BlockKey, parent: BlockKey | None, block: int) -> int:
        """Name the leased `block` by `key`; its parent is present. Returns the block that carries the key: another one
        when the key was present already, and then the caller shares that one (`Lease.share`), so that leases cover
        prefixes.
        """
        present = self._nodes.get(key)
        if present is not None:
            return present.block
        parent_node = None
        if parent is not None:
            parent_node = self._nodes.get(parent)
            if parent_node is None:
                raise PoolCorrupt("a block is named before its prefix")
            parent_node.children += 1
        self._pool.index(block)
        node = _Node(key, block, parent_node, 0, self._tick)
        self._nodes[key] = node
        self._by_block[block] = node
        return block

    def released(self, blocks: Sequence[int]) -> None:
        """The pool says that these blocks became cached. Call with a chain's last block first."""
        self._tick += 1
        for block in blocks:
            node = self._by_block[block]
            node.used = self._tick
            if node.children == 0:
                self._push(node)

    def evict(self, count: int) -> int:
        """Free up to `count` cached blocks, least recently used leaves first. Returns how many."""
        freed = 0
        while freed < count and self._leaves:
            used, block = heapq.heappop(self._leaves)
            node = self._by_block.get(block)
            if node is None or node.used != used or node.children or self._pool.refs(block):
                continue
            self._remove(node)
            freed += 1
        return freed

    def drop(self, keys: set[BlockKey]) -> set[BlockKey]:
        """Remove these blocks and everything on top of them, as far as it is not leased. Returns what is left of it."""
        doomed: dict[BlockKey, int] = {}
        for node in self._nodes.values():
            path: list[_Node] = []
            at: _Node | None = node
            while at is not None and at.key not in doomed and at.key not in keys:
                path.append(at)
                at = at.parent
            if at is not None:
                base = doomed[at.key] if at.key in doomed else _depth(at)
                doomed[at.key] = base
                doomed |= {above.key: base + len(path) - index for index, above in enumerate(path)}
        left: set[BlockKey] = set()
        for key in sorted(doomed, key=lambda key: (-doomed[key], key)):
            node = self._nodes[key]
            if node.children or self._pool.refs(node.block):
                left.add(key)
            else:
                self._remove(node)
        return left

    def _remove(self, node: _Node) -> None:
        del self._nodes[node.key]
        del self._by_block[node.block]
        self._pool.unindex(node.block)
        if self._evicted is not None:
            self._evicted(node.key)
        parent = node.parent
        if parent is not None:
            parent.children -= 1
            if parent.children == 0 and self._pool.refs(parent.block) == 0:
                self._push(parent)

    def _push(self, node: _Node) -> None:
        """Offer a cached leaf for eviction. Stale entries are dropped when popped, or here when they pile up."""
        if len(self._leaves) > 4 * self._pool.total + 64:
            live = (n for n in self._nodes.values() if n.children == 0 and self._pool.refs(n.block) == 0)
            self._leaves = [(n.used, n.block) for n in live]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.used, node.block))

    def check(self) -> None:
        """Raise `PoolCorrupt` unless every node's parent is present, the child counts are right, every cached leaf can
        be found by eviction, and the pool's indexed blocks are exactly the tree's.
        """
        children: dict[BlockKey, int] = {}
        offered = set(self._leaves)
        for node in self._nodes.values():
            if not self._pool.indexed(node.block) or self._by_block.get(node.block) is not node:
                raise PoolCorrupt(f"block {node.block} is in the tree but not indexed")
            if node.parent is not None:
                if self._nodes.get(node.parent.key) is not node.parent:
                    raise PoolCorrupt("a block is present without its prefix")
                children[node.parent.key] = children.get(node.parent.key, 0) + 1
        for node in self._nodes.values():
            if node.children != children.get(node.key, 0):
                raise PoolCorrupt("a child count is wrong")
            evictable = node.children == 0 and self._pool.refs(node.block) == 0
            if evictable and (node.used, node.block) not in offered:
                raise PoolCorrupt(f"cached leaf {node.block} cannot be evicted")
        indexed = sum(self._pool.indexed(block) for block in range(self._pool.total))
        if indexed != len(self._nodes):
            raise PoolCorrupt(f"{indexed} blocks are indexed, the tree has {len(self._nodes)}")
