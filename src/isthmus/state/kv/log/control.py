"""Reads and writes outside the two hot paths: directories, erasure tables, scrubs, recovery. Any thread, one at a time.

Ranges need not be aligned for reading. A write covers whole sectors; `patch` changes bytes within them by reading,
changing and writing, for which nobody else may write there at the time.
"""

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import DiskFailed, IsthmusError
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.io.disk import Disk
from isthmus.state.kv.io.transfers import Channel, Op, Transfer
from isthmus.state.kv.log.format import SECTOR, align

IO_LIMIT_S = 30.0
"""How long the disk may take over one call before it counts as failed."""
_DEPTH = 8
_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Made:
    """A channel, and the memory that it moves."""

    buffers: AlignedBuffers
    views: list[memoryview]
    channel: Channel


class Control:
    """See the module. Raises `DiskFailed` for what the disk refuses or does not finish within `IO_LIMIT_S`."""

    def __init__(self, disk: Disk, clock: Clock, *, depth: int = _DEPTH, buffer_bytes: int = _BYTES) -> None:
        self._disk = disk
        self._clock = clock
        self._depth = depth
        self._size = buffer_bytes
        self._lock = threading.Lock()
        self._tags = 0
        self._made: _Made | None = self._make()

    def _make(self) -> _Made:
        buffers = AlignedBuffers(self._depth, self._size)
        views = [view for _ in range(self._depth) if (view := buffers.take()) is not None]
        try:
            return _Made(buffers, views, self._disk.channel(self._depth, buffers))
        except IsthmusError:
            for view in views:
                buffers.give(view)
            buffers.close()
            raise

    def read(self, offset: int, length: int) -> bytearray:
        """The bytes of one range."""
        found = bytearray(length)
        view = memoryview(found)
        first = offset - offset % SECTOR
        pieces = [
            (at, min(self._size, align(offset + length) - at)) for at in range(first, offset + length, self._size)
        ]

        def take(index: int, data: memoryview) -> None:
            at = pieces[index][0]
            begin, end = max(at, offset), min(at + len(data), offset + length)
            view[begin - offset : end - offset] = data[begin - at : end - at]

        failed = self._read(pieces, take)
        view.release()
        if failed:
            raise DiskFailed("read", next(iter(failed.values())))
        return found

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """The bytes of many ranges of whole sectors, each at most a buffer long; None for one that failed."""
        found: list[bytes | None] = [None] * len(ranges)

        def take(index: int, data: memoryview) -> None:
            found[index] = bytes(data)

        self._read(ranges, take)
        return found

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write whole sectors. On failure any part of them may have been written."""
        with self._lock:
            view = memoryview(data)
            pieces = [(offset + at, min(self._size, len(view) - at)) for at in range(0, len(view), self._size)]

            def fill(index: int, target: memoryview) -> None:
                at = pieces[index][0] - offset
                target[:] = view[at : at + len(target)]

            failed = self._run(Op.WRITE, pieces, fill)
        if failed:
            raise DiskFailed("write", next(iter(failed.values())))

    def patch(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Change bytes anywhere; how many were written for it."""
        first = offset - offset % SECTOR
        whole = self.read(first, align(offset + len(data)) - first)
        whole[offset - first : offset - first + len(data)] = data
        self.write(first, whole)
        return len(whole)

    def zero(self, offset: int, length: int) -> None:
        """Make whole sectors read as zeros."""
        self._disk.zero(offset, length)

    def close(self) -> None:
        """End the channel: bounded (see `Channel.close`)."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        """What is in flight may still move these buffers' bytes: nobody goes on with them."""
        made, self._made = self._made, None
        if made is not None:
            made.channel.close()
            for view in made.views:
                made.buffers.give(view)
            made.buffers.close()

    def _read(self, pieces: Sequence[tuple[int, int]], take: Callable[[int, memoryview], None]) -> dict[int, int]:
        with self._lock:
            return self._run(Op.READ, pieces, take)

    def _run(
        self,
        op: Op,
        pieces: Sequence[tuple[int, int]],
        hand: Callable[[int, memoryview], None],
    ) -> dict[int, int]:
        """Move all pieces, several in flight; the errno of each that failed, by its index.

        `hand` is given each piece's memory: of a write, to fill it; of a read, once it was filled.
        """
        failed: dict[int, int] = {}
        # After a failure others are made when they are needed: the disk may refuse that as well, for a while.
        self._made = made = self._made or self._make()
        try:
            self._move(made, op, pieces, hand, failed)
        except DiskFailed:
            self._end()
            raise
        return failed

    def _move(
        self,
        made: _Made,
        op: Op,
        pieces: Sequence[tuple[int, int]],
        hand: Callable[[int, memoryview], None],
        failed: dict[int, int],
    ) -> None:
        idle = list(range(self._depth))
        flying: dict[int, tuple[int, int]] = {}
        following = 0
        deadline = self._clock.monotonic() + IO_LIMIT_S
        while following < len(pieces) or flying:
            batch = []
            while following < len(pieces) and idle:
                number = idle.pop()
                offset, length = pieces[following]
                view = made.views[number][:length]
                if op is Op.WRITE:
                    hand(following, view)
                self._tags += 1
                flying[self._tags] = (following, number)
                batch.append(Transfer(op, offset, view, self._tags))
                following += 1
            if batch:
                made.channel.submit(batch)
            left = deadline - self._clock.monotonic()
            if left <= 0:
                raise DiskFailed(op.name.lower(), errno.ETIMEDOUT)
            for completion in made.channel.wait(1, left):
                index, number = flying.pop(completion.tag)
                idle.append(number)
                if completion.error:
                    failed[index] = completion.error
                elif op is Op.READ:
                    hand(index, made.views[number][: pieces[index][1]])
