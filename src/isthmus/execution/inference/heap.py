"""The engine's memory: what there is for it; and a heap in which what a step's tensors leave is kept for the next.

glibc gives large freed pieces back to the kernel at once, and every step pays for its page faults anew: a third of the
time of pointwise operators over 2,048 rows (measured; ADR 0015). mallopt(3) changes that for this process.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 128 * 1024 * 1024
_LARGEST_BYTES = 128 * 1024 * 1024


def one_heap() -> bool:
    """All threads allocate from one heap; to be called before there are any. False where libc cannot."""
    return _mallopt(_M_ARENA_MAX, 1)


def keep_freed() -> bool:
    """Keep up to 128 MiB of freed memory from now on. False where libc cannot.

    To be called once the model is loaded: what loading left goes back to the kernel first (measured: 110 MB).
    """
    _trim()
    return _mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES) and _mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def available_bytes(root: Path = Path("/")) -> int | None:
    """What this process may still take: the kernel's estimate, or its cgroup's limit (v2) when that is lower.

    The block pool becomes resident as it fills, so one that cannot fit must be refused when it is made. None where
    neither is told.
    """
    free = [line for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    found = [int(line.split()[1]) * 1024 for line in free]
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::/"):
            limit = _lines(root / "sys/fs/cgroup" / line[4:] / "memory.max")
            found += [int(text) for text in limit if text.isdigit()]
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _trim() -> None:
    """Give freed pages back, where libc can (malloc_trim(3))."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _mallopt(parameter: int, value: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(parameter, value))
