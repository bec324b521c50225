"""What an administrator asks of a daemon: the far end of `Upkeep`. Unlike a `BlockStore` it raises when refused."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from isthmus.contracts.blocks import NO_SESSION, Erasure, Reason, StoreStats, Tier
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import DeadlineExceeded, StoreUnavailable
from isthmus.state.kv import wire
from isthmus.state.kv.lanepool import ClientSettings, LanePool, inside
from isthmus.state.kv.upkeep import Checked, Kept

_MEMORY_BYTES = 4096

A = TypeVar("A", bound=wire.Answer)


class Administrator:
    """Speaks to the daemon at `path` in the role `admin`. Every call raises `StoreUnavailable` when it is refused or
    nobody answers, and `DeadlineExceeded` when the answer does not come in time.
    """

    def __init__(self, path: Path, clock: Clock, settings: ClientSettings | None = None) -> None:
        chosen = msgspec.structs.replace(
            settings or ClientSettings(),
            role=wire.ADMIN,
            lanes=1,
            window_bytes=_MEMORY_BYTES,
            area_bytes=_MEMORY_BYTES,
        )
        self._call_s = chosen.call_s
        self._pool = LanePool(path, clock, chosen)

    def status(self) -> StoreStats:
        """A snapshot of the store."""
        return self._ask(wire.StatsAsk, wire.Stats, self._call_s).stats

    def forget(self, namespace_id: bytes, session_id: bytes = NO_SESSION, timeout_s: float = 60.0) -> Erasure:
        """See `Upkeep.forget`. When no answer came it may have happened: ask again."""
        return self._ask(
            lambda number: wire.ForgetAsk(number, namespace_id, session_id), wire.Forgotten, timeout_s
        ).erasure

    def ls(self, tier: Tier, skip: int, limit: int) -> list[Kept]:
        """See `Upkeep.ls`; at most `wire.MAX_LISTED` at a time."""
        return self._ask(lambda number: wire.ListAsk(number, tier, skip, limit), wire.Listed, self._call_s).entries

    def verify(self, timeout_s: float) -> Checked:
        """See `Upkeep.verify`."""
        within = inside(timeout_s)
        return self._ask(lambda number: wire.VerifyAsk(number, within), wire.Verified, timeout_s).checked

    def evict(self, tier: Tier, size: int, timeout_s: float) -> int:
        """See `Upkeep.evict`."""
        within = inside(timeout_s)
        return self._ask(lambda number: wire.EvictAsk(number, tier, size, within), wire.Freed, timeout_s).count

    def compact(self, timeout_s: float) -> int:
        """See `Upkeep.compact`."""
        within = inside(timeout_s)
        return self._ask(lambda number: wire.CompactAsk(number, within), wire.Freed, timeout_s).count

    def close(self) -> None:
        """Leave."""
        self._pool.close()

    def _ask(self, make: Callable[[int], wire.Asked], kind: type[A], timeout_s: float) -> A:
        answer = self._pool.ask(make, kind, timeout_s)
        if answer is Reason.LATE:
            raise DeadlineExceeded(f"the store has not answered within {timeout_s:g} s")
        if isinstance(answer, Reason):
            raise StoreUnavailable(self._pool.refusal or "no store answers")
        return answer
