"""What writes to segments: headers, extents, footers. One object, driven step by step by one thread.

The order of writes

1. a segment's header, with its new generation; synced before the segment takes its first extent, so that a crash leaves
either the old generation whole or the new one;
2. extents, several in flight; in the index when complete;
3. the footer, only when every extent of the segment is durable; the segment is sealed when the footer is synced.

Syncs are somebody else's (commit.py): `step` only ever waits for writes, and no longer than it is told to.
"""

import errno
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.io.transfers import Channel, Completion, Op, Transfer
from isthmus.state.kv.log.format import (
    CLASSES,
    ENTRY,
    SECTOR,
    SURVIVORS,
    Rows,
    SegmentHeader,
    encode_footer,
    footer_at,
)
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.segments import LEAST, RESERVED, Segment, State
from isthmus.state.kv.log.settings import LogSettings
from isthmus.state.kv.log.staging import Extent

_SOON_PART = 4
"""The last part of a segment: when it is begun, the next segment should be ready."""

_ORDER = (SURVIVORS, *range(SURVIVORS))
_DEAF = 100
"""Waits that fail in a row: from then on nobody waits for the ends of writes. One may be a single call's failure."""


@dataclass(frozen=True, slots=True)
class Own:
    """Buffers that are the writer's alone: for one footer, and for a header of each class."""

    footers: memoryview
    headers: memoryview


@dataclass(slots=True)
class Lane:
    """The segments of one class: the one that takes extents, and the one after it."""

    open: Segment | None = None
    next: Segment | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """A write under way, of one or more transfers. Without an extent: a header, or (`footer` > 0) a footer."""

    segment: Segment
    extent: Extent | None = None
    footer: int = 0
    left: int = 0
    error: int = 0


class Writer:
    """See the module. `changed` guards the ledger and is told of every change."""

    def __init__(
        self,
        ledger: Ledger,
        channel: Channel,
        own: Own,
        *,
        settings: LogSettings,
        uuid: bytes,
        clock: Clock,
    ) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._channel = channel
        self._footers, self._headers = own.footers, own.headers
        self._linger_s = settings.linger_s
        self._uuid = uuid
        self._clock = clock
        self.lanes = [Lane() for _ in range(CLASSES)]
        self._jobs: dict[int, _Job] = {}
        self._tags = 0
        self._backlog: deque[Transfer] = deque()
        self._footing = False
        self._unheard = 0
        """Waits in a row that failed."""

    @property
    def in_flight(self) -> int:
        """Writes that have not completed; 0 when nobody can hear of that any more."""
        return 0 if self._unheard >= _DEAF else self._channel.in_flight + len(self._backlog)

    def wanted(self, now: float) -> bool:
        """Whether a step would find something to do."""
        staging = self._ledger.staging
        if self.in_flight or any(queue and not queue[0].copying for queue in staging.queues):
            return True
        flush_to = self._ledger.flush_to
        return any(
            one is not None and (one.first_sequence <= flush_to or now - one.begun >= self._linger_s)
            for one in staging.filling
        )

    def step(self, now: float, patience_s: float = 0.0) -> bool:
        """Take in what has completed, begin what can begin. Waits at most `patience_s` for a completion.

        Returns whether anything was begun or completed.
        """
        try:
            ended = self._completed(patience_s)
            self._unheard = 0
        except DiskFailed as error:
            with self._changed:
                self._ledger.counts["write_errors"] += not self._unheard
                self._unheard += 1
                self._ledger.refuse(f"writes cannot be waited for: {error}")
                self._changed.notify_all()
            return False
        begun = self._begin(now)  # more for the disk to do, before the books are made of what it has done
        with self._changed:
            for completion in ended:
                self._ended(completion.tag, completion.error, now)
            headers = self._ahead()
            footer = self._footer()
            if ended:
                self._changed.notify_all()
        for segment in headers:
            self._write_header(segment)
        if footer is not None:
            self._write_footer(*footer)
        return self._submit(now) or begun or bool(ended)

    def _begin(self, now: float) -> bool:
        """Begin to write the extents that can be written; whether there were any."""
        with self._changed:
            self._ledger.staging.close_due(now, self._linger_s, self._ledger.flush_to)
            extents = self._choose()
        for extent in extents:
            self._write_extent(extent)
        return self._submit(now)

    def _completed(self, patience_s: float) -> list[Completion]:
        """Writes that have completed: waits for one, takes in those that came with it."""
        if not self._channel.in_flight:
            return []
        if patience_s <= 0:
            return self._channel.wait(0, 0.0)
        ended = self._channel.wait(1, patience_s)
        with suppress(DiskFailed):  # the next step hears of it
            ended += self._channel.wait(0, 0.0)
        return ended

    def adopt(self, lane: int, segment: Segment) -> None:
        """An OPEN segment, found when the log was opened, takes the extents of its class."""
        self.lanes[lane].open = segment

    # Choosing, under the lock

    def _choose(self) -> list[Extent]:
        """Extents that can be written now, each with its place."""
        chosen: list[Extent] = []
        room = self._channel.depth - self.in_flight
        queues = self._ledger.staging.queues
        going = list(_ORDER)
        while room > 0 and going:
            for lane in list(going):
                queue = queues[lane]
                segment = self._segment_for(lane, queue[0]) if queue and not queue[0].copying else None
                if segment is None or room <= 0:
                    going.remove(lane)
                    continue
                extent = queue.popleft()
                self._ledger.assign(extent, segment)
                chosen.append(extent)
                room -= len(extent.buffers)
        return chosen

    def _segment_for(self, number: int, extent: Extent) -> Segment | None:
        """The segment that takes this extent; None: there is none yet."""
        lane, segments = self.lanes[number], self._ledger.segments
        self._look_after(lane)
        if lane.open is not None:
            if lane.open.fenced:
                return None
            if lane.open.fits(extent.size, extent.records, segments.most_records):
                return lane.open
            segments.move(lane.open, State.CLOSING)
            lane.open = None
        if lane.next is not None and lane.next.state is State.READY and not lane.next.fenced:
            segments.move(lane.next, State.OPEN)
            lane.open, lane.next = lane.next, None
            return lane.open if lane.open.fits(extent.size, extent.records, segments.most_records) else None
        self._ledger.urgent = True
        return None

    def _look_after(self, lane: Lane) -> None:
        """Forget segments that are not the lane's any more."""
        if lane.open is not None and lane.open.state is not State.OPEN:
            lane.open = None
        if lane.next is not None and lane.next.state not in (State.PREPARED, State.READY):
            lane.next = None

    def _ahead(self) -> list[Segment]:
        """Segments to prepare: for lanes that wait for one, and for those whose own is half full."""
        segments = self._ledger.segments
        taken: list[Segment] = []
        for lane in self.lanes:
            self._look_after(lane)
        for number in _ORDER:
            lane = self.lanes[number]
            if lane.next is not None:
                self._hurry(lane.open, lane.next)
                continue
            waits = lane.open is None and bool(self._ledger.staging.queues[number])
            half = lane.open is not None and lane.open.end > lane.open.size // 2
            if not waits and not (half and segments.count(State.FREE) > RESERVED + 1):
                continue
            lane.next = segments.take(number)
            if lane.next is not None:
                lane.next.opened = self._clock.wall()
                lane.next.born = self._ledger.written_bytes
                lane.next.first_sequence = self._ledger.sequence + 1
                lane.next.rows = []
                taken.append(lane.next)
            elif waits:
                self._stuck(lane)
        return taken

    def _hurry(self, last: Segment | None, following: Segment) -> None:
        """Have a header synced before its segment is needed: who waits for a sync writes nothing."""
        written = following.state is State.PREPARED and following.ticket > 0
        if written and last is not None and last.end > last.size - last.size // _SOON_PART:
            self._ledger.urgent = True

    def _stuck(self, waiting: Lane) -> None:
        """A lane waits for a segment and none is free: see that one gets free, or give up."""
        segments = self._ledger.segments
        if len(segments) - segments.count(State.RETIRED) < LEAST:
            self._ledger.give_up()
            return
        if segments.count(State.SEALED) or segments.count(State.CLOSING) or segments.count(State.PREPARED):
            return
        for lane in self.lanes:
            if lane.next is not None and lane.next.state is State.READY:
                waiting.next, lane.next = lane.next, None
                return
        for lane in self.lanes:
            if lane.open is not None and lane.open.extents and not lane.open.fenced:
                segments.move(lane.open, State.CLOSING)
                lane.open = None
                return
        if not segments.count(State.OPEN):
            self._ledger.give_up()

    def _footer(self) -> tuple[Segment, list[Rows]] | None:
        """A segment whose footer can be written: everything in it is durable."""
        if self._footing:
            return None
        for segment in self._ledger.segments.having(State.CLOSING):
            if not segment.ticket and not self._ledger.pending(segment):
                self._footing = True
                return segment, list(segment.rows or [])
        return None

    def _ended(self, tag: int, error: int, now: float) -> None:
        job = self._jobs.pop(tag)
        job.left -= 1
        job.error = job.error or error
        if job.left:
            return
        if job.extent is not None:
            self._ledger.extent_written(job.extent, job.error, now)
        elif job.footer:
            self._footing = False
            self._ledger.footer_written(job.segment, job.footer, job.error, now)
        else:
            self._ledger.header_written(job.segment, job.error, SECTOR, now)

    # Writing, without the lock

    def _write_extent(self, extent: Extent) -> None:
        segment = extent.segment
        if segment is not None:
            at = self._ledger.geometry.start(segment.index) + extent.at
            self._enqueue(_Job(segment, extent), at, extent.finish(self._ledger.seed))

    def _write_header(self, segment: Segment) -> None:
        header = SegmentHeader(segment.index, segment.generation, segment.lane, segment.opened, segment.first_sequence)
        view = self._headers[segment.lane * SECTOR : (segment.lane + 1) * SECTOR]
        view[:] = header.encode(self._uuid, self._ledger.seed)
        self._enqueue(_Job(segment), self._ledger.geometry.start(segment.index), [view])

    def _write_footer(self, segment: Segment, parts: list[Rows]) -> None:
        rows = np.concatenate(parts) if parts else np.empty(0, ENTRY)
        header = SegmentHeader(segment.index, segment.generation, segment.lane, segment.opened, segment.first_sequence)
        size = encode_footer(
            self._footers,
            rows,
            header,
            segment_bytes=segment.size,
            data_end=segment.end,
            seed=self._ledger.seed,
        )
        at = footer_at(segment.size, len(rows))
        start = self._ledger.geometry.start(segment.index)
        self._enqueue(_Job(segment, footer=at), start + at, [self._footers[:size]])

    def _enqueue(self, job: _Job, at: int, views: list[memoryview]) -> None:
        for view in views:
            self._tags += 1
            self._jobs[self._tags] = job
            job.left += 1
            self._backlog.append(Transfer(Op.WRITE, at, view, self._tags))
            at += len(view)

    def _submit(self, now: float) -> bool:
        room = self._channel.depth - self._channel.in_flight
        batch = [self._backlog.popleft() for _ in range(min(room, len(self._backlog)))]
        if not batch:
            return False
        try:
            self._channel.submit(batch)
        except DiskFailed as error:
            with self._changed:
                for transfer in batch:
                    self._ended(transfer.tag, error.errno or errno.EIO, now)
                self._changed.notify_all()
        return True


def buffers_for(settings: LogSettings) -> AlignedBuffers:
    """Memory for a writer: staging, one buffer for footers, one for headers."""
    return AlignedBuffers(settings.staging_bytes // settings.extent_bytes + 2, settings.extent_bytes)
