"""A block store in a dictionary: what paging needs of one, with faults on demand."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from isthmus.contracts.blocks import (
    Erasure,
    Hint,
    Match,
    Outcome,
    Put,
    Reason,
    StoreStats,
    Tier,
    Want,
)
from isthmus.contracts.keys import BlockKey


@dataclass
class MemoryLease:
    granted: Sequence[Tier | None]

    def release(self) -> None:
        pass

    def __enter__(self) -> "MemoryLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@dataclass
class MemoryStore:
    """See `BlockStore`. `fault(key)` says what befalls a read; `tier` where everything is said to lie."""

    tier: Tier = Tier.NVME
    fault: Callable[[BlockKey, int], Reason | None] = lambda key, first_chunk: None
    records: dict[BlockKey, bytes] = field(default_factory=dict)
    hints: list[Hint] = field(default_factory=list)
    erasures: tuple[Erasure, ...] = ()
    reads: int = 0
    gate: threading.Event | None = None
    """Where set, reads wait for it."""

    def match(self, keys: Sequence[BlockKey]) -> list[Match]:
        found = [self.records.get(key) for key in keys]
        return [Match(None if one is None else self.tier, len(one or b"")) for one in found]

    def lease(self, keys: Sequence[BlockKey], seconds: float) -> MemoryLease:
        return MemoryLease([self.tier if key in self.records else None for key in keys])

    def read(self, lease: object, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        if self.gate is not None:
            self.gate.wait(timeout_s)
        return [self._read(want) for want in wants]

    def _read(self, want: Want) -> Outcome:
        self.reads += 1
        record = self.records.get(want.key)
        reason = Reason.ABSENT if record is None else self.fault(want.key, want.first_chunk)
        if record is None or reason is not None:
            want.into[:] = b"\xff" * want.into.nbytes
            return Outcome(reason or Reason.ABSENT)
        first = want.first_chunk * want.shape.chunk_bytes
        want.into[:] = record[first : first + want.into.nbytes]
        return Outcome(Reason.HIT, self.tier)

    def write(self, puts: Sequence[Put], timeout_s: float) -> list[Outcome]:
        outcomes = []
        for put in puts:
            known = put.key in self.records
            self.records.setdefault(put.key, bytes(put.payload))
            outcomes.append(Outcome(Reason.PRESENT if known else Reason.STORED, self.tier))
        return outcomes

    def hint(self, hints: Sequence[Hint]) -> None:
        self.hints += hints

    def flush(self, timeout_s: float) -> int:
        return len(self.records)

    def stats(self) -> StoreStats:
        return StoreStats(erasures=self.erasures)
