"""How a disk comes to be open: whose it is, that nobody else has it, that its room is there, past the page cache.

The size of a file says whether it is complete: room is reserved without changing the size (0), which is then set in
one step. What a crash leaves before that is an empty file, and an empty file is a new one.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from isthmus.contracts.errors import DiskFailed, InvalidInput, StoreFull, StoreLocked
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.io.calls import FALLOC_KEEP_SIZE, Calls
from isthmus.state.kv.io.transfers import SECTOR

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)
"""What filesystems and devices answer to what they do not know."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OPENINGS = 4
_INTERRUPTIONS = 100


@dataclass(frozen=True, slots=True)
class Opened:
    """An open descriptor, locked. `note` says why the page cache is in between; empty when it is not."""

    fd: int
    capacity: int
    device: bool
    note: str


@dataclass(frozen=True, slots=True)
class _Found:
    """An open descriptor, what it is, and whether it was made just now."""

    fd: int
    status: os.stat_result
    made: bool


@contextmanager
def failing(call: str) -> Iterator[None]:
    """What fails inside is `DiskFailed` by that name."""
    try:
        yield
    except OSError as error:
        raise DiskFailed(call, error.errno or errno.EIO) from error


def uninterrupted(call: Callable[[], None]) -> None:
    """Make a call that Python does not repeat by itself when a signal interrupts it."""
    for _ in range(_INTERRUPTIONS):
        with suppress(InterruptedError):
            return call()
    raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))


def opened(calls: Calls, path: Path, capacity: int | None, create: bool) -> Opened:
    """See `open_disk`."""
    for _ in range(_OPENINGS):
        found = _descriptor(calls, path, capacity, create)
        if found is None:
            continue
        fd, device = found.fd, stat.S_ISBLK(found.status.st_mode)
        with ExitStack() as undo:
            undo.callback(_close, calls, fd)
            _lock(calls, fd, path)
            # The size may have changed until it was locked; and its maker may have found no room and removed it.
            with failing("fstat"):
                found = _Found(fd, calls.fstat(fd), found.made)
            if found.status.st_nlink or device:
                size = _device_bytes(calls, path, fd, capacity) if device else _file_bytes(calls, path, found, capacity)
                note = _direct(calls, fd)
                undo.pop_all()
                return Opened(fd, size, device, note)
    raise StoreLocked(f"{path} is being made and removed by another process")


def _descriptor(calls: Calls, path: Path, capacity: int | None, create: bool) -> _Found | None:
    """Open what is there, or make it. None: it changed meanwhile."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        there = calls.lstat(path)
    except FileNotFoundError as error:
        if not create:
            raise DiskFailed("open", errno.ENOENT) from error
        if capacity is None:
            raise InvalidInput("a new file needs a capacity", "capacity") from error
        return _made(calls, path, flags)
    except OSError as error:
        raise DiskFailed("stat", error.errno or errno.EIO) from error
    # Looked at before it is opened: opening some devices does something already.
    _check_kind(path, there)
    if stat.S_ISBLK(there.st_mode):
        # Only with O_EXCL does the kernel refuse a device that is mounted, or that another opened so.
        flags |= os.O_EXCL
    try:
        fd = calls.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise StoreLocked(f"{path} is in use: mounted, or open in another process") from error
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise DiskFailed("open", error.errno or errno.EIO) from error
    found = _stated(calls, path, fd, made=False)
    if not os.path.samestat(found.status, there):
        _close(calls, fd)
        return None
    return found


def _stated(calls: Calls, path: Path, fd: int, made: bool) -> _Found:
    try:
        with failing("fstat"):
            return _Found(fd, calls.fstat(fd), made)
    except DiskFailed:
        if made:
            with suppress(OSError):
                calls.unlink(path)
        _close(calls, fd)
        raise


def _made(calls: Calls, path: Path, flags: int) -> _Found | None:
    try:
        fd = calls.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFull(f"{path} cannot be made: {error.strerror}") from error
        raise DiskFailed("open", error.errno or errno.EIO) from error
    return _stated(calls, path, fd, made=True)


def _check_kind(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise InvalidInput(f"{path} is a symbolic link: name what it points to", "path")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise InvalidInput(f"{path} is neither a file nor a block device", "path")
    if stat.S_ISREG(status.st_mode) and status.st_uid != os.geteuid():
        raise InvalidInput(f"{path} belongs to user {status.st_uid}, not to this process's ({os.geteuid()})", "path")


def _lock(calls: Calls, fd: int, path: Path) -> None:
    try:
        calls.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreLocked(f"{path} is open already, in this process or another") from error
    except OSError as error:
        raise DiskFailed("flock", error.errno or errno.EIO) from error


def _device_bytes(calls: Calls, path: Path, fd: int, capacity: int | None) -> int:
    with failing("ioctl"):
        size = calls.device_bytes(fd) // SECTOR * SECTOR
    if capacity is not None and capacity > size:
        raise InvalidInput(f"{path} has {size} bytes, not {capacity}", "capacity")
    return size if capacity is None else capacity


def _file_bytes(calls: Calls, path: Path, found: _Found, capacity: int | None) -> int:
    """The size of a file that is private and has all its room."""
    size = found.status.st_size
    if found.status.st_mode & 0o077:
        with failing("fchmod"):
            calls.fchmod(found.fd, 0o600)
    if not size and capacity is not None:
        _fill_new(calls, path, found, capacity)
        return capacity
    if capacity is not None and size != capacity:
        raise InvalidInput(f"{path} has {size} bytes, not {capacity}", "capacity")
    if size < SECTOR or size % SECTOR:
        raise InvalidInput(f"{path} has {size} bytes, not a multiple of {SECTOR}", "capacity")
    if found.status.st_blocks * 512 < size:
        # A copy of it may have holes, and then a write could find no room.
        _reserve(calls, path, found.fd, size)
    return size


def _reserve(calls: Calls, path: Path, fd: int, capacity: int) -> None:
    try:
        uninterrupted(lambda: calls.fallocate(fd, FALLOC_KEEP_SIZE, 0, capacity))
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFull(f"{path}: no room for {capacity} bytes: {error.strerror}") from error
        raise DiskFailed("fallocate", error.errno or errno.EIO) from error


def _fill_new(calls: Calls, path: Path, found: _Found, capacity: int) -> None:
    """Give an empty file its room, then its size; or leave none (an empty one, if it was there before)."""
    fd = found.fd
    with ExitStack() as undo:
        undo.callback(_empty, calls, path, found)
        _reserve(calls, path, fd, capacity)
        with failing("ftruncate"):
            calls.ftruncate(fd, capacity)
        with failing("fsync"):
            calls.fsync(fd)
            _sync_folder(calls, path.parent)
        undo.pop_all()


def _empty(calls: Calls, path: Path, found: _Found) -> None:
    with suppress(OSError):
        calls.ftruncate(found.fd, 0)
    if found.made:
        with suppress(OSError):
            calls.unlink(path)


def _sync_folder(calls: Calls, folder: Path) -> None:
    """Make the name of a new file durable."""
    descriptor = calls.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        calls.fsync(descriptor)
    finally:
        _close(calls, descriptor)


def _direct(calls: Calls, fd: int) -> str:
    """Turn O_DIRECT on; why it cannot be. Some filesystems take the flag and refuse the transfers: one is tried."""
    try:
        calls.set_direct(fd, True)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return f"no O_DIRECT: {error.strerror}"
        raise DiskFailed("fcntl", error.errno or errno.EIO) from error
    sector = AlignedBuffers(1, SECTOR, calls)
    view = sector.take()
    try:
        if view is not None:
            calls.preadv(fd, [view], 0)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise DiskFailed("pread", error.errno or errno.EIO) from error
        with failing("fcntl"):
            calls.set_direct(fd, False)
        return f"no O_DIRECT: {error.strerror}"
    finally:
        sector.close()
    return ""


def _close(calls: Calls, fd: int) -> None:
    with suppress(OSError):
        calls.close(fd)
