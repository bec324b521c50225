"""Memory of the host that other processes may be given: a memfd, mapped."""

import fcntl
import mmap
import os
import weakref
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Its size never changes, so touching a mapping of it cannot fail."""


class HostMemory:
    """`bytes` of zeros; pages become resident when they are first written. The descriptor is closed with this object,
    the mapping ends with the last view of it.
    """

    def __init__(self, descriptor: int, mapping: mmap.mmap) -> None:
        self.descriptor = descriptor
        self.bytes: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        weakref.finalize(self, os.close, descriptor)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.bytes.size


def host_memory(name: str, size: int) -> HostMemory:
    """`size` bytes, in huge pages where the system allows it for shared memory. Raises `MemoryError`."""
    descriptor = os.memfd_create(f"isthmus-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        os.close(descriptor)
        raise MemoryError(f"{size} bytes of shared memory are not to be had: {error}") from error
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return HostMemory(descriptor, mapping)
