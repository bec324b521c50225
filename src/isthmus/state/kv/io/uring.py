"""One io_uring as the kernel has it: its set-up, its two queues, its calls. Linux 5.11 or later on x86-64.

The queues are shared with the kernel without locks: an entry must be seen before the index that publishes it. x86-64
keeps the order of stores and of loads by itself; elsewhere Python has no means to ask for it, so nothing else is
served. An index is read and written by one aligned 4-byte access (`memoryview` copies an item as its C type).
Layouts: linux/io_uring.h; the meaning of the calls: io_uring_setup(2), io_uring_enter(2), io_uring_register(2).
"""

import ctypes
import errno
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from isthmus.state.kv.io.calls import Calls

READ_FIXED, WRITE_FIXED, READ, WRITE = 4, 5, 22, 23

_SETUP_COOP_TASKRUN, _SETUP_SINGLE_ISSUER, _SETUP_DEFER_TASKRUN = 1 << 8, 1 << 12, 1 << 13
_SETUP_R_DISABLED = 1 << 6
# A thread of its own: completions are taken in by its waiting alone, without signals (Linux 6.1). The ring belongs to
# the thread that enables it.
_OWNED = _SETUP_SINGLE_ISSUER | _SETUP_DEFER_TASKRUN | _SETUP_R_DISABLED
# For any thread: with fewer interrupts (Linux 5.19), or as the first kernels had it.
_SHARED = (_SETUP_COOP_TASKRUN, 0)

# One mapping for both queues; completions never dropped; a timeout in io_uring_enter.
_FEATURES = 1 << 0 | 1 << 1 | 1 << 8
_OFFSET_QUEUES, _OFFSET_ENTRIES = 0, 0x10000000
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS, _REGISTER_FILES, _UNREGISTER_FILES, _ENABLE = 0, 1, 2, 3, 12
_ENTER_GETEVENTS, _ENTER_EXT_ARG = 1 << 0, 1 << 3
_FIXED_FILE = 1

_PARAMS = struct.Struct("<10I8IQ8IQ")
_ENTRY = struct.Struct("<BBHiQQIIQHHIQQ")
_COMPLETION = struct.Struct("<QiI")
_USER_DATA_AT = 32
_ARGUMENT_BYTES = ctypes.c_ulong(24)
_WRAP = 0xFFFFFFFF


class Ring:
    """A ring for one file. Holds no memory of transfers: whoever pushes keeps it alive until the completion."""

    def __init__(self, calls: Calls, fd: int, entries: int, owned: bool) -> None:
        """Raises `OSError`: what the kernel refused.

        `owned`: for one thread, where the kernel knows such rings; `self.owned` says what became of it.
        """
        self._calls = calls
        self._time = bytearray(16 + 24)
        place = ctypes.addressof((ctypes.c_char * len(self._time)).from_buffer(self._time))
        # struct __kernel_timespec, then struct io_uring_getevents_arg, which points to it.
        struct.pack_into("<qqQIIQ", self._time, 0, 0, 0, 0, 0, 0, place)
        self._argument = ctypes.c_ulong(place + 16)
        self.fd, self.owned, params = _set_up(calls, entries, owned)
        self.entries = params[0]
        self._registered = False
        self._undo: list[Callable[[], None]] = [self._let_go]
        try:
            self._map(params)
            calls.uring_register(self.fd, _REGISTER_FILES, bytearray(struct.pack("<i", fd)), 1)
        except OSError:
            self.close()
            raise

    def _map(self, params: tuple[int, ...]) -> None:
        entries, completions = params[0], params[1]
        head, tail, mask, _, _, _, array = params[10:17]
        done_head, done_tail, done_mask, _, _, self._done = params[19:25]
        length = max(array + entries * 4, self._done + completions * _COMPLETION.size)
        self._queues = self._calls.uring_map(self.fd, -(-length // 4) * 4, _OFFSET_QUEUES)
        self._undo.append(self._queues.close)
        self._words = memoryview(self._queues).cast("I")
        self._undo.append(self._words.release)
        self._entries = self._calls.uring_map(self.fd, entries * _ENTRY.size, _OFFSET_ENTRIES)
        self._undo.append(self._entries.close)
        self._head, self._tail_at, self._mask = head // 4, tail // 4, self._words[mask // 4]
        self._done_head, self._done_tail, self._done_mask = done_head // 4, done_tail // 4, self._words[done_mask // 4]
        self._tail = self._words[self._tail_at]
        for place in range(entries):
            self._words[array // 4 + place] = place

    def register(self, regions: Sequence[tuple[int, int]]) -> None:
        """Let the kernel keep memory in place, by (address, length): `region` of `push` counts these. Raises `OSError`,
        ENOMEM above all: it is charged to RLIMIT_MEMLOCK.
        """
        vectors = bytearray().join(struct.pack("<QQ", *region) for region in regions)
        self._calls.uring_register(self.fd, _REGISTER_BUFFERS, vectors, len(regions))
        self._registered = True

    def enable(self) -> None:
        """Make an owned ring that of the calling thread. Raises `OSError`."""
        if self.owned:
            self._calls.uring_register(self.fd, _ENABLE, None, 0)

    @property
    def queued(self) -> int:
        """Entries pushed that the kernel has not taken."""
        return (self._tail - self._words[self._head]) & _WRAP

    def push(self, opcode: int, offset: int, address: int, length: int, *, user_data: int, region: int) -> None:
        """Queue an entry. There is room as long as no more than `entries` are under way."""
        at = (self._tail & self._mask) * 64
        _ENTRY.pack_into(
            self._entries, at, opcode, _FIXED_FILE, 0, 0, offset, address, length, 0, user_data, region, 0, 0, 0, 0
        )
        self._tail = (self._tail + 1) & _WRAP

    def enter(self, least: int, timeout_s: float) -> None:
        """Hand what is queued to the kernel, then wait for `least` completions (0: only take in what is there).

        Raises `OSError`: ETIME when the time was over, EINTR, or what went wrong; `queued` then still tells the truth.
        """
        self._words[self._tail_at] = self._tail
        struct.pack_into("<qq", self._time, 0, int(timeout_s), int(timeout_s % 1 * 1e9))
        flags = _ENTER_GETEVENTS | _ENTER_EXT_ARG
        self._calls.uring_enter(
            self.fd, self.queued, least, flags=flags, argument=self._argument, length=_ARGUMENT_BYTES
        )

    def hand_over(self) -> None:
        """Hand what is queued to the kernel without waiting. Raises `OSError`, as `enter` does."""
        self._words[self._tail_at] = self._tail
        self._calls.uring_enter(self.fd, self.queued, 0, flags=0)

    def withdraw(self) -> list[int]:
        """Take back what is queued: its user data. The kernel looks at the queue in `enter` only."""
        head, count = self._words[self._head], self.queued
        places = (((head + step) & self._mask) * 64 + _USER_DATA_AT for step in range(count))
        taken = [int.from_bytes(self._entries[at : at + 8], "little") for at in places]
        self._tail = head
        return taken

    def reap(self) -> list[tuple[int, int]]:
        """(user data, result) of what has completed."""
        words = self._words
        head, tail = words[self._done_head], words[self._done_tail]
        found = []
        while head != tail:
            user_data, result, _ = _COMPLETION.unpack_from(self._queues, self._done + (head & self._done_mask) * 16)
            found.append((user_data, result))
            head = (head + 1) & _WRAP
        words[self._done_head] = head
        return found

    def close(self) -> None:
        """Undo everything. Only with nothing under way: pages and file are let go of before this returns, unless it is
        another thread than the owner that calls it: then by the kernel, a little later.
        """
        while self._undo:
            self._undo.pop()()

    def _let_go(self) -> None:
        # Left to the closing they would be let go of later, and with them locked memory and a lock on the file.
        for operation in (_UNREGISTER_BUFFERS, _UNREGISTER_FILES) if self._registered else (_UNREGISTER_FILES,):
            with suppress(OSError):
                self._calls.uring_register(self.fd, operation, None, 0)
        with suppress(OSError):
            self._calls.close(self.fd)


def _set_up(calls: Calls, entries: int, owned: bool) -> tuple[int, bool, tuple[int, ...]]:
    """The descriptor, whether it is owned, and the kernel's parameters, with as many of the flags as it knows."""
    for flags in (_OWNED, *_SHARED) if owned else _SHARED:
        params = bytearray(_PARAMS.size)
        struct.pack_into("<I", params, 8, flags)
        try:
            fd = calls.uring_setup(entries, params)
        except OSError as error:
            if error.errno == errno.EINVAL and flags:
                continue
            raise
        found = _PARAMS.unpack(params)
        if found[5] & _FEATURES != _FEATURES:
            calls.close(fd)
            raise OSError(errno.ENOSYS, "io_uring lacks features of Linux 5.11")
        return fd, flags == _OWNED, found
    raise OSError(errno.EINVAL, "io_uring_setup")


def refusal(calls: Calls) -> str:
    """Why io_uring is not to be had on this machine; empty when it is."""
    machine = calls.machine()
    if machine != "x86_64" or sys.maxsize < 1 << 32:
        return f"io_uring: not on {machine}, whose memory order needs instructions that Python lacks"
    try:
        fd, _, _ = _set_up(calls, 1, owned=True)
        calls.close(fd)
    except OSError as error:
        return f"io_uring: {error.strerror}"
    return ""
