"""What the machine can do, measured in the same run: `python -m isthmus.bench.roofline THREADS` writes one JSON object.

Bandwidth: the best of several reads of 1 GiB. GEMM: the best of several products of 2048 x 2048 bfloat16 matrices.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

_ELEMENTS = 1 << 28
_SIDE = 2048
_TIMES = 5


def best_seconds(work: Callable[[], object]) -> float:
    """The shortest of a few runs after a first one."""
    work()
    found = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    """Measure with so many threads."""
    torch.set_num_threads(int(sys.argv[1]))
    data = torch.ones(_ELEMENTS)
    read = best_seconds(lambda: float(data.sum()))
    left, right = (torch.randn(_SIDE, _SIDE).bfloat16() for _ in range(2))
    multiply = best_seconds(lambda: left @ right)
    bandwidth, flops = data.numel() * data.element_size() / read, 2 * _SIDE**3 / multiply
    print(json.dumps({"bytes_per_s": bandwidth, "bf16_flops_per_s": flops}))


if __name__ == "__main__":
    main()
