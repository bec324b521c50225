"""What the scheduler's side of paging (policy.py) and its threads (pager.py) tell each other. Plain values, which also
go between processes.

policy -> pager    Look | Load | Keep | Notice | Cancel
pager -> policy    Found | Loaded | Kept | Erased | Lost, and Arrived, which goes to the load's `Arrivals` (inbox.py)
"""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

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


class _Value(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A job or an event."""


class Look(_Value, frozen=True):
    """Where are these blocks, and the snapshots (as many, or none) at their ends? Of the sequence `serial`."""

    serial: int
    keys: Sequence[BlockKey]
    states: Sequence[BlockKey] = ()


class Found(_Value, frozen=True):
    """The answer to a `Look`: a tier for each key, None where it is not; `reason`: why not."""

    serial: int
    tiers: Sequence[Tier | None]
    states: Sequence[Tier | None] = ()
    reason: Reason = Reason.ABSENT


class Load(_Value, frozen=True):
    """Bring records into the device's memory: `keys[i]` into block `blocks[i]`, and a snapshot into a slot.

    Nobody else reads or writes them until `Loaded` comes, but for who waits on the load's `Arrivals`.
    """

    serial: int
    keys: Sequence[BlockKey]
    blocks: Sequence[int]
    state: tuple[BlockKey, int] | None = None


class Arrived(_Value, frozen=True):
    """The first `layers` layers of all blocks of a `Load` are there, verified; `spoiled`: the rest will not come for
    all of them.
    """

    serial: int
    layers: int
    spoiled: bool = False


class Loaded(_Value, frozen=True):
    """The end of a `Load`, one reason a block; `seconds` from its start, `tiers` where they came from."""

    serial: int
    reasons: Sequence[Reason]
    tiers: Sequence[Tier | None]
    state: Reason | None
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether everything came."""
        return all(reason is Reason.HIT for reason in self.reasons) and self.state in (None, Reason.HIT)


class Cancel(_Value, frozen=True):
    """What is being loaded for `serial` is not wanted any more; `Loaded` comes all the same."""

    serial: int


class Keep(_Value, frozen=True):
    """Write a block (or the state in slot `place`) behind. It does not change until `Kept` comes."""

    kind: RecordKind
    key: BlockKey
    parent: BlockKey | None
    owner: Owner
    place: int
    lifetime: Lifetime


class Kept(_Value, frozen=True):
    """The end of a `Keep`."""

    kind: RecordKind
    place: int
    reason: Reason


class Notice(_Value, frozen=True):
    """Pass a hint on to the store."""

    hint: Hint


class Erased(_Value, frozen=True):
    """Scopes that were forgotten since the last time; `everything`: more than can be told, so all must go."""

    erasures: Sequence[Erasure]
    everything: bool = False


class Lost(_Value, frozen=True):
    """The process (or the threads) that paged is gone; what it was doing ends as unavailable."""


Job = Look | Load | Keep | Notice | Cancel
Event = Found | Loaded | Kept | Erased | Lost
Told = Callable[[Sequence[Event | Arrived]], None]


def unavailable(job: Job) -> list[Event]:
    """How a job ends that nobody does."""
    match job:
        case Look():
            return [Found(job.serial, [None] * len(job.keys), [None] * len(job.states), Reason.UNAVAILABLE)]
        case Load():
            state = None if job.state is None else Reason.UNAVAILABLE
            count = len(job.keys)
            return [Loaded(job.serial, [Reason.UNAVAILABLE] * count, [None] * count, state, 0.0)]
        case Keep():
            return [Kept(job.kind, job.place, Reason.UNAVAILABLE)]
    return []


class Pager(Protocol):
    """Does it. Nothing here waits."""

    def look(self, job: Look) -> None:
        """Ask where blocks are."""
        ...

    def load(self, job: Load, arrivals: Arrivals) -> None:
        """Bring blocks in, and say on `arrivals` how far that is."""
        ...

    def cancel(self, serial: int) -> None:
        """What is being loaded for `serial`, if anything, is not wanted any more."""
        ...

    def keep(self, job: Keep) -> None:
        """Write a block behind."""
        ...

    def notice(self, hint: Hint) -> None:
        """Pass on a hint."""
        ...

    def take(self) -> list[Event]:
        """What happened since the last call."""
        ...
