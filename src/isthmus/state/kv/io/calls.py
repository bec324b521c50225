"""Every call to the operating system that the disk makes, in one object, so that a test can fail each of them in turn.

Nothing here retries, checks or decides: a call is made, and its failure is raised as `OSError` with the errno. Where
Python has no function for a call, it is made through libc (ctypes lets other threads run meanwhile).
"""

import ctypes
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from isthmus.contracts.clock import Clock, SystemClock

FALLOC_KEEP_SIZE = 1
FALLOC_ZERO_RANGE = 16

# linux/fs.h: _IOR(0x12, 114, size_t) and _IO(0x12, 127), the same on x86-64 and arm64.
_BLKGETSIZE64 = 0x80081272
_BLKZEROOUT = 0x127F

# One number each on every architecture but alpha.
_IO_URING_SETUP, _IO_URING_ENTER, _IO_URING_REGISTER = 425, 426, 427

NOTHING = ctypes.c_ulong(0)


class Calls:
    """The calls themselves. Safe to call from several threads."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        libc = ctypes.CDLL(None, use_errno=True)
        self._syscall = libc["syscall"]
        self._syscall.argtypes = (ctypes.c_long,) * 7
        self._syscall.restype = ctypes.c_long
        # Declared types would double what a call costs. Without them integers go as 32 bits, which these are but two.
        self._enter = libc["syscall"]
        self._fallocate = libc["fallocate"]
        self._fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    # Time

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        return self._clock.monotonic()

    def pause(self, seconds: float) -> None:
        """Let `seconds` pass: what a call that the kernel cannot serve at the moment waits before the next try."""
        threading.Event().wait(seconds)

    # Files and devices

    def machine(self) -> str:
        """See uname(2): the architecture."""
        return os.uname().machine

    def lstat(self, path: Path) -> os.stat_result:
        """What is at `path`, a link itself."""
        return os.lstat(path)

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Open `path`, as the manual of open has it."""
        return os.open(path, flags, mode)

    def close(self, fd: int) -> None:
        """Let go of a descriptor."""
        os.close(fd)

    def fstat(self, fd: int) -> os.stat_result:
        """What a descriptor is of."""
        return os.fstat(fd)

    def fchmod(self, fd: int, mode: int) -> None:
        """Set the permissions."""
        os.fchmod(fd, mode)

    def unlink(self, path: Path) -> None:
        """Remove the name."""
        path.unlink()

    def flock(self, fd: int, operation: int) -> None:
        """Lock or unlock the open file."""
        fcntl.flock(fd, operation)

    def set_direct(self, fd: int, on: bool) -> None:
        """See fcntl(2), F_SETFL: transfers past the page cache, or through it."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Reserve room. Not libc's posix_fallocate: that writes through where a filesystem cannot reserve."""
        if self._fallocate(fd, mode, offset, length) < 0:
            raise _failure()

    def ftruncate(self, fd: int, length: int) -> None:
        """Set the size."""
        os.ftruncate(fd, length)

    def fsync(self, fd: int) -> None:
        """Wait until data and metadata are on stable storage."""
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        """Wait until the data, and what is needed to find it, is on stable storage."""
        os.fdatasync(fd)

    def device_bytes(self, fd: int) -> int:
        """See ioctl(2), BLKGETSIZE64: how large a block device is."""
        return int.from_bytes(fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)), "little")

    def device_zero(self, fd: int, offset: int, length: int) -> None:
        """See ioctl(2), BLKZEROOUT: zeros on a block device."""
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` from `offset` on; how many bytes that were."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write `buffers` at `offset`; how many bytes that were."""
        return os.pwritev(fd, buffers, offset)

    # Memory

    def map_memory(self, length: int) -> mmap.mmap:
        """See mmap(2); of fresh private memory."""
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def advise(self, memory: mmap.mmap, advice: int, start: int, length: int) -> None:
        """See madvise(2)."""
        memory.madvise(advice, start, length)

    # io_uring

    def uring_setup(self, entries: int, params: bytearray) -> int:
        """See io_uring_setup(2): the ring's descriptor. The kernel fills in `params` (struct io_uring_params)."""
        place = (ctypes.c_char * len(params)).from_buffer(params)
        return self._made(_IO_URING_SETUP, entries, ctypes.addressof(place))

    def uring_map(self, fd: int, length: int, offset: int) -> mmap.mmap:
        """See mmap(2); of a part of a ring."""
        return mmap.mmap(fd, length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=offset)

    def uring_register(self, fd: int, operation: int, argument: bytearray | None, count: int) -> None:
        """See io_uring_register(2)."""
        if argument is None:
            self._made(_IO_URING_REGISTER, fd, operation, 0, count)
        else:
            place = (ctypes.c_char * len(argument)).from_buffer(argument)
            self._made(_IO_URING_REGISTER, fd, operation, ctypes.addressof(place), count)

    def uring_enter(
        self,
        fd: int,
        submit: int,
        least: int,
        *,
        flags: int,
        argument: ctypes.c_ulong = NOTHING,
        length: ctypes.c_ulong = NOTHING,
    ) -> int:
        """See io_uring_enter(2): how many entries the kernel took. `argument` is the address of `length` bytes."""
        result: int = self._enter(_IO_URING_ENTER, fd, submit, least, flags, argument, length)
        if result < 0:
            raise _failure()
        return result

    def _made(self, number: int, *values: int) -> int:
        result: int = self._syscall(number, *values, *(0,) * (6 - len(values)))
        if result < 0:
            raise _failure()
        return result


def _failure() -> OSError:
    """What libc says went wrong; an OSError of the right kind (BlockingIOError, ...)."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
