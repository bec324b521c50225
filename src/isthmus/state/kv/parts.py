"""What the parts of a store share."""

from dataclasses import dataclass

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.counting import Counts
from isthmus.state.kv.dram import Dram
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.scopes import Scopes
from isthmus.state.kv.settings import StoreSettings


@dataclass(frozen=True, slots=True)
class Parts:
    """The tiers and the accounts of one store. `log` None: nothing lies under the arena."""

    settings: StoreSettings
    clock: Clock
    counts: Counts
    scopes: Scopes
    dram: Dram
    log: SegmentLog | None

    def until(self, timeout_s: float) -> float:
        """When a call that may take `timeout_s` has to end, on the monotonic clock."""
        return self.clock.monotonic() + min(max(timeout_s, 0.0), self.settings.call_s)

    def left(self, deadline: float) -> float:
        """Seconds until then; not negative."""
        return max(0.0, deadline - self.clock.monotonic())


def check_batch(count: int, limit: int, name: str) -> None:
    """Raise `InvalidInput` when a batch is over its limit."""
    if count > limit:
        raise InvalidInput(f"a batch has at most {limit} {name}, not {count}", name)
