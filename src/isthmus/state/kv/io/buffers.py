"""Memory for transfers: a fixed number of equal, aligned buffers in one mapping, resident from the start.

Promises: the mapping is never grown, and is not returned to the system while anything refers to it. A buffer is handed
out again only once it was given back *and* no transfer of a channel made with these buffers is in flight in it: one
given back too early, or left with a disk that never answers, is put aside until the last such transfer has ended.
"""

import errno
import mmap
import threading
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from isthmus.contracts.errors import DiskFailed, InvalidInput
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.transfers import SECTOR, Flight, address_of

MAX_BUFFERS = 65_536
MAX_BUFFER_BYTES = 1 << 30

_HUGE = 2 * 1024 * 1024
# Not named by Python; Linux 4.14 and 5.14.
_MADV_WIPEONFORK = 18
_MADV_POPULATE_WRITE = 23


class AlignedBuffers:
    """`count` buffers of `size` bytes each. Safe to use from several threads.

    A forked child has zeros in their place: a page that a device writes to cannot be shared with one.
    """

    def __init__(self, count: int, size: int, calls: Calls | None = None) -> None:
        """Raises `InvalidInput`, and `DiskFailed` when there is no memory for them."""
        if not 1 <= count <= MAX_BUFFERS:
            raise InvalidInput(f"1 to {MAX_BUFFERS} buffers, not {count}", "count")
        if not SECTOR <= size <= MAX_BUFFER_BYTES or size % SECTOR:
            raise InvalidInput(
                f"a buffer has a multiple of {SECTOR} bytes up to {MAX_BUFFER_BYTES}, not {size}", "size"
            )
        self._count, self._size, self._total = count, size, count * size
        self._memory, start = _mapped(calls or Calls(), self._total)
        whole = memoryview(self._memory)
        self._region = whole[start : start + self._total]
        whole.release()
        self._address = address_of(self._region)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._free = list(range(count - 1, -1, -1))
        self._taken: dict[int, tuple[memoryview, int]] = {}
        self._in_flight = [0] * count
        self._aside: set[int] = set()

    @property
    def count(self) -> int:
        """How many buffers there are."""
        return self._count

    @property
    def size(self) -> int:
        """Bytes of each."""
        return self._size

    @property
    def address(self) -> int:
        """Where the first one begins; the others follow it."""
        return self._address

    @property
    def free(self) -> int:
        """How many could be taken now."""
        return len(self._free)

    @property
    def aside(self) -> int:
        """How many were given back with transfers in flight in them."""
        return len(self._aside)

    def take(self, timeout_s: float = 0.0) -> memoryview | None:
        """A buffer, the one used last for its warmth; None when none is free within `timeout_s`."""
        with self._lock:
            if not self._free and not (timeout_s > 0 and self._changed.wait_for(lambda: self._free, timeout_s)):
                return None
            index = self._free.pop()
            view = self._region[index * self._size : (index + 1) * self._size]
            self._taken[id(view)] = (view, index)
            return view

    def give(self, buffer: memoryview) -> None:
        """Give back what `take` returned: that very view, which cannot be used any more. Slices of it must not be used
        either. Raises `InvalidInput` for anything else, and when it was given back before.
        """
        with self._lock:
            view, index = self._taken.get(id(buffer), (None, -1))
            if view is None:
                raise InvalidInput("not a buffer that was taken from here", "buffer")
            del self._taken[id(buffer)]
            if self._in_flight[index]:
                self._aside.add(index)
            else:
                self._free.append(index)
                self._changed.notify()
        # Where an array still refers to the view it cannot be released; its owner was told not to use it.
        with suppress(BufferError):
            buffer.release()

    def hold(self, flights: Iterable[Flight]) -> None:
        """For channels: these begin. Each is told which buffer it lies in."""
        with self._lock:
            for flight in flights:
                begin = flight.address - self._address
                index = begin // self._size
                if 0 <= index < self._count and begin + flight.left <= (index + 1) * self._size:
                    flight.buffer = index
                    self._in_flight[index] += 1

    def let_go(self, flights: Iterable[Flight]) -> None:
        """For channels: these have ended, as far as the kernel goes."""
        with self._lock:
            for flight in flights:
                index = flight.buffer
                if index < 0:
                    continue
                self._in_flight[index] -= 1
                if not self._in_flight[index] and index in self._aside:
                    self._aside.remove(index)
                    self._free.append(index)
                    self._changed.notify()

    def close(self) -> None:
        """Return the memory to the system, or leave that to the last thing that refers to it. May be called twice."""
        with self._lock:
            self._free.clear()
            self._region.release()
        with suppress(BufferError):
            self._memory.close()


def _mapped(calls: Calls, total: int) -> tuple[mmap.mmap, int]:
    """Resident memory, and where in it `total` aligned bytes begin. Huge pages where the kernel gives them: fewer
    translations for the copies, fewer segments for the device.
    """
    length = total + _HUGE if total >= _HUGE else total
    try:
        memory = calls.map_memory(length)
    except OSError as error:
        raise DiskFailed("mmap", error.errno or errno.ENOMEM) from error
    view = memoryview(memory)
    start = -address_of(view) % _HUGE if total >= _HUGE else 0
    view.release()
    for advice in (_MADV_WIPEONFORK, mmap.MADV_HUGEPAGE):
        # Kernels are built without huge pages; a fork would copy pages that are in flight. Not MADV_DONTFORK: a child
        # has these objects too, and would unmap, with the last of them, whatever came to lie at their address.
        with suppress(OSError):
            calls.advise(memory, advice, start, total)
    try:
        calls.advise(memory, _MADV_POPULATE_WRITE, start, total)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            memory.close()
            raise DiskFailed("madvise", errno.ENOMEM) from error
        np.frombuffer(memory, np.uint8, total, start)[::SECTOR] = 0
    return memory, start
