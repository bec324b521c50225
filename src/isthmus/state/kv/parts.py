"""What the parts of a store share."""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.contracts.blocks import MAX_BATCH, Hint
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.arena.arena import Arena, Record
from isthmus.state.kv.arena.crew import Crew
from isthmus.state.kv.counting import Counts
from isthmus.state.kv.dram import Dram
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.log.records import LogRecord
from isthmus.state.kv.scopes import Scopes
from isthmus.state.kv.settings import StoreSettings

MOST_HINTED = 4 * MAX_BATCH
"""Keys in all hints of one call; those beyond it are dropped."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The tiers and the accounts of one store. `log` None: nothing lies under the arena. `crew` helps with copies."""

    settings: StoreSettings
    clock: Clock
    counts: Counts
    scopes: Scopes
    dram: Dram
    log: SegmentLog | None
    crew: Crew

    def until(self, timeout_s: float) -> float:
        """When a call that may take `timeout_s` has to end, on the monotonic clock."""
        return self.clock.monotonic() + min(max(0.0, timeout_s), self.settings.call_s)

    def left(self, deadline: float) -> float:
        """Seconds until then; not negative."""
        return max(0.0, deadline - self.clock.monotonic())


def log_record(arena: Arena, record: Record) -> LogRecord:
    """What the log is offered of a pinned record: its bytes where they lie."""
    return LogRecord(
        record.key,
        record.parent,
        record.owner,
        record.shape,
        record.lifetime,
        record.digests,
        arena.view(record),
        record.hits,
    )


def capped(hints: Sequence[Hint]) -> tuple[list[Hint], int]:
    """The hints of one call within the limits, and how many keys were dropped for that."""
    room = MOST_HINTED
    kept: list[Hint] = []
    for hint in hints[:MAX_BATCH]:
        keys = hint.keys[: min(room, MAX_BATCH)]
        room -= len(keys)
        if keys:
            kept.append(Hint(hint.kind, keys, hint.seconds))
    return kept, sum(len(hint.keys) for hint in hints) - (MOST_HINTED - room)


def check_batch(count: int, limit: int, name: str) -> None:
    """Raise `InvalidInput` when a batch is over its limit."""
    if count > limit:
        raise InvalidInput(f"a batch has at most {limit} {name}, not {count}", name)
