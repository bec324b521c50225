"""What the scheduler counts."""

from dataclasses import dataclass
from typing import Any

from isthmus.contracts.events import EngineStats
from isthmus.execution.inference.pool import BlockPool
from isthmus.execution.inference.recurrent import RecurrentStates


@dataclass(slots=True)
class Counters:
    """Counts since the start; names as in `EngineStats`."""

    steps: int = 0
    steps_ahead: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    dedup_waits: int = 0
    rejected: int = 0
    aborted: int = 0
    finished: int = 0
    draft_tokens: int = 0
    accepted_drafts: int = 0

    def snapshot(
        self,
        *,
        waiting: int,
        running: int,
        pool: BlockPool,
        states: RecurrentStates | None,
        paging: dict[str, float] | None,
    ) -> EngineStats:
        """The counts together with the state of queue and pools."""
        counts: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        if states is not None:
            counts |= states.stats()
        return EngineStats(
            waiting=waiting,
            running=running,
            blocks_total=pool.total,
            blocks_free=pool.free,
            blocks_cached=pool.cached,
            blocks_leased=pool.leased,
            paging=paging or {},
            **counts,
        )
