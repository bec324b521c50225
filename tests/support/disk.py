"""Calls to the operating system that go wrong on purpose, and disks to make them on."""

import os
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from mmap import mmap
from typing import Any

from isthmus.contracts.clock import Clock
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.uring import READ

FAILING = (
    "lstat",
    "open",
    "close",
    "fstat",
    "fchmod",
    "unlink",
    "flock",
    "set_direct",
    "fallocate",
    "ftruncate",
    "fsync",
    "fdatasync",
    "device_bytes",
    "device_zero",
    "preadv",
    "pwritev",
    "map_memory",
    "advise",
    "uring_setup",
    "uring_map",
    "uring_register",
    "uring_enter",
)
"""Every call that may fail: all of `Calls` but the clock, the pause and the machine's name."""

Plan = Callable[[str, int], int]


class FailingCalls(Calls):
    """Asks `plan(name, number)` at each call, counted from 0 over all of them; an errno is raised in its place, or
    (`late`) after it was made.
    """

    def __init__(self, plan: Plan = lambda *_: 0, late: bool = False, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self.plan, self.late = plan, late
        self.made: list[str] = []
        self.failed: list[str] = []
        self._counting = threading.Lock()
        for name in FAILING:
            setattr(self, name, partial(self._asked, name, getattr(super(), name)))

    def _asked(self, name: str, call: Callable[..., object], *values: object, **named: object) -> object:
        with self._counting:
            number = len(self.made)
            self.made.append(name)
            error = self.plan(name, number)
            if error:
                self.failed.append(name)
        # Linux lets go of a descriptor whatever close says of it.
        if error and not self.late and name != "close":
            raise OSError(error, os.strerror(error))
        result = call(*values, **named)
        if error:
            raise OSError(error, os.strerror(error))
        return result


class TamperingCalls(Calls):
    """Transfers move at most `longest` bytes a call, and the kernel's answer goes through `answer` (bytes moved, or an
    errno negated): the same for both backends. For io_uring this reaches into the queues shared with the kernel.
    """

    def __init__(self, longest: int = 1 << 30, answer: Callable[[int], int] = lambda result: result) -> None:
        super().__init__()
        self.longest, self.answer = longest, answer
        self._params: dict[int, tuple[int, ...]] = {}
        self._maps: dict[tuple[int, int], mmap] = {}
        self._rewritten: dict[int, int] = {}

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return self._answered(super().preadv, fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return self._answered(super().pwritev, fd, buffers, offset)

    def _answered(self, call: Callable[..., int], fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        try:
            result = call(fd, [buffer[: self.longest] for buffer in buffers], offset)
        except OSError as error:
            result = -(error.errno or 0)
        result = self.answer(result)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def uring_setup(self, entries: int, params: bytearray) -> int:
        fd = super().uring_setup(entries, params)
        self._params[fd] = struct.unpack("<10I8IQ8IQ", params)
        self._rewritten[fd] = 0
        return fd

    def uring_map(self, fd: int, length: int, offset: int) -> mmap:
        self._maps[fd, offset] = super().uring_map(fd, length, offset)
        return self._maps[fd, offset]

    def uring_enter(self, fd: int, submit: int, least: int, **named: Any) -> int:
        params, queues, entries = self._params[fd], self._maps[fd, 0], self._maps[fd, 0x10000000]
        for at in range(24, params[0] * 64, 64):
            asked = struct.unpack_from("<I", entries, at)[0]
            struct.pack_into("<I", entries, at, min(asked, self.longest))
        try:
            return super().uring_enter(fd, submit, least, **named)
        finally:
            # Of the completions' queue: where its tail and its mask lie, and the entries begin.
            tail, mask = (struct.unpack_from("<I", queues, at)[0] for at in params[20:22])
            for number in range(self._rewritten[fd], tail):
                at = params[24] + (number & mask) * 16 + 8
                result = struct.unpack_from("<i", queues, at)[0]
                struct.pack_into("<i", queues, at, self.answer(result))
            self._rewritten[fd] = tail


class StuckCalls(Calls):
    """While `stuck`, transfers begin (`entered`) and do not end before `release`; reads are answered with `data`.

    For io_uring what is handed over becomes a read of an empty pipe into the same memory: the kernel really has it.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data
        self.stuck = False
        self.entered = threading.Event()
        self._gate = threading.Event()
        self._params: dict[int, tuple[int, ...]] = {}
        self._maps: dict[tuple[int, int], mmap] = {}
        self._pipe = os.pipe()
        self._waiting = 0

    def release(self) -> None:
        """Let what is stuck end; what comes later is not."""
        self.stuck = False
        self._gate.set()
        os.write(self._pipe[1], self.data * self._waiting)

    def close_pipe(self) -> None:
        """In the end."""
        for end in self._pipe:
            os.close(end)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.stuck:
            self.entered.set()
            self._gate.wait(30)
        return super().preadv(fd, buffers, offset)

    def uring_setup(self, entries: int, params: bytearray) -> int:
        fd = super().uring_setup(entries, params)
        self._params[fd] = struct.unpack("<10I8IQ8IQ", params)
        return fd

    def uring_map(self, fd: int, length: int, offset: int) -> mmap:
        self._maps[fd, offset] = super().uring_map(fd, length, offset)
        return self._maps[fd, offset]

    def uring_enter(self, fd: int, submit: int, least: int, **named: Any) -> int:
        if self.stuck and submit:
            params, queues, entries = self._params[fd], self._maps[fd, 0], self._maps[fd, 0x10000000]
            head, mask = (struct.unpack_from("<I", queues, at)[0] for at in (params[10], params[12]))
            for number in range(head, head + submit):
                at = (number & mask) * 64
                struct.pack_into("<BBHiQ", entries, at, READ, 0, 0, self._pipe[0], (1 << 64) - 1)
                self._waiting += 1
            self.entered.set()
        return super().uring_enter(fd, submit, least, **named)


def descriptors() -> set[str]:
    """What this process has open, by number and target."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found
