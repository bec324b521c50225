"""Taking records in: a copy into the arena, digests of that copy, and only then visible."""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.contracts.blocks import MAX_BATCH, Outcome, Put, Reason, Tier
from isthmus.state.kv.arena.arena import Record
from isthmus.state.kv.arena.copying import flat
from isthmus.state.kv.parts import Parts, check_batch


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes batches of records. Safe from several threads."""

    parts: Parts

    def write(self, puts: Sequence[Put], timeout_s: float, digests: Sequence[bytes] = ()) -> list[Outcome]:
        """See `BlockStore.write`. `digests`: what each record must have once it is here, else it is `CORRUPT`."""
        check_batch(len(puts), MAX_BATCH, "puts")
        deadline = self.parts.until(timeout_s)
        outcomes = [Outcome(Reason.LATE)] * len(puts)
        kept: list[tuple[int, Record]] = []
        number = self.parts.scopes.start_write({put.owner for put in puts})
        try:
            for index, put in enumerate(puts):
                if self.parts.clock.monotonic() >= deadline:
                    break
                found = self._take(put, digests[index] if digests else b"")
                if isinstance(found, Record):
                    kept.append((index, found))
                    outcomes[index] = Outcome(Reason.STORED, Tier.DRAM)
                else:
                    outcomes[index] = Outcome(found, Tier.DRAM)
        finally:
            self.parts.dram.unpin([record for _, record in kept])
            self.parts.scopes.end_write(number)
        self.parts.counts.add_outcomes("write", outcomes)
        return outcomes

    def _take(self, put: Put, expected: bytes) -> Record | Reason:
        """The record, visible and pinned; else why not."""
        dram = self.parts.dram
        record = dram.begin(put.key, put.parent, put.owner, put.shape, put.lifetime)
        if isinstance(record, Reason):
            return record
        complete = False
        try:
            digests = dram.arena.fill(record, flat(put.payload))
            complete = not expected or digests == expected
        finally:
            if not complete:
                dram.give_up(record)
        if not complete:
            return Reason.CORRUPT
        if not dram.publish(record):
            dram.arena.erase_bytes(record)
            dram.unpin([record])
            return Reason.FORGOTTEN
        return record
