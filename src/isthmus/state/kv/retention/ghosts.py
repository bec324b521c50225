"""What a policy remembers of records that have gone: key and size, oldest first."""

from collections import OrderedDict
from typing import Generic

from isthmus.state.kv.retention.port import K

FEWEST = 1024
"""So many ghosts may be kept even when fewer records are present."""


class Ghosts(Generic[K]):
    """Keys of records that were evicted, in the order in which they were. The owner bounds it by `drop_oldest`."""

    __slots__ = ("_sizes", "bytes")

    def __init__(self) -> None:
        self._sizes: OrderedDict[K, int] = OrderedDict()
        self.bytes = 0
        """What the records had."""

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: K) -> bool:
        return key in self._sizes

    def add(self, key: K, size: int) -> None:
        """The newest one."""
        self.take(key)
        self._sizes[key] = size
        self.bytes += size

    def take(self, key: K) -> bool:
        """Forget `key`. Returns whether it was remembered."""
        size = self._sizes.pop(key, 0)
        self.bytes -= size
        return size > 0

    def drop_oldest(self) -> None:
        """Forget the oldest; there is one."""
        self.bytes -= self._sizes.popitem(last=False)[1]

    def recount(self) -> int:
        """Their bytes, added up anew."""
        return sum(self._sizes.values())
