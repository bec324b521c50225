"""Filesystems that a store can be tried on: an ordinary folder, or a small ext4 of its own whose power can be cut.

The cut is ext4's shutdown ioctl without flushing its journal: what was not synced when it comes is lost (extents that
were written for the first time, sizes, names; with `cached`, everything that lay in the page cache and was not written
back), and from then on every call fails. Needs root and loop devices. The mounts are this process's and its
children's alone, so that they end with it, however it ends.
"""

import ctypes
import errno
import fcntl
import os
import random
import struct
import subprocess
import threading
import time
from pathlib import Path

from isthmus.state.kv.io.calls import Calls

_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2
_NEW_MOUNTS, _PRIVATE, _RECURSIVE = 0x00020000, 1 << 18, 1 << 14
_WRITE_BACK = 2
IMAGE_BYTES = 16 << 20
WITHIN_S = 20.0


def missing() -> str:
    """Why power cannot be cut here; empty: it can."""
    if os.geteuid() != 0:
        return "mounting takes root"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    tools = [name for name in ("mkfs.ext4", "losetup") if not _which(name)]
    return f"there is no {tools[0]}" if tools else ""


def _which(name: str) -> bool:
    return any((Path(folder) / name).exists() for folder in ("/sbin", "/usr/sbin", "/bin", "/usr/bin"))


class PatientCalls(Calls):
    """Asks more often whether a dead process's rings have let go of a file."""

    def pause(self, seconds: float) -> None:
        super().pause(min(seconds, 0.001))


class PoweredCalls(PatientCalls):
    """`cached`: no O_DIRECT, as on a filesystem that has none."""

    def __init__(self, *, cached: bool) -> None:
        super().__init__()
        self._cached = cached

    def set_direct(self, fd: int, on: bool) -> None:
        if self._cached and on:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().set_direct(fd, on)


class Ground:
    """A folder for one log."""

    powered = False
    cached = False
    is_cut = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def path(self) -> Path:
        return self.folder / "log"

    def fresh(self) -> None:
        """No log."""
        self.path.unlink(missing_ok=True)

    def cut(self) -> None:
        """Nothing to cut."""

    def back(self) -> None:
        """Power returns."""

    def write_back(self, seed: int) -> None:
        """From now on some pages reach the disk that nobody asked for, until this process ends."""

    def close(self) -> None:
        """The end."""


class Powered(Ground):
    """A small ext4 on a loop device. Every other life has a log in the page cache."""

    powered = True

    def __init__(self, folder: Path, size: int = IMAGE_BYTES) -> None:
        super().__init__(folder)
        own_mounts()
        self._image = folder / "image"
        self._mounted = folder / "mounted"
        self._mounted.mkdir()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._lives = 0
        with self._image.open("wb") as file:
            file.truncate(size)
        self._descriptor = -1
        self._format()

    @property
    def path(self) -> Path:
        return self._mounted / "log"

    def _format(self) -> None:
        command("mkfs.ext4", "-qF", "-E", "nodiscard", "-O", "^metadata_csum_seed", str(self._image))
        self._device = command("losetup", "--find", "--show", str(self._image)).strip()
        self._mount()

    def _mount(self) -> None:
        if self._libc.mount(self._device.encode(), bytes(self._mounted), b"ext4", 0, None):
            raise _failure()
        self._descriptor = os.open(self._mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.is_cut = False

    def _unmount(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        until = time.monotonic() + WITHIN_S
        # A dead process's rings have the file for a moment longer.
        while self._libc.umount2(bytes(self._mounted), 0):
            failure = _failure()
            if failure.errno != errno.EBUSY or time.monotonic() > until:
                raise failure
            time.sleep(0.001)

    def fresh(self) -> None:
        if self.is_cut:
            self.back()
        super().fresh()
        # Else the next cut brings the log of an earlier life back, whose geometry is another one.
        os.fsync(self._descriptor)
        self._lives += 1
        self.cached = self._lives % 2 == 0

    def cut(self) -> None:
        """Now. May be called in any process that has the descriptor, and again."""
        if not self.is_cut:
            self.is_cut = True
            fcntl.ioctl(self._descriptor, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))

    def back(self) -> None:
        self._unmount()
        self._mount()

    def write_back(self, seed: int) -> None:
        if not self.cached:
            return
        chance, descriptor = random.Random(seed), os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(descriptor).st_size
        libc = ctypes.CDLL(None)
        libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

        def run() -> None:
            while True:
                at, length = chance.randrange(size // 4096) * 4096, chance.choice((4096, 16384, 65536))
                libc.sync_file_range(descriptor, at, length, _WRITE_BACK)
                time.sleep(chance.choice((0.0, 0.001, 0.003)))

        threading.Thread(target=run, daemon=True).start()

    def close(self) -> None:
        self._unmount()
        command("losetup", "--detach", self._device)


def own_mounts() -> None:
    """Mounts made from now on are seen by this process and its children alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS) or libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None):
        raise _failure()


def _failure() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def command(*words: str) -> str:
    """Run a command that must succeed; what it says."""
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
