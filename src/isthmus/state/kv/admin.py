"""The administrator's end of a store's socket: what `isthmus store` asks."""

from pathlib import Path
from typing import TypeVar

from isthmus.contracts.blocks import Erasure, Reason, StoreStats, Tier
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import StoreUnavailable
from isthmus.state.kv import wire
from isthmus.state.kv.lanepool import ClientSettings, LanePool
from isthmus.state.kv.upkeep import Checked, Kept

_SMALL = 1 << 16
_QUICK_S = 10.0

A = TypeVar("A", bound=wire.Answer)


class RemoteAdmin:
    """Asks a store, in a daemon or in a worker, as an administrator; `StoreUnavailable` when it does not answer."""

    def __init__(self, path: Path, clock: Clock) -> None:
        settings = ClientSettings(
            role=wire.ADMIN, name="isthmus store", lanes=1, window_bytes=_SMALL, area_bytes=_SMALL
        )
        self._path = path
        self._pool = LanePool(path, clock, settings)

    def stats(self) -> StoreStats:
        """A snapshot."""
        return self._asked(self._pool.ask(wire.StatsAsk, wire.Stats, _QUICK_S)).stats

    def forget(self, namespace_id: bytes, session_id: bytes, timeout_s: float) -> Erasure:
        """Erase a namespace, or one session of it, from every tier; durable when this returns."""
        return self._asked(
            self._pool.ask(lambda n: wire.ForgetAsk(n, namespace_id, session_id), wire.Forgotten, timeout_s)
        ).erasure

    def evict(self, tier: Tier, size: int, timeout_s: float) -> int:
        """Evict about `size` bytes from a tier; how many went."""
        answer = self._pool.ask(lambda n: wire.EvictAsk(n, tier, size, timeout_s), wire.Freed, timeout_s)
        return self._asked(answer).count

    def verify(self, timeout_s: float) -> Checked:
        """Verify everything that is kept."""
        return self._asked(self._pool.ask(lambda n: wire.VerifyAsk(n, timeout_s), wire.Verified, timeout_s)).checked

    def compact(self, timeout_s: float) -> int:
        """Rewrite what is left of segments that hold little; how many segments that freed."""
        return self._asked(self._pool.ask(lambda n: wire.CompactAsk(n, timeout_s), wire.Freed, timeout_s)).count

    def entries(self, tier: Tier, most: int) -> list[Kept]:
        """Records of a tier, at most `most`."""
        found: list[Kept] = []
        while len(found) < most:
            skip, limit = len(found), min(wire.MAX_LISTED, most - len(found))
            part = self._asked(
                self._pool.ask(lambda n, s=skip, m=limit: wire.ListAsk(n, tier, s, m), wire.Listed, _QUICK_S)  # type: ignore[misc]
            ).entries
            found += part
            if len(part) < limit:
                break
        return found

    def close(self) -> None:
        """Hang up."""
        self._pool.close()

    def _asked(self, answer: A | Reason) -> A:
        if isinstance(answer, Reason):
            why = self._pool.refusal or f"no store answers at {self._path} ({answer.value})"
            raise StoreUnavailable(why)
        return answer
