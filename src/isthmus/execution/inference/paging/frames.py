"""What an engine's process and its paging process say to each other, in frames over a socket pair.

engine -> paging    Begin (with the descriptors of its memory), then jobs
paging -> engine    Opened or NotOpened, then Happened
"""

from collections.abc import Sequence

import msgspec

from isthmus.contracts.blocks import RecordKind
from isthmus.contracts.events import ErrorInfo
from isthmus.execution.inference.paging.jobs import Arrived, Cancel, Event, Keep, Load, Look, Notice
from isthmus.execution.inference.paging.memory import Shapes
from isthmus.execution.inference.paging.settings import PagingSettings

MAX_FRAME_BYTES = 16 << 20
"""Of the keys of the longest prompt, and more."""
RECEIVE_BYTES = 1 << 18


class Opened(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The store is open."""


class NotOpened(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The store cannot be opened; the process ends."""

    error: ErrorInfo


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine is ready. With it come the descriptors of its pools of records, in the order of `pools`: which
    records, and how many bytes. `heard`: the number of the last erasure that the engine knows of; -1 without state.
    """

    shapes: Shapes
    settings: PagingSettings
    pools: Sequence[tuple[RecordKind, int]]
    heard: int = -1


class Happened(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """See `jobs`."""

    events: Sequence[Event | Arrived]


ToPager = Begin | Look | Load | Keep | Notice | Cancel
ToEngine = Opened | NotOpened | Happened
