"""What is asked of a disk and what is told of it; the rules that every backend shares, without I/O.

A transfer moves whole sectors between a place on the disk and memory, both aligned. It is checked before anything of
its batch is begun; a short one is continued from the last whole sector, one that makes no progress is EIO.
"""

import ctypes
import enum
import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.io.calls import Calls

SECTOR = 4096
MAX_DEPTH = 4096
MAX_PIECE = 1 << 30
"""Most bytes of one call: under what the kernel moves at a time (2 GiB - 4 KiB)."""
MAX_STALLS = 64
"""How often in a row the kernel may say EINTR or EAGAIN to one transfer before that is its error."""
MAX_WAIT_S = 86_400.0

_ALIGNED = SECTOR - 1
_END = 1 << 62


class Op(enum.IntEnum):
    """Which way a transfer goes."""

    READ = 0
    WRITE = 1


@dataclass(frozen=True, slots=True)
class Transfer:
    """`buffer` is filled from the disk at `offset`, or written there. Offset, length and address are multiples of
    `SECTOR`. `tag` comes back with the completion; it is the caller's, and need not be unique.
    """

    op: Op
    offset: int
    buffer: memoryview
    tag: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A transfer ended: `error` is 0 when all of it was moved, or else an errno, and then any part of it may have been.
    Past the end of the disk a read is EIO and a write ENOSPC.
    """

    tag: int
    error: int


class Channel(Protocol):
    """Transfers in flight on one disk: for one thread at a time. Hand it to another thread with nothing in flight.

    The memory of a transfer is referenced from `submit` until its completion, whatever becomes of the caller's view.
    """

    @property
    def depth(self) -> int:
        """Most transfers in flight."""
        ...

    @property
    def in_flight(self) -> int:
        """Transfers submitted that `wait` has not given back."""
        ...

    @property
    def lost(self) -> int:
        """Transfers that had not ended when `close` gave up: the kernel may touch their memory until the process ends,
        so it is never freed, and nothing else may be put there.
        """
        ...

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Begin transfers, in any order. Raises `InvalidInput` (over depth, misaligned, ...), and then none has begun;
        `StoreUnavailable` when closed; `DiskFailed` when the backend could not be had at all, and none has begun.
        """
        ...

    def wait(self, least: int, timeout_s: float) -> list[Completion]:
        """At least `least` (or all there are, if fewer) completions, unless the time is over; all that are there.

        Raises `DiskFailed` when waiting itself fails: what is in flight stays so.
        """
        ...

    def close(self) -> None:
        """End: what has not reached the kernel is dropped, the rest waited for within a bound. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a channel of any backend works on: an open descriptor of `capacity` bytes, closed after the channel.

    `close_s` bounds the waiting of its `close`.
    """

    calls: Calls
    fd: int
    capacity: int
    close_s: float


@dataclass(slots=True)
class Flight:
    """A transfer under way: where it goes on, and how much is `left`. `held` keeps the memory alive and in place."""

    tag: int
    op: Op
    offset: int
    address: int
    left: int
    held: memoryview
    stalls: int = 0
    buffer: int = -1
    """Which of the channel's buffers it lies in; -1: none of them."""


def address_of(view: memoryview) -> int:
    """Where the first byte of a contiguous view lies."""
    if view.readonly:
        place: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        return place
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def admit(transfers: Sequence[Transfer], room: int) -> list[Flight]:
    """Check a batch. Raises `InvalidInput`, naming the field, unless all of it may begin."""
    if len(transfers) > room:
        raise InvalidInput(f"{len(transfers)} transfers, but room for {room} in flight", "transfers")
    try:
        return [_admit(transfer) for transfer in transfers]
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"a buffer is a memoryview of bytes: {error}", "buffer") from error


def bounded(timeout_s: float) -> float:
    """A limit of a wait, not negative. Raises `InvalidInput` unless it is one."""
    if not timeout_s <= MAX_WAIT_S:
        raise InvalidInput(f"a wait has an end within {MAX_WAIT_S:.0f} s, not {timeout_s}", "timeout_s")
    return max(0.0, timeout_s)


def _admit(transfer: Transfer) -> Flight:
    # A view of its own: it keeps the memory even when the caller's is released.
    view, offset = transfer.buffer.cast("B"), transfer.offset
    length = view.nbytes
    if not length:
        raise InvalidInput("a transfer's buffer is not empty", "buffer")
    if transfer.op == Op.READ and view.readonly:
        raise InvalidInput("a buffer to be filled can be written to", "buffer")
    address = address_of(view)
    if (address | length | offset) & _ALIGNED:
        where = f"offset {offset}, length {length}, address {address:#x}"
        raise InvalidInput(f"a transfer is aligned to {SECTOR} bytes, not at {where}", "transfer")
    if not 0 <= offset <= _END:
        raise InvalidInput(f"an offset is from 0 to 2**62, not {offset}", "offset")
    return Flight(transfer.tag, transfer.op, offset, address, length, view)


def past_the_end(flight: Flight, capacity: int) -> int:
    """0, or the errno of a transfer that does not lie on the disk: what a device would say."""
    if flight.offset + flight.left <= capacity:
        return 0
    return errno.EIO if flight.op == Op.READ else errno.ENOSPC


def progress(flight: Flight, result: int) -> int | None:
    """Take in what one call moved (bytes, or the errno negated). None: go on with what is left; else the error, 0 for
    none.

    Only whole sectors count, as the rest of one could not be asked for alone: it is moved again.
    """
    if result < 0:
        if result in (-errno.EINTR, -errno.EAGAIN) and flight.stalls < MAX_STALLS:
            flight.stalls += 1
            return None
        return -result
    moved = result if result == flight.left else min(result, flight.left) & ~_ALIGNED
    if not moved:
        return errno.EIO
    flight.stalls = 0
    flight.offset += moved
    flight.address += moved
    flight.left -= moved
    return None if flight.left else 0
