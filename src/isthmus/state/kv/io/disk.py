"""The disk under the log: one preallocated file, or a raw block device, opened by one process at a time.

Promises

- a file has its whole capacity reserved before `open_disk` returns, or it is not there: a crash or a full filesystem
  in between leaves an empty file, which the next opening takes for a new one;
- nobody else has it open: not another process, not this one twice, and not a mounted filesystem;
- transfers go past the page cache (O_DIRECT) where the filesystem can do that; `backend_reason` says where not;
- every failing call is an error of `contracts/errors.py` or of a completion; none is taken for success.
"""

import errno
import fcntl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

from isthmus.contracts.errors import DiskFailed, InvalidInput, StoreLocked, StoreUnavailable
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.io.calls import FALLOC_KEEP_SIZE, FALLOC_ZERO_RANGE, Calls
from isthmus.state.kv.io.opening import UNSUPPORTED, Opened, failing, opened, uninterrupted
from isthmus.state.kv.io.ring import RingChannel
from isthmus.state.kv.io.threads import ThreadChannel
from isthmus.state.kv.io.transfers import (
    MAX_DEPTH,
    SECTOR,
    Channel,
    Completion,
    Flight,
    Op,
    Target,
    Transfer,
    progress,
)
from isthmus.state.kv.io.uring import refusal

__all__ = ["SECTOR", "AlignedBuffers", "Backend", "Channel", "Completion", "Disk", "Op", "Transfer", "open_disk"]

Backend = Literal["auto", "io_uring", "threads"]

CLOSE_S = 10.0
"""How long the closing of a channel waits for what is in flight."""
LOCK_S = 3.0
"""How long a disk that somebody else has open is tried: a process that was killed keeps the lock a moment longer than
its life, until the kernel has taken down its rings.
"""
_LOCK_PAUSE_S = 0.01

_CAPACITY_END = 1 << 62
_ZEROS_BYTES = 1 << 20


class Disk(Protocol):
    """A disk that is open. Safe to call from several threads; its channels are for one thread at a time each."""

    @property
    def capacity(self) -> int:
        """Bytes, a multiple of `SECTOR`; it does not change."""
        ...

    @property
    def backend(self) -> str:
        """What carries transfers: `io_uring` or `threads`."""
        ...

    @property
    def backend_reason(self) -> str:
        """What it has to go without, and why: io_uring, O_DIRECT, registered buffers. Empty: nothing."""
        ...

    @property
    def lost(self) -> int:
        """Transfers that closed channels gave up on (see `Channel.lost`)."""
        ...

    def channel(self, depth: int, buffers: AlignedBuffers | None = None, *, shared: bool = False) -> Channel:
        """A channel for up to `depth` transfers in flight; memory in `buffers` moves fastest. Raises `DiskFailed`.

        `shared`: another thread than the one that uses it may close it with transfers in flight.
        """
        ...

    def sync(self) -> None:
        """Make durable every write whose completion was had. Raises `DiskFailed`: what was written since the last good
        sync is then of unknown state for good, and a second try would say nothing about it.
        """
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, without giving back its room. Durable after a `sync`. Raises `DiskFailed`.

        The filesystem may only note that: cells of the medium can keep the old bytes, as they do after any write to it.
        """
        ...

    def close(self) -> None:
        """Close the channels, then let go of the disk. May be called twice."""
        ...


def open_disk(
    path: Path,
    *,
    capacity: int | None = None,
    create: bool = False,
    backend: Backend = "auto",
    calls: Calls | None = None,
    close_s: float = CLOSE_S,
) -> Disk:
    """Open the file or block device `path` for this process alone.

    `capacity` (bytes): of a new file, or what an existing one must have; a device must have at least as much. None: as
    large as it is. `create`: make the file, for its owner only, when there is none. `backend`: `auto` takes io_uring
    where the kernel and the processor allow it.

    Raises `InvalidInput` (a capacity that cannot be, a symbolic link, somebody else's file), `StoreLocked`, `StoreFull`
    (and no file is left), `StoreUnavailable` (io_uring demanded and not to be had), `DiskFailed` (any call's failure).
    """
    if capacity is not None and (not SECTOR <= capacity < _CAPACITY_END or capacity % SECTOR):
        raise InvalidInput(f"a capacity is a multiple of {SECTOR} bytes, not {capacity}", "capacity")
    calls = calls or Calls()
    reason = "io_uring: threads were asked for" if backend == "threads" else refusal(calls)
    if backend == "io_uring" and reason:
        raise StoreUnavailable(reason)
    found = _opened_in_time(calls, path, capacity, create)
    target = Target(calls, found.fd, found.capacity, close_s)
    return FileDisk(target, found.device, "threads" if reason else "io_uring", [reason, found.note])


def _opened_in_time(calls: Calls, path: Path, capacity: int | None, create: bool) -> Opened:
    """As `opened`; who is dying has time to be gone."""
    deadline = calls.monotonic() + LOCK_S
    while True:
        try:
            return opened(calls, path, capacity, create)
        except StoreLocked:
            if calls.monotonic() >= deadline:
                raise
        calls.pause(_LOCK_PAUSE_S)


class FileDisk:
    """`Disk` over a descriptor that `open_disk` opened and locked."""

    def __init__(self, target: Target, device: bool, backend: str, notes: Iterable[str]) -> None:
        self._target = target
        self._device = device
        self._backend = backend
        self._notes = [note for note in notes if note]
        self._channels: list[RingChannel | ThreadChannel] = []
        self._lost = 0
        self._closed = False
        self._users = 0
        self._changed = threading.Condition()

    @property
    def capacity(self) -> int:
        """See `Disk`."""
        return self._target.capacity

    @property
    def backend(self) -> str:
        """See `Disk`."""
        return self._backend

    @property
    def backend_reason(self) -> str:
        """See `Disk`."""
        with self._changed:
            return "; ".join(self._notes)

    @property
    def lost(self) -> int:
        """See `Disk`."""
        with self._changed:
            self._forget_ended()
            return self._lost

    def channel(self, depth: int, buffers: AlignedBuffers | None = None, *, shared: bool = False) -> Channel:
        """See `Disk`."""
        if not 1 <= depth <= MAX_DEPTH:
            raise InvalidInput(f"a channel has a depth of 1 to {MAX_DEPTH}, not {depth}", "depth")
        with self._used():
            made: RingChannel | ThreadChannel
            if self._backend == "io_uring":
                made = RingChannel(self._target, depth, buffers, self._note, shared=shared)
            else:
                made = ThreadChannel(self._target, depth, buffers)
            with self._changed:
                self._forget_ended()
                self._channels.append(made)
            return made

    def sync(self) -> None:
        """See `Disk`."""
        with self._used(), failing("fdatasync"):
            self._target.calls.fdatasync(self._target.fd)

    def zero(self, offset: int, length: int) -> None:
        """See `Disk`."""
        if offset < 0 or length < 0 or (offset | length) % SECTOR or offset + length > self.capacity:
            where = f"{length} bytes at {offset}"
            raise InvalidInput(f"zeros go to whole sectors within {self.capacity} bytes, not to {where}", "offset")
        calls, fd = self._target.calls, self._target.fd
        ways: list[Callable[[], None]] = [
            lambda: calls.fallocate(fd, FALLOC_KEEP_SIZE | FALLOC_ZERO_RANGE, offset, length)
        ]
        if self._device:
            ways.append(lambda: calls.device_zero(fd, offset, length))
        with self._used():
            if length and not any(_tried(way) for way in ways):
                self._write_zeros(offset, length)

    def close(self) -> None:
        """See `Disk`."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            idle = self._changed.wait_for(lambda: not self._users, self._target.close_s)
            channels = list(self._channels)
        for channel in channels:
            channel.close()
        calls, fd = self._target.calls, self._target.fd
        if self.lost or not idle or self._channels:
            # A write may still come: its number must not become another file's, nor another process open the disk. The
            # same where somebody else is closing a channel just now.
            return
        with suppress(OSError):
            # By closing alone the lock would last until the kernel has taken down the rings, which have the file too.
            calls.flock(fd, fcntl.LOCK_UN)
        with suppress(OSError):
            calls.close(fd)

    def _write_zeros(self, offset: int, length: int) -> None:
        calls, fd = self._target.calls, self._target.fd
        buffers = AlignedBuffers(1, min(length, _ZEROS_BYTES), calls)
        zeros = buffers.take()
        if zeros is None:
            return
        flight = Flight(0, Op.WRITE, offset, 0, length, zeros)
        ended = None
        while ended is None:
            try:
                result = calls.pwritev(fd, [zeros[: flight.left]], flight.offset)
            except OSError as error:
                result = -(error.errno or errno.EIO)
            ended = progress(flight, result)
        buffers.close()
        if ended:
            raise DiskFailed("pwrite", ended)

    @contextmanager
    def _used(self) -> Iterator[None]:
        """Not closed, and not closed meanwhile."""
        with self._changed:
            if self._closed:
                raise StoreUnavailable("the disk is closed")
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _note(self, text: str) -> None:
        with self._changed:
            if text not in self._notes:
                self._notes.append(text)

    def _forget_ended(self) -> None:
        # Asked once each: another thread may end one meanwhile, which is then counted the next time.
        ended = [channel for channel in self._channels if channel.ended]
        self._lost += sum(channel.lost for channel in ended)
        self._channels = [channel for channel in self._channels if channel not in ended]


def _tried(way: Callable[[], None]) -> bool:
    """Whether one way of zeroing was to be had. Raises `DiskFailed` when it was, and failed."""
    try:
        uninterrupted(way)
    except OSError as error:
        # No room: for the notes of a filesystem on what is zeros. Writing them needs none.
        if error.errno not in (*UNSUPPORTED, errno.ENOSPC):
            raise DiskFailed("zeroing", error.errno or errno.EIO) from error
        return False
    return True
