"""What the machine can do, measured in the same run: `python -m isthmus.bench.roofline THREADS DTYPE` writes one JSON
object. DTYPE is bf16, f32, or auto for what the engine takes a bfloat16 model in; the object says which.

Bandwidth: the best of several reads of 1 GiB. GEMM: the best of several products of 2048 x 2048 matrices.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

from isthmus.execution.inference.linear.dense import computes_bf16

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
    dtype = sys.argv[2]
    if dtype == "auto":
        dtype = "bf16" if computes_bf16() else "f32"
    element = torch.bfloat16 if dtype == "bf16" else torch.float32
    left, right = (torch.randn(_SIDE, _SIDE).to(element) for _ in range(2))
    multiply = best_seconds(lambda: left @ right)
    bandwidth, flops = data.numel() * data.element_size() / read, 2 * _SIDE**3 / multiply
    print(json.dumps({"bytes_per_s": bandwidth, "flops_per_s": flops, "dtype": dtype}))


if __name__ == "__main__":
    main()
