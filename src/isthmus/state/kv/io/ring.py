"""Transfers through io_uring: one ring a channel, the file and the channel's buffers registered with it.

Promises

- completions cannot overflow: every transfer has one entry under way at most, and the kernel's completion queue has
  room for twice the ring's depth;
- what the kernel may still write to is never freed: a transfer's memory is referenced here until its completion has
  been taken in. A channel that is closed and cannot have it within its bound, or that is dropped unclosed, gives its
  ring and that memory up for good: they stay until the process ends, are counted in `lost`, and keep the disk's lock;
- a kernel that refuses fails what it has not taken: at once, or, where it says to try again, when it has said only that
  for `REFUSED_S`. From then on each try counts, until one succeeds.

A ring belongs to the thread that used it first, which the kernel rewards with fewer interruptions. A channel handed to
another thread makes a new ring once, of the kind that any thread may use. With transfers in flight only its owner can
hear of their ends, so a channel that another thread may have to close then has a ring for any thread from the start.
"""

import ctypes
import errno
import threading
from collections.abc import Callable, Sequence

from isthmus.contracts.errors import DiskFailed, InvalidInput, StoreUnavailable
from isthmus.state.kv.io import uring
from isthmus.state.kv.io.buffers import MAX_BUFFER_BYTES, AlignedBuffers
from isthmus.state.kv.io.transfers import (
    MAX_PIECE,
    Completion,
    Flight,
    Target,
    Transfer,
    admit,
    bounded,
    past_the_end,
    progress,
)
from isthmus.state.kv.io.uring import Ring

_FIXED = (uring.READ_FIXED, uring.WRITE_FIXED)
_PLAIN = (uring.READ, uring.WRITE)
_PAUSE_S = 0.001
_PEEK_S = 0.005
REFUSED_S = 5.0
"""How long the kernel may say that it has no room (or was interrupted) and nothing else."""
_REFUSALS = 64
"""How often in a row it must have said so by then: who asked twice only has not been refused for long."""
_AGAIN = frozenset({errno.EAGAIN, errno.EBUSY, errno.EINTR})


class RingChannel:
    """A `Channel` over io_uring. Made by a disk; `note` is told what it has to go without."""

    def __init__(
        self,
        target: Target,
        depth: int,
        buffers: AlignedBuffers | None,
        note: Callable[[str], None],
        *,
        shared: bool = False,
    ) -> None:
        """Raises `DiskFailed` when no ring is to be had. `shared`: a ring for any thread from the start."""
        self._target = target
        self._depth = depth
        self._buffers = buffers
        self._note = note
        self._flights: list[Flight | None] = [None] * depth
        self._slots = list(range(depth - 1, -1, -1))
        self._ready: list[Completion] = []
        self._landed: list[Flight] = []
        self._region_bytes = 0
        self._lost = 0
        self._ended = False
        self._closed = False
        self._thread = 0
        self._refusals, self._refused_since = 0, 0.0
        self._ring = self._made(owned=not shared)

    @property
    def depth(self) -> int:
        """See `Channel`."""
        return self._depth

    @property
    def in_flight(self) -> int:
        """See `Channel`."""
        return self._depth - len(self._slots) + len(self._ready)

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
        if self._closed:
            raise StoreUnavailable("the channel is closed")
        flights = admit(transfers, self._depth - self.in_flight)
        self._come_home()
        if self._buffers is not None:
            self._buffers.hold(flights)
        for flight in flights:
            if error := past_the_end(flight, self._target.capacity):
                self._end(flight, error)
                continue
            slot = self._slots.pop()
            self._flights[slot] = flight
            self._push(slot, flight)
        if self._ring.queued:
            try:
                self._ring.hand_over()
                self._refusals = 0
            except OSError as error:
                self._refused(error)

    def wait(self, least: int, timeout_s: float) -> list[Completion]:
        """See `Channel`."""
        timeout_s = bounded(timeout_s)
        if self._closed:
            raise StoreUnavailable("the channel is closed")
        if len(self._slots) < self._depth:
            self._come_home()
            self._collect(min(least, self.in_flight), timeout_s)
        done, self._ready = self._ready, []
        self._let_go()
        return done

    def close(self) -> None:
        """See `Channel`."""
        if self._closed:
            return
        self._closed = True
        for slot in self._ring.withdraw():
            self._land(slot, errno.ECANCELED)
        deadline = self._target.calls.monotonic() + self._target.close_s
        try:
            if not self._ring.owned or self._thread == threading.get_native_id():
                self._collect(self.in_flight, self._target.close_s, going_on=False)
            else:
                self._peek(deadline)
        except DiskFailed:
            self._peek(deadline)
        self._ready.clear()
        self._let_go()
        self._lost = self._depth - len(self._slots)
        self._ended = True
        if self._lost:
            _keep_for_ever((self._ring, self._flights, self._buffers))
        else:
            self._ring.close()

    def __del__(self) -> None:
        """Dropped unclosed: the memory of transfers in flight stays."""
        ring = getattr(self, "_ring", None)
        if ring is None or self._closed:
            return
        if len(self._slots) < self._depth:
            _keep_for_ever((ring, self._flights, self._buffers))
        else:
            ring.close()

    # The ring

    def _made(self, owned: bool) -> Ring:
        try:
            ring = Ring(self._target.calls, self._target.fd, self._depth, owned)
        except OSError as error:
            raise DiskFailed("io_uring_setup", error.errno or errno.EIO) from error
        self._region_bytes = 0 if self._buffers is None else self._registered(ring, self._buffers)
        return ring

    def _registered(self, ring: Ring, buffers: AlignedBuffers) -> int:
        """Bytes of a region; 0 when the kernel does not take them."""
        # A region has at most 1 GiB: cut between buffers, so that none lies in two.
        step = MAX_BUFFER_BYTES // buffers.size * buffers.size
        end = buffers.address + buffers.size * buffers.count
        try:
            ring.register([(begin, min(step, end - begin)) for begin in range(buffers.address, end, step)])
        except OSError as error:
            limit = " within the limit of locked memory" if error.errno == errno.ENOMEM else ""
            self._note(f"buffers not registered: {error.strerror}{limit}")
            return 0
        return step

    def _come_home(self) -> None:
        """Have a ring that the calling thread may use."""
        here = threading.get_native_id() if self._ring.owned else self._thread
        if self._thread == here:
            return
        if self._thread:
            if len(self._slots) < self._depth:
                raise InvalidInput(
                    "with transfers in flight a channel stays with the thread that began them", "channel"
                )
            ring = self._made(owned=False)
            self._ring.close()
            self._ring = ring
        else:
            try:
                self._ring.enable()
            except OSError as error:
                raise DiskFailed("io_uring_register", error.errno or errno.EIO) from error
        self._thread = here

    def _push(self, slot: int, flight: Flight) -> None:
        opcodes, region = _PLAIN, 0
        if self._region_bytes and flight.buffer >= 0 and self._buffers is not None:
            opcodes, region = _FIXED, (flight.address - self._buffers.address) // self._region_bytes
        length = min(flight.left, MAX_PIECE)
        self._ring.push(opcodes[flight.op], flight.offset, flight.address, length, user_data=slot, region=region)

    def _collect(self, least: int, timeout_s: float, going_on: bool = True) -> None:
        """Take in completions until `least` are ready or the time is over; continue short transfers if `going_on`."""
        ring, calls = self._ring, self._target.calls
        deadline = calls.monotonic() + timeout_s
        entered = False
        while True:
            for slot, result in ring.reap():
                self._taken(slot, result, going_on)
            missing = least - len(self._ready)
            if not ring.queued and missing <= 0 and (entered or self._ready):
                return
            left = deadline - calls.monotonic()
            if entered and left <= 0:
                return
            entered = True
            try:
                ring.enter(max(0, missing), max(0.0, left))
                self._refusals = 0
            except OSError as error:
                self._refused(error, max(0.0, left), waiting=True)

    def _taken(self, slot: int, result: int, going_on: bool) -> None:
        flight = self._flights[slot]
        if flight is None:
            return
        error = progress(flight, result)
        if error is None and going_on:
            self._push(slot, flight)
        else:
            self._land(slot, errno.ECANCELED if error is None else error)

    def _land(self, slot: int, error: int) -> None:
        """A transfer is over, as far as the kernel goes: its memory is the caller's again."""
        flight = self._flights[slot]
        if flight is None:
            return
        self._end(flight, error)
        self._flights[slot] = None
        self._slots.append(slot)

    def _end(self, flight: Flight, error: int) -> None:
        self._ready.append(Completion(flight.tag, error))
        self._landed.append(flight)

    def _let_go(self) -> None:
        landed, self._landed = self._landed, []
        if self._buffers is not None and landed:
            self._buffers.let_go(landed)

    def _refused(self, error: OSError, left: float = 0.0, waiting: bool = False) -> None:
        """io_uring_enter failed. What the kernel did not take fails with that error, unless it may be tried again."""
        number = error.errno or errno.EIO
        if number == errno.ETIME:
            self._refusals = 0
            return
        if number in _AGAIN and not self._refused_for_long():
            if waiting and (number != errno.EINTR or self._refusals > 1):
                self._target.calls.pause(min(_PAUSE_S, left))
            return
        stranded = self._ring.withdraw()
        for slot in stranded:
            self._land(slot, number)
        if waiting and not stranded:
            self._target.calls.pause(min(_PAUSE_S, left))  # who asks again and again takes no processor for it
            raise DiskFailed("io_uring_enter", number) from error

    def _refused_for_long(self) -> bool:
        """Count a refusal: whether the kernel has done nothing else for too long."""
        now = self._target.calls.monotonic()
        if not self._refusals:
            self._refused_since = now
        self._refusals += 1
        return self._refusals >= _REFUSALS and now - self._refused_since >= REFUSED_S

    def _peek(self, deadline: float) -> None:
        """Wait for completions that only another thread can have the kernel deliver, or that has ended."""
        calls = self._target.calls
        while True:
            for slot, result in self._ring.reap():
                self._taken(slot, result, going_on=False)
            left = deadline - calls.monotonic()
            if len(self._slots) == self._depth or left <= 0:
                return
            calls.pause(min(_PEEK_S, left))


def _keep_for_ever(things: object) -> None:
    """Never free them, nor anything that they refer to: one reference more than there are referrers."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(things))
