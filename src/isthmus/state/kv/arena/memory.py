"""Shared memory that one process writes and others can only read: memfd regions with seals.

Promises: a region never changes its size, so no mapping of it can fault; after the owner's own mapping nobody can map
it for writing (F_SEAL_FUTURE_WRITE) or take a seal off; every page is there before the first use, so that a full
machine shows at the start and not in the middle of a copy (filling fresh pages also copies at a third of the speed).
"""

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.contracts.errors import ConfigInvalid, WireViolation
from isthmus.state.kv.arena.extents import PAGE_BYTES
from isthmus.state.kv.arena.limits import check_fits

MAX_REGION_BYTES = 1 << 30
# linux/fcntl.h and asm-generic/mman-common.h; Python 3.11 names neither.
F_SEAL_FUTURE_WRITE = 0x0010
MADV_POPULATE_WRITE = 23
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
OWNER_SEALS = SIZE_SEALS | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
_POPULATE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Region:
    """One piece of shared memory: its descriptor, to be handed on, and this process's writable view of it."""

    descriptor: int
    view: memoryview

    @property
    def size(self) -> int:
        """Bytes."""
        return self.view.nbytes

    def close(self) -> None:
        """Give the descriptor back. The mapping ends with the last view of it."""
        os.close(self.descriptor)


def create_region(name: str, size: int, *, huge: bool) -> Region:
    """`size` bytes (a multiple of 4096) of zeroed shared memory, mapped, faulted in and sealed.

    Raises `ConfigInvalid` when the machine refuses it.
    """

    def fault_in(mapping: mmap.mmap) -> None:
        if huge:
            _advise(mapping, mmap.MADV_HUGEPAGE, 0, size)
        _populate(mapping, size)

    return _create(name, size, OWNER_SEALS, fault_in)


def create_shared(name: str, size: int) -> Region:
    """`size` bytes that both ends write to: their size is sealed, their pages come when they are used."""
    return _create(name, size, SIZE_SEALS | fcntl.F_SEAL_SEAL, lambda _: None)


def _create(name: str, size: int, seals: int, prepare: Callable[[mmap.mmap], None]) -> Region:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        prepare(mapping)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except (OSError, ValueError) as error:
        os.close(descriptor)
        raise ConfigInvalid(f"{size} bytes of shared memory ({name}) are not to be had: {error}") from error
    return Region(descriptor, memoryview(mapping))


def map_read_only(descriptor: int, size: int) -> memoryview:
    """A read-only view of a region that another process owns. Raises `WireViolation` when it is none of `size` bytes
    whose size is sealed: mapping it could end this process by a fault.
    """
    return _map(descriptor, size, mmap.PROT_READ)


def map_writable(descriptor: int, size: int) -> memoryview:
    """As `map_read_only`, for memory that both sides write to."""
    return _map(descriptor, size, mmap.PROT_READ | mmap.PROT_WRITE)


def _map(descriptor: int, size: int, protection: int) -> memoryview:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        actual = os.fstat(descriptor).st_size
    except OSError as error:
        raise WireViolation(f"the descriptor received is no sealed memory: {error.strerror}") from error
    if seals & SIZE_SEALS != SIZE_SEALS or actual != size:
        raise WireViolation(
            f"the memory received has {actual} bytes and seals {seals:#x}, expected {size} bytes sealed"
        )
    try:
        return memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection))
    except (OSError, ValueError) as error:
        raise WireViolation(f"the memory received cannot be mapped: {error}") from error


@dataclass(frozen=True, slots=True)
class ArenaMemory:
    """The regions of an arena and its generation table: one uint64 a page, over all regions, in a region of its own."""

    regions: tuple[Region, ...]
    table: Region
    generations: NDArray[np.uint64]
    huge_bytes: int
    """How much of the regions the kernel maps by huge pages."""

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self.regions)

    def close(self) -> None:
        """Give all descriptors back."""
        for region in (*self.regions, self.table):
            region.close()


def region_sizes(total: int, region_bytes: int) -> list[int]:
    """`total` bytes cut in regions of `region_bytes`; the last one may be shorter."""
    whole, rest = divmod(total, region_bytes)
    return [region_bytes] * whole + ([rest] if rest else [])


def create_arena(total: int, region_bytes: int, check: Callable[[int], None] = check_fits) -> ArenaMemory:
    """Memory of `total` bytes (multiples of 4096). Raises `ConfigInvalid` when it does not fit, naming the limit."""
    table_bytes = -(-total // PAGE_BYTES * 8 // PAGE_BYTES) * PAGE_BYTES
    check(total + table_bytes)
    regions: list[Region] = []
    try:
        for index, size in enumerate(region_sizes(total, region_bytes)):
            regions.append(create_region(f"isthmus-arena-{index}", size, huge=True))
        table = create_region("isthmus-generations", table_bytes, huge=False)
    except ConfigInvalid:
        for region in regions:
            region.close()
        raise
    huge = huge_bytes([region.view for region in regions])
    return ArenaMemory(tuple(regions), table, np.frombuffer(table.view, np.uint64), huge)


def huge_bytes(views: Sequence[memoryview], smaps: Path = Path("/proc/self/smaps")) -> int:
    """How many bytes of the mappings under `views` the kernel maps by huge pages; 0 where it does not say."""
    starts = {np.frombuffer(view, np.uint8).ctypes.data for view in views}
    total, inside = 0, False
    try:
        with smaps.open() as lines:
            for line in lines:
                name, _, rest = line.partition(" ")
                if not name.endswith(":"):
                    inside = int(name.partition("-")[0], 16) in starts
                elif inside and name == "ShmemPmdMapped:":
                    total += int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        return 0
    return total


def _populate(mapping: mmap.mmap, size: int) -> None:
    """Fault every page in. Kernels before 5.14 do not know how to be asked: their pages are written to instead."""
    for start in range(0, size, _POPULATE_BYTES):
        length = min(_POPULATE_BYTES, size - start)
        if not _advise(mapping, MADV_POPULATE_WRITE, start, length):
            np.frombuffer(mapping, np.uint8)[start : start + length : PAGE_BYTES] = 0


def _advise(mapping: mmap.mmap, advice: int, start: int, length: int) -> bool:
    """Whether the kernel took the advice."""
    try:
        mapping.madvise(advice, start, length)
    except OSError:
        return False
    return True
