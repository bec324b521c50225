"""Taking records in: a copy into the arena, digests of that copy, and only then visible; from there to the log.

A batch goes slice by slice, so that the log writes one slice while the next is copied, and no more than a slice is kept
from being evicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.contracts.blocks import MAX_BATCH, Outcome, Put, Reason, Tier
from isthmus.state.kv.arena.arena import Record
from isthmus.state.kv.arena.copying import flat
from isthmus.state.kv.parts import Parts, check_batch, log_record

SLICE_BYTES = 4 << 20
SLICE_RECORDS = 256


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes batches of records. Safe from several threads."""

    parts: Parts

    def write(self, puts: Sequence[Put], timeout_s: float, digests: Sequence[bytes] = ()) -> list[Outcome]:
        """See `BlockStore.write`. `digests`: what each record must have once it is here, else it is `CORRUPT`."""
        check_batch(len(puts), MAX_BATCH, "puts")
        deadline = self.parts.until(timeout_s)
        outcomes = [Outcome(Reason.LATE)] * len(puts)
        number = self.parts.scopes.start_write({put.owner for put in puts})
        try:
            for first, last in _slices(puts):
                if self.parts.clock.monotonic() >= deadline:
                    break
                expected = digests[first:last] if digests else [b""] * (last - first)
                outcomes[first:last] = self._write_slice(puts[first:last], expected, deadline)
        finally:
            self.parts.scopes.end_write(number)
        self.parts.counts.add_outcomes("write", outcomes)
        return outcomes

    def _write_slice(self, puts: Sequence[Put], expected: Sequence[bytes], deadline: float) -> list[Outcome]:
        log = self.parts.log
        below = [None] * len(puts) if log is None else log.locate([put.key for put in puts])
        outcomes = [Outcome(Reason.PRESENT, Tier.NVME)] * len(puts)
        kept: list[tuple[int, Record]] = []

        def take(index: int) -> None:
            found = self._take(puts[index], expected[index], self.parts.left(deadline))
            if isinstance(found, Record):
                kept.append((index, found))
            outcomes[index] = Outcome(Reason.STORED if isinstance(found, Record) else found, Tier.DRAM)

        try:
            missing = [index for index, place in enumerate(below) if place is None]
            size = sum(puts[index].shape.record_bytes for index in missing)
            self.parts.crew.together(take, missing, size)
            kept.sort(key=lambda one: one[0])
            for index, outcome in self._append(kept, deadline):
                outcomes[index] = outcome
        finally:
            self.parts.dram.unpin([record for _, record in kept])
        return outcomes

    def _append(self, kept: Sequence[tuple[int, Record]], deadline: float) -> list[tuple[int, Outcome]]:
        """Offer to the log what is in the arena now. What it does not take is in the arena all the same."""
        log, arena = self.parts.log, self.parts.dram.arena
        if log is None or not kept:
            return []
        records = [log_record(arena, one) for _, one in kept]
        found: list[tuple[int, Outcome]] = []
        for (index, record), outcome in zip(kept, log.append(records, self.parts.left(deadline)), strict=True):
            if outcome.reason is Reason.STORED:
                self.parts.dram.append(record, outcome.sequence)
                found.append((index, Outcome(Reason.STORED, Tier.NVME, outcome.sequence)))
            else:
                self.parts.counts.add("append", Tier.NVME, outcome.reason)
                if outcome.reason is Reason.WEAR:
                    self.parts.dram.refuse(record)
                    found.append((index, Outcome(Reason.WEAR, Tier.DRAM)))
                else:
                    found.append((index, Outcome(Reason.STORED, Tier.DRAM)))
        return found

    def _take(self, put: Put, expected: bytes, patience_s: float) -> Record | Reason:
        """The record, visible and pinned; else why not. May wait for room as `Dram.begin` does."""
        dram = self.parts.dram
        record = dram.begin(put.key, put.parent, put.owner, put.shape, put.lifetime, patience_s=patience_s)
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


def _slices(puts: Sequence[Put]) -> list[tuple[int, int]]:
    """Ranges of a batch of at most `SLICE_RECORDS` and about `SLICE_BYTES`."""
    slices: list[tuple[int, int]] = []
    first, size = 0, 0
    for index, put in enumerate(puts):
        size += put.shape.record_bytes
        if size >= SLICE_BYTES or index + 1 - first == SLICE_RECORDS:
            slices.append((first, index + 1))
            first, size = index + 1, 0
    if first < len(puts):
        slices.append((first, len(puts)))
    return slices
