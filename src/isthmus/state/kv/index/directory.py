"""Which partition a hash belongs to: extendible hashing.

Fagin, Nievergelt, Pippenger, Strong: "Extendible Hashing", ACM TODS 4(3), 1979. The first `depth` bits of a hash pick
an entry of `table`; a partition of level l owns all entries that begin with its l-bit prefix. One that is full splits
by its next bit; two siblings that have become small are one again. Partitions are numbered without gaps: when one goes,
the last one gets its number.
"""

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
_NEVER = 1  # a table has at least two entries: a shift by 64 means nothing


class Directory:
    """Partitions 0 to `parts` - 1. For each `homes`, `keys` and `top` (what its owner keeps there, 0 at first) as
    arrays, and the same memory as memoryviews for single elements.

    A partition has `base` to `deepest` bits of prefix.
    """

    __slots__ = (
        "_levels", "_prefixes", "base", "deepest", "depth", "home", "homes", "key", "keys", "parts", "shift", "slot",
        "table", "tip", "top",
    )  # fmt: skip

    def __init__(self, base: int, deepest: int) -> None:
        self.base = base
        self.deepest = deepest
        self.parts = 1 << base
        self._arrays(np.zeros((5, self.parts), np.int64))
        self._levels[:] = base
        self._prefixes[:] = np.arange(self.parts)
        self._entries(np.arange(max(self.parts, 1 << _NEVER), dtype=np.int64) % self.parts)

    def _arrays(self, arrays: NDArray[np.int64]) -> None:
        self.homes, self.keys, self.top, self._levels, self._prefixes = arrays
        self.home, self.key, self.tip = self.homes.data, self.keys.data, self.top.data

    def _entries(self, table: NDArray[np.int64]) -> None:
        self.table = table
        self.slot = table.data
        self.depth = len(table).bit_length() - 1
        self.shift = HASH_BITS - self.depth

    def _resize(self, room: int) -> None:
        arrays = np.zeros((5, room), np.int64)
        for new, old in zip(arrays, (self.homes, self.keys, self.top, self._levels, self._prefixes), strict=True):
            new[: self.parts] = old[: self.parts]
        self._arrays(arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return int(self.table.nbytes + 5 * self.homes.nbytes)

    def prefix(self, part: int) -> tuple[int, int]:
        """The prefix of a partition, and how many bits it has."""
        return int(self._prefixes[part]), int(self._levels[part])

    def splits(self, part: int) -> bool:
        """Whether the partition may split."""
        return bool(self._levels[part] < self.deepest)

    def split(self, part: int) -> int:
        """Split; `part` keeps what has a 0 as its next bit. The number of the new one, whose figures are 0."""
        if self.parts == len(self.homes):
            self._resize(self.parts + self.parts // 4 + 1)
        if self._levels[part] == self.depth:
            self._entries(np.repeat(self.table, 2))
        new = self.parts
        self.parts += 1
        self.homes[new] = self.keys[new] = self.top[new] = 0
        self._name(part, int(self._prefixes[part]) * 2, int(self._levels[part]) + 1)
        self._name(new, int(self._prefixes[part]) + 1, int(self._levels[part]))
        return new

    def _name(self, part: int, prefix: int, level: int) -> None:
        self._prefixes[part], self._levels[part] = prefix, level
        spread = self.depth - level
        self.table[prefix << spread : prefix + 1 << spread] = part

    def sibling(self, part: int) -> int | None:
        """The partition with which `part` could be one; None when there is none of its level."""
        prefix, level = self.prefix(part)
        if level == self.base:
            return None
        found = int(self.table[(prefix ^ 1) << (self.depth - level)])
        return found if self._levels[found] == level else None

    def join(self, part: int, sibling: int) -> int:
        """Give the hashes of `sibling` to `part`, and its number to the last partition: that one's number until now."""
        prefix, level = self.prefix(part)
        self._name(part, prefix >> 1, level - 1)
        last = self.parts - 1
        if last != sibling:
            for figures in (self.homes, self.keys, self.top):
                figures[sibling] = figures[last]
            self._name(sibling, *self.prefix(last))
        self.parts = last
        if self.parts < len(self.homes) // 2:
            self._resize(self.parts)
        deepest = max(int(self._levels[: self.parts].max()), _NEVER)
        if deepest < self.depth:
            self._entries(self.table[:: 1 << (self.depth - deepest)].copy())
        return last
