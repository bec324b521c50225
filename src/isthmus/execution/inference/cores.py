"""How many threads a step is computed with, unless a setting says so.

One a core: the processors this process may run on, no more than its cgroup's quota pays for (v2). Where cores have
several processors each (SMT), one a core and one a processor are measured on a product when the runner is made, and the
better is taken: what a second thread on a core's arithmetic units gains or costs depends on the machine.
Pinning threads to processors is left to the kernel: no order of pinned and free held (benchmarks/NEGATIVE.md).
"""

import math
import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from isthmus.contracts.clock import SystemClock

GAIN = 0.95
"""One a core is taken when its time is under this part of that of one a processor."""
_TIMES = 5
_ROWS, _SIDE = 128, 1024


def processors(allowed: Collection[int], root: Path = Path("/")) -> tuple[int, int]:
    """(processors, cores) that this process can keep busy; `allowed` are those it may run on."""
    quota = _quota(root)
    count = len(allowed) if quota is None else max(1, min(len(allowed), math.ceil(quota)))
    siblings = {_read(root / f"sys/devices/system/cpu/cpu{one}/topology/thread_siblings_list") for one in allowed}
    cores = len(allowed) if "" in siblings else len(siblings)
    return count, min(count, cores)


def choose_threads(dtype: torch.dtype, allowed: Collection[int] | None = None, root: Path = Path("/")) -> int:
    """The number of threads for products of `dtype` on this machine."""
    logical, cores = processors(os.sched_getaffinity(0) if allowed is None else allowed, root)
    if logical == cores:
        return logical
    rows, weight = torch.ones(_ROWS, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
    return faster(logical, cores, lambda: torch.nn.functional.linear(rows, weight), SystemClock().monotonic)


def faster(logical: int, cores: int, work: Callable[[], object], clock: Callable[[], float]) -> int:
    """Which number of threads does `work` in less time, in turns; `logical` unless `cores` is clearly better."""
    best: dict[int, float] = {}
    for _ in range(_TIMES):
        for count in (logical, cores):
            torch.set_num_threads(count)
            work()
            start = clock()
            work()
            best[count] = min(best.get(count, math.inf), clock() - start)
    return cores if best[cores] < GAIN * best[logical] else logical


def _quota(root: Path) -> float | None:
    """Processors that the cgroup (v2) pays for; None without a limit."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::/"):
            text = _read(root / "sys/fs/cgroup" / line[4:] / "cpu.max").split()
            if len(text) == 2 and text[0].isdigit() and text[1].isdigit() and int(text[1]):
                return int(text[0]) / int(text[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
