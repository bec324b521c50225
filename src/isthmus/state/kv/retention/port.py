"""The port of retention: which records leave a tier that is full.

Promises of every implementation of `Retention`

- it is pure: no I/O, no clock (time is an argument, in seconds that never go back), no threads; the caller's lock
covers it, and the same calls give the same answers;
- **leaf first**: a record is proposed only when every record present that names it as its parent is proposed, too, and
stands earlier in the list; so what is present keeps its prefix;
- what is held (leased) is never proposed, nor is a pinned record before its pin has ended;
- memory grows with the records present, never with the number of calls: what it remembers of records that have gone is
bounded, and so is what it remembers of hints;
- an access costs O(log n) at most, amortised.

Keys are opaque. Parents form no cycles, which chained keys cannot. A parent may be absent: a store may have holes, and
records may come in any order.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from isthmus.contracts.blocks import HintKind, Lifetime
from isthmus.contracts.errors import StoreError

K = TypeVar("K", bound=Hashable)


class RetentionCorrupt(StoreError):
    """The accounts of retention do not add up: a bug in Isthmus, never caused by input."""


class Entry(msgspec.Struct, Generic[K], frozen=True):
    """A record that came in: its key, that of the block before it (None: the first), its size in bytes, whose it is
    (anything hashable but None) and how long it is expected to be wanted.
    """

    key: K
    parent: K | None
    size: int
    tenant: Hashable
    lifetime: Lifetime = Lifetime.SESSION


class Retention(Protocol[K]):
    """The order in which the records of one tier leave it."""

    def insert(self, entry: Entry[K], now: float) -> None:
        """A record came in. Of one that is here already it is a use.

        Raises `InvalidInput` for a size under 1, or when the record that is here has another size or tenant.
        """
        ...

    def touch(self, keys: Sequence[K], now: float) -> None:
        """Records were used together; `keys` in their order in the sequence. Absent ones are passed over."""
        ...

    def hint(self, keys: Sequence[K], kind: HintKind, seconds: float, now: float) -> None:
        """What is known of the future of a sequence; `keys` in their order in it. Absent ones are passed over."""
        ...

    def remove(self, key: K) -> None:
        """A record has gone: evicted when `victims` proposed it last, else erased or found corrupt. Absent: nothing."""
        ...

    def victims(self, size: int, now: float, held: Callable[[K], bool], tenant: Hashable | None = None) -> list[K]:
        """What to evict for `size` bytes, children before their parents: enough, unless all that may go is less.

        Tenants over their quota pay first; with `tenant`, only its records do. The caller removes them. A proposal
        stands until the next call other than `remove`; what was not removed by then stays as it was.
        """
        ...

    def __len__(self) -> int:
        """Records present."""
        ...

    def used(self, tenant: Hashable | None = None) -> int:
        """Bytes of the records present, or of one tenant's."""
        ...
