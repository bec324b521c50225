"""Reading records: in batches, verified on the copy that the caller gets, copied and hashed while other reads are in
flight.

Promises: a record is `HIT` only when its header's CRC, generation, whole key and shape are right, its digests are those
of the header, and every chunk wanted has its digest *in the caller's buffer*. The disk only ever writes to buffers of
the reader's own, so a read that ends late cannot touch the caller's memory any more.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence

from isthmus.contracts.blocks import DIGEST_BYTES, Reason, Want
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.arena.copying import copy
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.io.disk import Disk
from isthmus.state.kv.io.transfers import Channel, Completion, Op, Transfer
from isthmus.state.kv.log.format import (
    RECORD_HEADER,
    RecordHeader,
    decode_record,
    digests_good,
    payload_offset,
)
from isthmus.state.kv.log.plan import Range, Window, plan, ranges_of, slack_of, window_of

_LEAST_FLYING = 2


class Task:
    """One record of a batch while it is read. `reason` None: not finished. `other`: what is there has another key."""

    __slots__ = ("_arrived", "_begun", "_body", "_head", "_head_left", "_into", "_left", "_seed",
                 "generation", "header", "other", "reason", "start", "want")  # fmt: skip

    def __init__(self, want: Want, start: int, generation: int, seed: int) -> None:
        """`start`: where on the disk the record begins."""
        self.want = want
        self.start = start
        self.generation = generation
        self._seed = seed
        self.reason: Reason | None = None
        self.other = False
        self.header: RecordHeader | None = None
        shape = want.shape
        self._head = bytearray(payload_offset(shape.chunks))
        self._head_left = len(self._head)
        self._body = start + len(self._head) + want.first_chunk * shape.chunk_bytes
        self._into = want.into.cast("B") if want.into.format != "B" or want.into.ndim != 1 else want.into
        self._left = len(self._into)
        self._begun: dict[int, int] = {}
        self._arrived: list[tuple[int, int]] = []

    def ranges(self, index: int) -> list[Range]:
        """What has to be read for it."""
        return ranges_of(index, self.start, self.want.shape, self.want.first_chunk, self.want.count)

    def fail(self, reason: Reason) -> None:
        """It did not come."""
        if self.reason is None:
            self.reason = reason

    def take(self, data: memoryview, at: int) -> None:
        """Bytes of the disk from `at` on, which are part of what it wants."""
        if self.reason is not None:
            return
        end = at + len(data)
        first, last = max(at, self.start), min(end, self.start + len(self._head))
        if first < last:
            self._head[first - self.start : last - self.start] = data[first - at : last - at]
            self._head_left -= last - first
        first, last = max(at, self._body), min(end, self._body + len(self._into))
        if first < last:
            low, high = first - self._body, last - self._body
            copy(data[first - at : last - at], self._into[low:high])
            self._came(low, high)

    def _came(self, low: int, high: int) -> None:
        """Bytes [low, high) of what is wanted are in the caller's buffer: which chunks are whole with that."""
        size = self.want.shape.chunk_bytes
        self._left -= high - low
        first, last = -(-low // size), high // size
        if first < last:
            self._arrived.append((first, last))
        begun = {low // size: min(high, first * size) - low} if low < first * size else {}
        if first <= last and last * size < high:
            begun[last] = high - last * size
        for chunk, length in begun.items():
            self._begun[chunk] = self._begun.get(chunk, 0) + length
            if self._begun[chunk] == size:
                self._arrived.append((chunk, chunk + 1))

    def verify(self) -> None:
        """Check what has arrived. Sets `reason` when that decides it."""
        if self.reason is not None or self._head_left:
            return
        if self.header is None:
            self._check_head()
            if self.header is None:
                return
        size, offset = self.want.shape.chunk_bytes, RECORD_HEADER + self.want.first_chunk * DIGEST_BYTES
        for first, last in self._arrived:
            expected = self._head[offset + first * DIGEST_BYTES : offset + last * DIGEST_BYTES]
            if digests_of(self._into[first * size : last * size], size) != expected:
                self.reason = Reason.CORRUPT
                return
        self._arrived.clear()
        if not self._left:
            self.reason = Reason.HIT

    def _check_head(self) -> None:
        view = memoryview(self._head)
        header = decode_record(view, self._seed)
        if header is None or header.generation != self.generation:
            self.reason = Reason.CORRUPT
        elif header.key != self.want.key:
            self.reason, self.other = Reason.ABSENT, True
        elif header.shape != self.want.shape:
            self.reason = Reason.ABSENT
        elif not digests_good(view, header.shape.chunks):
            self.reason = Reason.CORRUPT
        else:
            self.header = header


class BatchReader:
    """One channel with its buffers: reads one batch at a time. `broken` once something stayed in flight."""

    def __init__(self, disk: Disk, depth: int, size: int) -> None:
        """Raises `DiskFailed`."""
        self._buffers = AlignedBuffers(depth, size + slack_of(size))
        self._views = [view for _ in range(depth) if (view := self._buffers.take()) is not None]
        self._size = size
        self._tags = 0
        # Who reads must not wait for what is late: the housekeeper closes a broken one, while the reader goes on.
        self._channel: Channel = disk.channel(depth, self._buffers, shared=True)
        self.broken = False

    def run(self, tasks: Sequence[Task], clock: Clock, deadline: float) -> None:
        """Read all of them: every one has a reason afterwards."""
        ranges = [one for index, task in enumerate(tasks) for one in task.ranges(index)]
        windows = plan(ranges, window_of(sum(one.end - one.offset for one in ranges), self._size))
        flying: dict[int, tuple[Window, memoryview]] = {}
        try:
            self._read(tasks, windows, flying, clock, deadline)
            late = Reason.LATE
        except DiskFailed:
            late = Reason.IO_ERROR
            self.broken = True
        finally:  # whatever was raised: what is in flight must not land in the next batch
            self.broken = self.broken or bool(flying)
        for task in tasks:
            task.fail(late)

    def _read(
        self,
        tasks: Sequence[Task],
        windows: Sequence[Window],
        flying: dict[int, tuple[Window, memoryview]],
        clock: Clock,
        deadline: float,
    ) -> None:
        waiting = deque(windows)
        idle = list(self._views)
        arrived: deque[tuple[Window, memoryview]] = deque()
        while waiting or flying or arrived:
            left = deadline - clock.monotonic()
            if left > 0:
                self._begin(waiting, flying, idle)
            elif not arrived:
                return
            if arrived:  # while those are in flight
                window, view = arrived.popleft()
                _take_in(tasks, window, view)
                idle.append(view)
            if not flying or left <= 0:
                continue
            for completion in self._ended(arrived, left):
                window, view = flying.pop(completion.tag)
                if completion.error:
                    for part in window.parts:
                        tasks[part.index].fail(Reason.IO_ERROR)
                    idle.append(view)
                else:
                    arrived.append((window, view))

    def _ended(self, arrived: Collection[object], left: float) -> list[Completion]:
        """Reads that have ended: waits for one unless something has arrived; those that came with it, too."""
        ended = [] if arrived else self._channel.wait(1, left)
        return ended + self._channel.wait(0, 0.0)

    def _begin(
        self, waiting: deque[Window], flying: dict[int, tuple[Window, memoryview]], idle: list[memoryview]
    ) -> None:
        """Begin as many reads as are good to have in flight.

        Not more than half of the buffers, so that there are some to read on with while what arrived is copied and
        hashed; and towards the end fewer and fewer, for there are disks whose completions are heard of all at once
        when they have nothing more to do, and nothing overlaps with what arrives last.
        """
        most = min(max(1, len(self._views) // 2), max(_LEAST_FLYING, -(-len(waiting) // 2)))
        batch = []
        while waiting and idle and len(flying) < most:
            window, view = waiting.popleft(), idle.pop()
            self._tags += 1
            flying[self._tags] = (window, view)
            batch.append(Transfer(Op.READ, window.offset, view[: window.end - window.offset], self._tags))
        if batch:
            self._channel.submit(batch)

    def close(self) -> None:
        """End the channel: bounded (see `Channel.close`)."""
        self._channel.close()
        for view in self._views:
            self._buffers.give(view)
        self._buffers.close()


def _take_in(tasks: Sequence[Task], window: Window, view: memoryview) -> None:
    """Copy what a window brought, and hash it while it is in the processor's cache."""
    for part in window.parts:
        tasks[part.index].take(view[part.offset - window.offset : part.end - window.offset], part.offset)
    for index in dict.fromkeys(part.index for part in window.parts):
        tasks[index].verify()


class ReaderPool:
    """A bounded number of readers, made when first needed. Safe to call from several threads."""

    def __init__(self, make: Callable[[], BatchReader], most: int) -> None:
        self._make = make
        self._changed = threading.Condition()
        self._idle: list[BatchReader] = []
        self._broken: list[BatchReader] = []
        self._room = most
        self._closed = False

    def take(self, timeout_s: float) -> BatchReader | None:
        """A reader, or None when none is free in time. Raises `DiskFailed` when none can be made."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._room or self._closed, max(0.0, timeout_s))
            if self._closed:
                return None
            if self._idle:
                return self._idle.pop()
            if not self._room:
                return None
            self._room -= 1
        reader = None
        try:
            reader = self._make()
        finally:
            if reader is None:
                self._more_room()
        return reader

    def give(self, reader: BatchReader) -> None:
        """Give back what `take` returned."""
        with self._changed:
            if not self._closed and not reader.broken:
                self._idle.append(reader)
                self._changed.notify()
                return
            self._broken.append(reader)

    def mend(self) -> bool:
        """Close the broken ones, so that others can be made; whether there were any. May wait as closing a channel
        does.
        """
        with self._changed:
            broken, self._broken = self._broken, []
        for reader in broken:
            reader.close()
            self._more_room()
        return bool(broken)

    def _more_room(self) -> None:
        with self._changed:
            self._room += 1
            self._changed.notify()

    def close(self) -> None:
        """Close all; one that is in use when it is given back and `mend` is called."""
        with self._changed:
            self._closed = True
            self._broken += self._idle
            self._idle = []
            self._changed.notify_all()
        self.mend()
