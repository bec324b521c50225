"""What the machine can do, measured in the same run: `python -m isthmus.bench.roofline THREADS DTYPE DEVICE` writes one
JSON object. DTYPE is bf16, f32, or auto for what the engine takes a bfloat16 model in; the object says which.

Bandwidth: the best of several reads of 1 GiB. GEMM: the best of several products of 2048 x 2048
matrices, on a GPU of 8192 x 8192.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

from isthmus.execution.inference.linear.dense import computes_bf16

_ELEMENTS = 1 << 28
_SIDE, _GPU_SIDE = 2048, 8192
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
    dtype, device = sys.argv[2], torch.device(sys.argv[3])
    on_cpu = device.type == "cpu"
    data = torch.ones(_ELEMENTS, device=device)
    read = best_seconds(lambda: float(data.sum()))
    if dtype == "auto":
        dtype = "bf16" if not on_cpu or computes_bf16() else "f32"
    element = torch.bfloat16 if dtype == "bf16" else torch.float32
    side = _SIDE if on_cpu else _GPU_SIDE
    left, right = (torch.randn(side, side, device=device).to(element) for _ in range(2))
    # One element of the product is read: without it a GPU would only have been told to multiply.
    multiply = best_seconds(lambda: float((left @ right)[0, 0]))
    name = "" if on_cpu else torch.cuda.get_device_name(device)
    bandwidth, flops = data.numel() * data.element_size() / read, 2 * side**3 / multiply
    print(json.dumps({"bytes_per_s": bandwidth, "flops_per_s": flops, "dtype": dtype, "device": name}))


if __name__ == "__main__":
    main()
