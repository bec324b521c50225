"""What the scheduler's side of paging (policy.py) and its threads (pager.py) tell each other. Plain values.

policy -> pager    Look | Load | Keep | Notice
pager -> policy    Found | Loaded | Kept | Erased
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.contracts.blocks import Erasure, Hint, Lifetime, Owner, Reason, RecordKind, Tier
from isthmus.contracts.keys import BlockKey


class Arrivals:
    """How many layers of a load have arrived, verified, for all of its blocks. One thread reports, others wait."""

    def __init__(self, layers: int) -> None:
        self._total = layers
        self._layers = 0
        self._failed = False
        self._changed = threading.Condition()

    @property
    def fraction(self) -> float:
        """The part that has arrived, 0 to 1."""
        return self._layers / self._total

    @property
    def failed(self) -> bool:
        """Whether the rest will not come."""
        return self._failed

    def arrived(self, layers: int) -> None:
        """The first `layers` layers are here."""
        with self._changed:
            self._layers = layers
            self._changed.notify_all()

    def fail(self) -> None:
        """What has not arrived will not come; what has arrived is not to be used either."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def wait(self, layer: int, seconds: float) -> bool:
        """Whether `layer` (from 0) is here, within `seconds`."""
        if self._layers > layer and not self._failed:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._layers > layer, seconds)
            return self._layers > layer and not self._failed


@dataclass(frozen=True, slots=True)
class Look:
    """Where are these blocks, and the snapshots (as many, or none) at their ends? Of the sequence `serial`."""

    serial: int
    keys: Sequence[BlockKey]
    states: Sequence[BlockKey] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a `Look`: a tier for each key, None where it is not."""

    serial: int
    tiers: Sequence[Tier | None]
    states: Sequence[Tier | None] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Bring records into the device's memory: `keys[i]` into block `blocks[i]`, and a snapshot into a slot.

    Nobody else reads or writes them until `Loaded` comes, but for who waits on `arrivals`.
    """

    serial: int
    keys: Sequence[BlockKey]
    blocks: Sequence[int]
    arrivals: Arrivals
    state: tuple[BlockKey, int] | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The end of a `Load`, one reason a block; `seconds` from its start, `tiers` where they came from."""

    serial: int
    reasons: Sequence[Reason]
    tiers: Sequence[Tier | None]
    state: Reason | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Keep:
    """Write a block (or the state in slot `place`) behind. It does not change until `Kept` comes."""

    kind: RecordKind
    key: BlockKey
    parent: BlockKey | None
    owner: Owner
    place: int
    lifetime: Lifetime


@dataclass(frozen=True, slots=True)
class Kept:
    """The end of a `Keep`."""

    kind: RecordKind
    place: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Notice:
    """Pass a hint on to the store."""

    hint: Hint


@dataclass(frozen=True, slots=True)
class Erased:
    """Scopes that were forgotten since the last time; `everything`: more than can be told, so all must go."""

    erasures: Sequence[Erasure]
    everything: bool = False


Event = Found | Loaded | Kept | Erased
