"""Transfers on a few threads of a channel's own, for where io_uring is not to be had: the same promises.

A thread that the disk never answers cannot be ended. A channel closed meanwhile gives it up after its bound: it is
counted in `lost`, its memory stays referenced by the thread, and it begins nothing more if it ever returns.
"""

import errno
import queue
import threading
from collections.abc import Sequence
from typing import TypeVar

from isthmus.contracts.errors import DiskFailed, StoreUnavailable
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.io.transfers import (
    MAX_PIECE,
    Completion,
    Flight,
    Op,
    Target,
    Transfer,
    admit,
    bounded,
    past_the_end,
    progress,
)

MAX_WORKERS = 8
"""Threads of a channel: what a disk takes at a time beyond this gains little, and each costs memory and switches."""

_PAUSE_S = 0.001
_IDLE_S = 60.0

_T = TypeVar("_T")
_Jobs = queue.SimpleQueue[Flight | None]
_Done = queue.SimpleQueue[tuple[Flight, int]]


class ThreadChannel:
    """A `Channel` over preadv(2) and pwritev(2). Made by a disk."""

    def __init__(self, target: Target, depth: int, buffers: AlignedBuffers | None) -> None:
        self._target = target
        self._depth = depth
        self._buffers = buffers
        self._jobs: _Jobs = queue.SimpleQueue()
        self._done: _Done = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._under_way = 0
        self._ready: list[Completion] = []
        self._lost = 0
        self._ended = False

    @property
    def depth(self) -> int:
        """See `Channel`."""
        return self._depth

    @property
    def in_flight(self) -> int:
        """See `Channel`."""
        return self._under_way + len(self._ready)

    @property
    def lost(self) -> int:
        """See `Channel`."""
        return self._lost

    @property
    def ended(self) -> bool:
        """Whether `close` has returned, or is about to: `lost` does not change any more."""
        return self._ended

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Channel`."""
        if self._stopped.is_set():
            raise StoreUnavailable("the channel is closed")
        flights = admit(transfers, self._depth - self.in_flight)
        self._have_threads(self._under_way + len(flights))
        if self._buffers is not None:
            self._buffers.hold(flights)
        for flight in flights:
            if error := past_the_end(flight, self._target.capacity):
                self._end(flight, error)
                continue
            self._under_way += 1
            self._jobs.put(flight)

    def wait(self, least: int, timeout_s: float) -> list[Completion]:
        """See `Channel`."""
        timeout_s = bounded(timeout_s)
        if self._stopped.is_set():
            raise StoreUnavailable("the channel is closed")
        self._collect(min(least, self.in_flight), timeout_s)
        done, self._ready = self._ready, []
        return done

    def close(self) -> None:
        """See `Channel`."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        while (flight := _taken(self._jobs)) is not None:
            self._done.put((flight, errno.ECANCELED))
        for _ in self._threads:
            self._jobs.put(None)
        calls = self._target.calls
        deadline = calls.monotonic() + self._target.close_s
        self._collect(self.in_flight, self._target.close_s)
        self._ready.clear()
        self._lost = self._under_way
        self._ended = True
        for thread in self._threads:
            # One in a call that does not return is left alone.
            thread.join(max(0.0, deadline - calls.monotonic()))

    def __del__(self) -> None:
        """Dropped unclosed: the threads end when they are done."""
        for _ in getattr(self, "_threads", ()):
            self._jobs.put(None)

    def _collect(self, least: int, timeout_s: float) -> None:
        calls = self._target.calls
        deadline = calls.monotonic() + timeout_s
        while True:
            while self._under_way and (ended := _taken(self._done)) is not None:
                self._under_way -= 1
                self._end(*ended)
            left = deadline - calls.monotonic()
            if len(self._ready) >= least or left <= 0:
                return
            try:
                flight, error = self._done.get(timeout=left)
            except queue.Empty:
                return
            self._under_way -= 1
            self._end(flight, error)

    def _end(self, flight: Flight, error: int) -> None:
        self._ready.append(Completion(flight.tag, error))
        if self._buffers is not None:
            self._buffers.let_go((flight,))

    def _have_threads(self, wanted: int) -> None:
        while len(self._threads) < min(wanted, self._depth, MAX_WORKERS):
            arguments = (self._target, self._jobs, self._done, self._stopped)
            # Daemons: the process's end does not wait for a disk that never answers.
            thread = threading.Thread(target=_work, args=arguments, name="disk", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if self._threads:
                    return
                raise DiskFailed("clone", errno.EAGAIN) from error
            self._threads.append(thread)


def _taken(items: "queue.SimpleQueue[_T]") -> _T | None:
    try:
        return items.get_nowait()
    except queue.Empty:
        return None


def _work(target: Target, jobs: _Jobs, done: _Done, stopped: threading.Event) -> None:
    """A thread's life: until None comes. Refers to no channel, so that one can be dropped."""
    while True:
        try:
            flight = jobs.get(timeout=_IDLE_S)
        except queue.Empty:
            continue
        if flight is None:
            return
        error = _carried(target, flight, stopped)
        # Before anybody hears of the end: an idle thread must not keep the memory.
        flight.held.release()
        done.put((flight, error))


def _carried(target: Target, flight: Flight, stopped: threading.Event) -> int:
    """Move all of a transfer; its error, or 0."""
    calls, view = target.calls, flight.held
    move = calls.preadv if flight.op == Op.READ else calls.pwritev
    while not stopped.is_set():
        begin = view.nbytes - flight.left
        try:
            result = move(target.fd, [view[begin : begin + min(flight.left, MAX_PIECE)]], flight.offset)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        ended = progress(flight, result)
        if ended is not None:
            return ended
        if result < 0:
            calls.pause(_PAUSE_S)
    return errno.ECANCELED
