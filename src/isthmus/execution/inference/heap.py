"""The engine's heap: memory that a step's tensors leave is kept for the next step.

glibc gives large freed pieces back to the kernel at once, and every step pays for its page faults anew: a third of the
time of pointwise operators over 2,048 rows (measured; ADR 0015). mallopt(3) changes that for this process.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 128 * 1024 * 1024
_LARGEST_BYTES = 128 * 1024 * 1024


def one_heap() -> bool:
    """All threads allocate from one heap; to be called before there are any. False where libc cannot."""
    return _mallopt(_M_ARENA_MAX, 1)


def keep_freed() -> bool:
    """Keep up to 128 MiB of freed memory from now on. False where libc cannot.

    To be called once the model is loaded: pieces that loading needs go back to the kernel.
    """
    return _mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES) and _mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _mallopt(parameter: int, value: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(parameter, value))
