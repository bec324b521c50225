"""Finding and reading records.

A key may have several records: it was taken in twice, or an eviction was under way when the log was closed. Promise: a
copy that is not what was written, or cannot be read, or was forgotten, costs nothing while there is a good one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from isthmus.contracts.blocks import Outcome, Reason, Tier
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import DiskFailed
from isthmus.contracts.keys import KEY_BYTES
from isthmus.state.kv.log.format import SLOT
from isthmus.state.kv.log.ledger import Ledger, location_of, segment_and_slot
from isthmus.state.kv.log.reader import ReaderPool, Task
from isthmus.state.kv.log.records import Location, LogRead
from isthmus.state.kv.log.segments import READABLE

_ROUNDS = 4
"""How many candidates of one key are read at most: its copies, and those of 40 bits of hash that are the same."""


_ONE_COPY = frozenset({Reason.CORRUPT, Reason.IO_ERROR, Reason.FORGOTTEN})
"""What may befall one copy of a record and not the other."""


@dataclass(slots=True)
class _Asked:
    """One read of a batch: where the record is looked for, and where it was not."""

    read: LogRead
    at: Location
    tried: set[int] = field(default_factory=set)
    task: Task | None = None
    failed: bool = False
    """Whether a copy of it was no good: then it was there, whatever else is found."""


class Lookup:
    """See the module. Safe to call from several threads."""

    def __init__(self, ledger: Ledger, readers: ReaderPool, *, clock: Clock) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._readers = readers
        self._clock = clock

    def locate(self, keys: Sequence[bytes]) -> list[Location | None]:
        """See `SegmentLog.locate`."""
        if not keys:
            return []
        packed = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)
        with self._changed:
            return [self._location(at) for at in self._ledger.index.find(packed).tolist()]

    def hold(self, keys: Sequence[bytes]) -> list[Location | None]:
        """See `SegmentLog.hold`."""
        with self._changed:
            places = self.locate(keys)
            for place in places:
                if place is not None:
                    self._ledger.segments.pin(place.segment, place.generation)
            return places

    def _location(self, at: int) -> Location | None:
        if at < 0:
            return None
        index, slot = segment_and_slot(at)
        segment = self._ledger.segments[index]
        return Location(index, slot, segment.generation) if segment.state in READABLE else None

    def read(self, reads: Sequence[LogRead], timeout_s: float) -> list[Outcome]:
        """See `SegmentLog.read`."""
        deadline = self._clock.monotonic() + timeout_s
        outcomes = [Outcome(Reason.ABSENT, Tier.NVME)] * len(reads)
        left = {index: _Asked(read, read.location) for index, read in enumerate(reads)}
        for _ in range(_ROUNDS):
            left = {index: asked for index, asked in left.items() if self._pinned(asked)}
            if not left:
                break
            try:
                self._run([self._task(asked) for asked in left.values()], deadline)
            finally:
                with self._changed:
                    for asked in left.values():
                        self._ledger.segments.unpin(asked.at.segment)
            with self._changed:
                again = {index: asked for index, asked in left.items() if not self._settled(asked, outcomes, index)}
            left = again
        with self._changed:
            for outcome in outcomes:
                self._ledger.counts[f"read_{outcome.reason}"] += 1
        return outcomes

    def _pinned(self, asked: _Asked) -> bool:
        """Pin where a record is looked for; elsewhere, when it is not there any more."""
        ledger, key = self._ledger, asked.read.want.key
        with self._changed:
            here = location_of(asked.at.segment, asked.at.slot)
            if here in asked.tried or not ledger.segments.pin(asked.at.segment, asked.at.generation):
                asked.tried.add(here)
                others = [at for at in ledger.locate(key) if at not in asked.tried]
                found = self._location(others[0]) if others else None
                if found is None or not ledger.segments.pin(found.segment, found.generation):
                    return False
                asked.at = found
        return True

    def _task(self, asked: _Asked) -> Task:
        start = self._ledger.geometry.start(asked.at.segment) + asked.at.slot * SLOT
        asked.task = Task(asked.read.want, start, asked.at.generation, self._ledger.seed)
        return asked.task

    def _run(self, tasks: list[Task], deadline: float) -> None:
        late = Reason.LATE
        try:
            reader = self._readers.take(deadline - self._clock.monotonic())
            if reader is not None:
                try:
                    reader.run(tasks, self._clock, deadline)
                finally:
                    self._readers.give(reader)
        except DiskFailed:
            late = Reason.IO_ERROR
        for task in tasks:
            task.fail(late)

    def _settled(self, asked: _Asked, outcomes: list[Outcome], index: int) -> bool:
        """Take in how a read ended; False: another candidate is to be tried, if there is one."""
        task, ledger = asked.task, self._ledger
        if task is None or task.reason is None:
            return True
        here = location_of(asked.at.segment, asked.at.slot)
        asked.tried.add(here)
        if task.other:
            return False
        reason, shape = task.reason, asked.read.want.shape
        if reason is Reason.CORRUPT:
            ledger.quarantine(asked.read.want.key, here, shape.chunks, shape.chunk_bytes)
        elif reason is Reason.HIT and task.header is not None:
            header = task.header
            if ledger.erasures.dead(header.key, header.owner, header.stamp):
                reason = Reason.FORGOTTEN
            else:
                ledger.segments[asked.at.segment].hit(asked.at.slot, header.span)
        if reason is Reason.ABSENT and asked.failed:
            return False
        outcomes[index] = Outcome(reason, Tier.NVME)
        asked.failed = asked.failed or reason in _ONE_COPY
        return reason not in _ONE_COPY
