"""Taking records in: admitted, given room and a sequence, copied. In order, as far as memory goes."""

from collections import deque
from collections.abc import Sequence

from isthmus.contracts.blocks import Outcome, Reason, Tier
from isthmus.contracts.clock import Clock
from isthmus.state.kv.arena.crew import Crew, together
from isthmus.state.kv.log.admission import Admission
from isthmus.state.kv.log.drive import Driver
from isthmus.state.kv.log.format import EXTENT_HEADER, SECTOR, RecordHeader, align, footer_bytes, record_span
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.records import LogRecord
from isthmus.state.kv.log.staging import Slot

_GROUP = 64
"""Most records that get room under one hold of the lock."""
_GROUP_BYTES = 4 << 20
"""About how much of them is copied before the disk is told: it writes that while the next is copied."""


class Intake:
    """See the module. Safe to call from several threads; who waits for memory is served in the order of coming."""

    def __init__(
        self,
        ledger: Ledger,
        driver: Driver,
        admission: Admission,
        *,
        tenant_bytes: int,
        clock: Clock,
        crew: Crew | None = None,
    ) -> None:
        self._ledger = ledger
        self._crew = crew
        self._changed = ledger.changed
        self._driver = driver
        self._admission = admission
        self._tenant_bytes = tenant_bytes
        self._clock = clock
        self._turns: deque[object] = deque()
        self._spent = 0
        self.closed = False
        segment = ledger.geometry.segment_bytes
        extent = min(segment - SECTOR - footer_bytes(1), align(EXTENT_HEADER + ledger.staging.largest_span))
        self.largest_span = extent - EXTENT_HEADER

    def append(self, records: Sequence[LogRecord], timeout_s: float) -> list[Outcome]:
        """See `SegmentLog.append`."""
        deadline = self._clock.monotonic() + timeout_s
        outcomes: list[Outcome] = []
        while len(outcomes) < len(records):
            with self._changed:
                group = self._reserve(records, outcomes)
                if not group and len(outcomes) < len(records):
                    group = self._wait(records[len(outcomes)], outcomes, deadline)
            try:
                together(self._crew, self._fill, group, sum(record.shape.record_bytes for record, _, _ in group))
            finally:
                with self._changed:
                    for _, _, slot in group:
                        slot.extent.copying -= 1
                    # The writer has something to do, or will have when an extent has lingered.
                    if any(self._ledger.staging.queues) or any(slot.start == EXTENT_HEADER for _, _, slot in group):
                        self._changed.notify_all()
        with self._changed:
            for outcome in outcomes:
                self._ledger.counts[f"append_{outcome.reason}"] += 1
        return outcomes

    def _fill(self, taken: tuple[LogRecord, RecordHeader, Slot]) -> None:
        record, header, slot = taken
        payload = record.payload.cast("B") if record.payload.nbytes else record.payload
        self._ledger.staging.fill(slot, header, record.digests, payload)

    def _reserve(
        self, records: Sequence[LogRecord], outcomes: list[Outcome]
    ) -> list[tuple[LogRecord, RecordHeader, Slot]]:
        """Give room to the next records, until memory is short; what is refused gets its outcome."""
        group: list[tuple[LogRecord, RecordHeader, Slot]] = []
        now = self._clock.monotonic()
        size = 0
        while len(outcomes) < len(records) and len(group) < _GROUP and size < _GROUP_BYTES and not self._turns:
            record = records[len(outcomes)]
            refused = self._refused(record, now)
            if refused is not None:
                outcomes.append(Outcome(refused))
                continue
            taken = self._take(record, now)
            if taken is None:
                break
            group.append(taken)
            outcomes.append(Outcome(Reason.STORED, Tier.NVME, taken[1].sequence))
            size += record.shape.record_bytes
        return group

    def _wait(
        self, record: LogRecord, outcomes: list[Outcome], deadline: float
    ) -> list[tuple[LogRecord, RecordHeader, Slot]]:
        """Wait for memory, behind those who wait already."""
        turn = object()
        found: list[tuple[LogRecord, RecordHeader, Slot]] = []

        def ready() -> bool:
            if self.closed or self._ledger.read_only:
                return True
            if self._turns[0] is not turn:
                return False
            taken = self._take(record, self._clock.monotonic())
            if taken is not None:
                found.append(taken)
            return taken is not None

        self._turns.append(turn)
        try:
            self._driver.wait(ready, deadline - self._clock.monotonic())
        finally:
            self._turns.remove(turn)
        if found:
            outcomes.append(Outcome(Reason.STORED, Tier.NVME, found[0][1].sequence))
        else:
            outcomes.append(Outcome(self._refused(record, self._clock.monotonic()) or Reason.FULL))
        return found

    def _refused(self, record: LogRecord, now: float) -> Reason | None:
        """Why a record is not taken in, whatever memory there is."""
        ledger = self._ledger
        if self.closed:
            return Reason.UNAVAILABLE
        if ledger.read_only:
            return Reason.IO_ERROR
        span = record_span(record.shape.chunks, record.shape.chunk_bytes)
        if span > self.largest_span or not ledger.staging.head_fits(record.shape.chunks):
            return Reason.TOO_LARGE
        used = ledger.usage.get(record.owner.namespace_id, 0)
        if self._tenant_bytes and used + span > self._tenant_bytes:
            return Reason.QUOTA
        self._admission.spend(ledger.written_bytes - self._spent, now)
        self._spent = ledger.written_bytes
        if not self._admission.admits(span, record.lifetime, record.hits, now):
            return Reason.WEAR
        return None

    def _take(self, record: LogRecord, now: float) -> tuple[LogRecord, RecordHeader, Slot] | None:
        ledger = self._ledger
        header = RecordHeader(
            record.key,
            record.parent,
            record.owner,
            record.shape,
            record.lifetime,
            ledger.erasures.epoch,
            ledger.sequence + 1,
        )
        slot = ledger.staging.reserve(record.lifetime, header, now)
        if slot is None:
            return None
        ledger.take(slot, header)
        ledger.taken_bytes += record.shape.record_bytes
        return record, header, slot
