"""What a policy is: an order among leaves. `LeafFirst` (leaf_first.py) keeps the tree, hints and quotas around it."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, Protocol

import msgspec

from isthmus.contracts.blocks import Lifetime
from isthmus.state.kv.retention.port import K

UNQUEUED = 0
FRESH = -1
"""Came in as a leaf, and is not in any queue yet: most get a child at once, and then never were in one."""


class Record(msgspec.Struct, Generic[K], eq=False):
    """A record present. The first five are its entry's; then what the tree knows of it, and what its policy notes."""

    key: K
    parent: K | None
    size: int
    tenant: Hashable
    lifetime: Lifetime
    used: float
    """When it was last used."""
    children: int = 0
    """Records present that name it as their parent; without those that are being chosen to leave."""
    place: int = UNQUEUED
    """The serial number of its one valid place in a queue of leaves, or one of the above."""
    rank: int = 0
    """The policy's: its place in the order; 0 only before its first."""
    band: int = 0
    """The policy's: which of its queues it is in."""
    uses: int = 0
    """The policy's: a counter."""


class Order(Protocol[K]):
    """A policy's order. It sees every record, and is asked for leaves only."""

    def admit(self, record: Record[K]) -> None:
        """A record came in; or (its rank is not 0) one that was to be evicted stays."""
        ...

    def used(self, records: Sequence[Record[K]], now: float) -> None:
        """Records of one sequence were used together, in their order in it. Notes `now` in each."""
        ...

    def offer(self, record: Record[K]) -> None:
        """A leaf that is in no queue: it may be taken from now on."""
        ...

    def take(self, tenant: Hashable | None) -> Record[K] | None:
        """The leaf that should go first, of all or of one tenant; it is in no queue any more. None: there is none."""
        ...

    def renew(self, record: Record[K]) -> None:
        """A leaf that was taken is held, so it is in use: it goes to the back of the order. It is offered next."""
        ...

    def leave(self, record: Record[K], evicted: bool) -> None:
        """A record goes: evicted by this order's choice or a hint's, or for another reason."""
        ...

    def check(self, records: Iterable[Record[K]]) -> set[int]:
        """The serial numbers in its queues. Raises `RetentionCorrupt` unless its accounts are those of `records`."""
        ...


MakeOrder = Callable[[Mapping[K, Record[K]], Iterator[int]], Order[K]]
"""An order over the records present (by key, kept by the caller), with the serial numbers of places in queues."""
