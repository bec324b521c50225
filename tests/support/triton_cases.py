"""The Triton kernels on a CPU. Run as a module, because how Triton works is decided when it is imported:

`TRITON_INTERPRET=1 python -m tests.support.triton_cases run` does every case in Triton's interpreter and prints, as
JSON, by how much each is off the plain kernel; `python -m tests.support.triton_cases build` compiles the kernels for
GPUs, down to machine code, and prints the sizes.
"""

import json
import sys
from typing import Any

import torch
from tests.support.paged import plain_kernel

from isthmus.execution.inference.attention.paged import Tables
from isthmus.execution.inference.attention.paged_kernels import attend_part, join_parts
from isthmus.execution.inference.attention.paged_launch import TritonKernel
from isthmus.execution.inference.kv_memory import KvMemory

CASES: dict[str, dict[str, Any]] = {
    "decode": {"lengths": [1, 16, 17, 100, 256]},
    "one-part": {"lengths": [40, 300], "processors": 1},
    "many-parts": {"lengths": [1, 2000, 900], "processors": 60},
    "heads-not-a-power": {"lengths": [33, 80], "kv_heads": 3, "shared": 3, "dim": 48},
    "one-kv-head": {"lengths": [33, 80], "kv_heads": 1, "shared": 7, "dim": 20},
    "drafts": {"lengths": [5, 64, 130], "queries": 5},
    "drafts-from-the-start": {"lengths": [3, 3], "queries": 3},
    "window": {"lengths": [5, 33, 130], "window": 20},
    "window-and-drafts": {"lengths": [5, 33, 130, 700], "window": 31, "queries": 4, "processors": 40},
    "window-of-one": {"lengths": [1, 50], "window": 1},
    "blocks-of-one": {"lengths": [70], "block_tokens": 1},
    "blocks-larger-than-tiles": {"lengths": [70, 300], "block_tokens": 128},
    "odd-blocks": {"lengths": [70, 300], "block_tokens": 24},
    "half": {"lengths": [70, 300], "dtype": "float16", "dim": 64},
}
# The interpreter's products of bfloat16 are wrong (of bits taken for integers); `build` compiles that dtype.


def made(case: dict[str, Any]) -> tuple[torch.Tensor, KvMemory, Tables]:
    """Random K, V and queries; what no sequence may read is NaN."""
    kv_heads, dim, size = case.get("kv_heads", 2), case.get("dim", 16), case.get("block_tokens", 16)
    lengths, queries = case["lengths"], case.get("queries", 1)
    dtype = getattr(torch, case.get("dtype", "float32"))
    need = sum(-(-length // size) for length in lengths)
    memory = KvMemory(
        blocks=need + 3, layers=3, block_tokens=size, kv_heads=kv_heads, head_dim=dim, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(len(lengths) * dim)
    memory.rows.fill_(torch.nan)
    free = torch.randperm(memory.blocks, generator=generator).tolist()
    blocks = torch.full((len(lengths), -(-max(lengths) // size) + 2), 10**6, dtype=torch.int32)
    for place, length in enumerate(lengths):
        own = [free.pop() for _ in range(-(-length // size))]
        blocks[place, : len(own)] = torch.tensor(own)
        keys = torch.arange(length)
        rows = blocks[place].long()[keys // size] * memory.block_rows + memory.layer_offset(1) + keys % size
        for offset in (0, memory.value_offset):
            memory.rows[rows + offset] = torch.randn(length, kv_heads * dim, generator=generator).to(dtype)
    shape = (len(lengths) * queries, kv_heads * case.get("shared", 2), dim)
    query = torch.randn(shape, generator=generator).to(dtype)
    return query, memory, Tables(blocks, torch.tensor(lengths, dtype=torch.int32), queries, max(lengths))


def run() -> dict[str, float]:
    """The largest difference of each case, of values of about 1."""
    found = {}
    for name, case in CASES.items():
        query, memory, tables = made(case)
        window = case.get("window", 0)
        out = TritonKernel(case.get("processors", 8))(query, memory, tables, 1, window)
        apart = (out.float() - plain_kernel(query, memory, tables, 1, window).float()).abs().max()
        found[name] = float(apart) if bool(torch.isfinite(apart)) else 1e9
    return found


def build() -> dict[str, int]:
    """Bytes of machine code of each kernel, by compute capability and dtype."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    shape = {"KV_HEADS": 8, "SHARED": 4, "QUERIES": 1, "ROWS": 16, "BLOCK_TOKENS": 16, "WINDOW": 0, "TILE": 64}
    wide = {"DIM": 64, "WIDE": 64, "PARTS": 8}
    whole = dict.fromkeys(("table_width", "block_rows", "layer_rows"), "i32")
    found = {}
    for capability, dtype in ((80, "fp32"), (80, "bf16"), (90, "bf16"), (90, "fp16")):
        tensors = {"query": f"*{dtype}", "memory": f"*{dtype}", "tables": "*i32", "lengths": "*i32"}
        parts = {"out": "*fp32", "sums": "*fp32"}
        kernels = {
            "attend_part": (attend_part, {**tensors, **parts, "scale": "fp32", **whole}, {**shape, **wide}),
            "join_parts": (join_parts, {**parts, "joined": f"*{dtype}"}, wide),
        }
        for name, (kernel, signature, constants) in kernels.items():
            types = {**signature, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(kernel, signature=types, constexprs=constants)
            binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            found[f"{name}, {dtype}, {capability}"] = len(binary.asm["cubin"])
    return found


if __name__ == "__main__":
    print(json.dumps({"run": run, "build": build}[sys.argv[1]]()))
