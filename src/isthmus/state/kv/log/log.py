"""The segment log: records on one disk that survive a crash, are verified when they are read, and stay forgotten.

Promises, each kept by the module named

- a record is found only after its write completed, and is durable once `durable` is at or over its sequence (ledger.py,
commit.py);
- what is read is what was written, byte for byte, or it is no `HIT` (reader.py);
- what was forgotten before a `forget` returned is never read again, by whatever crash (forgetting.py), and is soon off
the disk (scrub.py);
- the disk's capacity is never exceeded; room is made ahead of need, whole segments at a time (evict.py);
- no call waits longer than its own limit; queues and memory are bounded (staging.py).

Lock order: a forget's lock, the committer's, the ledger's (`changed`), then the leaves (a control's, a pool's,
buffers'). Nothing waits for the disk with the ledger's lock held.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from isthmus.contracts.blocks import MAX_BATCH, Outcome
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import TooLarge
from isthmus.state.kv.log.audit import Auditor
from isthmus.state.kv.log.drive import Driver
from isthmus.state.kv.log.erasure import Forgotten, Scope
from isthmus.state.kv.log.evict import Evictor
from isthmus.state.kv.log.forgetting import Forgetting
from isthmus.state.kv.log.intake import Intake
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.lookup import Lookup
from isthmus.state.kv.log.records import Location, LogEntry, LogRead, LogRecord, LogStats, Verified
from isthmus.state.kv.log.segments import State, class_name

_CLOSE_S = 30.0


def _nobody(done: int, total: int) -> None:
    pass


class SegmentLog:
    """See the module. Made by `open_log` (opening.py). Safe to call from several threads."""

    def __init__(
        self,
        ledger: Ledger,
        driver: Driver,
        *,
        clock: Clock,
        intake: Intake,
        lookup: Lookup,
        auditor: Auditor,
        evictor: Evictor,
        forgetting: Forgetting,
        opened: ExitStack,
    ) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._driver = driver
        self._clock = clock
        self._intake = intake
        self._lookup = lookup
        self._auditor = auditor
        self._evictor = evictor
        self._forgetting = forgetting
        self._opened = opened
        self._closed = False

    # Records

    @property
    def largest_span(self) -> int:
        """Bytes of the largest record that is taken in, with its header and digests (`format.record_span`)."""
        return self._intake.largest_span

    def append(self, records: Sequence[LogRecord], timeout_s: float) -> list[Outcome]:
        """Take records in; their payloads are copied before this returns.

        `STORED` with a sequence: it will be found once its write has completed. `FULL`: there was no memory for it
        within `timeout_s`. `TOO_LARGE`, `QUOTA`, `WEAR`: it is not taken. `IO_ERROR`: the disk cannot be written any
        more. `UNAVAILABLE`: the log is closed.
        """
        _check_batch(records)
        return self._intake.append(records, timeout_s)

    def locate(self, keys: Sequence[bytes]) -> list[Location | None]:
        """Where each key's record probably is; only a read knows. None: it is certainly not here."""
        _check_batch(keys)
        return self._lookup.locate(keys)

    def hold(self, keys: Sequence[bytes]) -> list[Location | None]:
        """As `locate`, and in the same step what is found is kept from being reused until it is let go by `unpin`."""
        _check_batch(keys)
        return self._lookup.hold(keys)

    def unpin(self, location: Location) -> None:
        """Let go of what `hold` found."""
        with self._changed:
            segments = self._ledger.segments
            segments.unpin(location.segment)
            # Only who evicts waits for that; to wake everybody for each read costs more than a small read itself.
            if not segments[location.segment].pins and not self._evictor.idle:
                self._changed.notify_all()

    def read(self, reads: Sequence[LogRead], timeout_s: float) -> list[Outcome]:
        """Read records, verified, into the caller's buffers (what is in one means nothing unless it is a `HIT`).

        `ABSENT`: none has the key and the shape. `CORRUPT`: it is not what was written, and is not found any more.
        `FORGOTTEN`, `IO_ERROR`, `LATE`.
        """
        _check_batch(reads)
        return self._lookup.read(reads, timeout_s)

    def flush(self, timeout_s: float) -> int:
        """Make durable what was appended before the call; the watermark when it is, or when the time is over."""
        with self._changed:
            ledger, target = self._ledger, self._ledger.sequence
            ledger.flush_to = max(ledger.flush_to, target)
            if not self._closed:
                self._driver.wait(lambda: ledger.durable >= target or bool(ledger.read_only), timeout_s)
            return ledger.durable

    @property
    def sequence(self) -> int:
        """The last sequence given out."""
        return self._ledger.sequence

    @property
    def durable(self) -> int:
        """Every record with a sequence up to this survives a crash, unless it was evicted or forgotten."""
        return self._ledger.durable

    @property
    def findable(self) -> int:
        """Every record with a sequence up to this is found, unless it was evicted, forgotten or lost."""
        with self._changed:
            return self._ledger.findable

    def await_findable(self, sequence: int, timeout_s: float) -> bool:
        """Have what was appended up to `sequence` written without waiting for more to go with it; whether it can be
        found within `timeout_s`. With a disk that cannot be written to any more nothing is waited for.
        """
        with self._changed:
            ledger = self._ledger
            ledger.staging.close_due(self._clock.monotonic(), float("inf"), sequence)
            self._driver.wait(lambda: ledger.findable >= sequence or bool(ledger.read_only), timeout_s)
            return ledger.findable >= sequence

    # Keeping house

    def forget(self, scope: Scope) -> int:
        """Forget a scope; durable when this returns. See `Forgetting.forget` for what it raises."""
        return self._forgetting.forget(scope)

    @property
    def erasures(self) -> tuple[Forgotten, ...]:
        """What was forgotten, oldest first: all that is being carried out, and as much of the rest as there is room."""
        return self._ledger.erasures.entries

    def describe(self, keys: Sequence[bytes]) -> list[LogEntry | None]:
        """What the log knows of records, from their headers."""
        _check_batch(keys)
        return self._auditor.describe(keys)

    def scan(self) -> Iterator[LogEntry]:
        """Every record that can be found, segment by segment (without parents). What comes or goes meanwhile may be
        missing.
        """
        return self._auditor.scan()

    def verify(self, progress: Callable[[int, int], None] = _nobody) -> Verified:
        """Read and verify everything; what is not as it was written is not found any more. `progress` is told how many
        segments of how many are done.
        """
        return self._auditor.verify(progress)

    def evict(self, size: int, timeout_s: float) -> int:
        """Evict segments, the least worth first, of at least `size` bytes; bytes freed when done or out of time."""
        with self._changed:
            before = self._evictor.freed_bytes
            self._evictor.stalled = False
            self._evictor.wanted += -(-max(0, size) // self._ledger.geometry.segment_bytes)
            self._driver.wait(lambda: not self._evictor.wanted or self._evictor.stalled, timeout_s)
            self._evictor.wanted = 0
            return self._evictor.freed_bytes - before

    def compact(self, timeout_s: float) -> int:
        """Merge what is alive in sealed segments that are at most half alive; how many segments that freed."""
        with self._changed:
            ledger, before = self._ledger, self._ledger.counts["segments_evicted"]
            half = ledger.geometry.segment_bytes // 2
            sparse = [one.index for one in ledger.segments.having(State.SEALED) if one.live_bytes <= half]
            self._evictor.whole |= set(sparse)
            self._driver.wait(lambda: not self._evictor.whole or bool(ledger.read_only), timeout_s)
            self._evictor.whole.clear()
            return ledger.counts["segments_evicted"] - before

    # Figures

    def used_by(self, namespace_id: bytes) -> int:
        """Bytes that a namespace's records take, those on their way to the disk included."""
        with self._changed:
            return self._ledger.usage.get(namespace_id, 0)

    def stats(self) -> LogStats:
        """A snapshot."""
        with self._changed:
            ledger, segments = self._ledger, self._ledger.segments
            lag_bytes, lag_s = ledger.lag(self._clock.monotonic())
            classes: dict[str, int] = {}
            for segment in segments.having(State.OPEN, State.CLOSING, State.SEALED, State.RETIRED):
                classes[class_name(segment.lane)] = classes.get(class_name(segment.lane), 0) + 1
            return LogStats(
                capacity=ledger.geometry.segments * ledger.geometry.segment_bytes,
                used=sum(segment.live_bytes for segment in segments.all),
                records=len(ledger.index),
                sequence=ledger.sequence,
                durable=ledger.durable,
                lag_bytes=lag_bytes,
                lag_s=lag_s,
                taken_bytes=ledger.taken_bytes,
                written_bytes=ledger.written_bytes,
                write_amplification=ledger.written_bytes / ledger.taken_bytes if ledger.taken_bytes else 0.0,
                segments={state.name.lower(): segments.count(state) for state in State},
                classes=classes,
                counts=dict(ledger.counts),
                index_bytes=ledger.index.memory_bytes,
                pins=sum(segment.pins for segment in segments.all),
                erasure_epoch=ledger.erasures.epoch,
                erasures_pending=len(ledger.erasures.pending),
                read_only=ledger.read_only,
            )

    def step(self) -> bool:
        """For simulations: every object of the log makes one step; whether any found something to do. Nothing when
        threads do that.
        """
        return self._driver.step()

    def check(self) -> None:
        """Raise `SegmentsCorrupt` when the books contradict themselves. For tests, at any moment."""
        with self._changed:
            self._ledger.segments.check()

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Make durable what was taken in, within `timeout_s`, and let go of the disk without closing it. May be called
        twice.
        """
        with self._changed:
            if self._intake.closed:
                return
            self._intake.closed = True
        self.flush(timeout_s)
        self._closed = True
        self._driver.stop()
        self._opened.close()


def _check_batch(batch: Sequence[object]) -> None:
    if len(batch) > MAX_BATCH:
        raise TooLarge(f"a batch has at most {MAX_BATCH} entries, not {len(batch)}", "batch")
