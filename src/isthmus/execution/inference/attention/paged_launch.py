"""Launches the Triton kernels of paged_kernels.py. Imported only where a GPU serves: it needs Triton."""

import torch
from triton.errors import TritonError

from isthmus.contracts.errors import EngineFailed
from isthmus.execution.inference.attention.paged import Tables
from isthmus.execution.inference.attention.paged_kernels import LOG2_E, attend_part, join_parts
from isthmus.execution.inference.kv_memory import KvMemory

LEAST = 16
"""The least side of a product of matrices."""
MOST_TILE = 64
TILE_BYTES = 32 << 10
"""Of the keys that a program holds at a time: several such tiles of K and V are under way in shared memory."""
MOST_PARTS = 32
LEAST_KEYS = 256
"""Keys of a part under which putting the parts together costs more than they save."""
PROGRAMS = 2
"""Programs wanted for each processor of the device."""


class TritonKernel:
    """`PagedKernel` on a device with so many `processors` (streaming multiprocessors)."""

    def __init__(self, processors: int) -> None:
        self._processors = processors

    def __call__(self, query: torch.Tensor, memory: KvMemory, tables: Tables, layer: int, window: int) -> torch.Tensor:
        """See `PagedKernel`. Raises `EngineFailed` where Triton cannot compile or launch them."""
        try:
            return self._launch(query, memory, tables, layer, window)
        except TritonError as error:
            raise EngineFailed(f"Triton: {type(error).__name__}: {str(error)[:200]}") from error

    def _launch(self, query: torch.Tensor, memory: KvMemory, tables: Tables, layer: int, window: int) -> torch.Tensor:
        rows, heads, dim = query.shape
        sequences, kv_heads = tables.blocks.shape[0], memory.kv_heads
        parts = self.parts(
            sequences * kv_heads, min(tables.longest, window + tables.queries) if window else tables.longest
        )
        wide = _power(dim)
        mixed = torch.empty((rows, heads, parts, dim), dtype=torch.float32, device=query.device)
        sums = torch.empty((rows, heads, parts), dtype=torch.float32, device=query.device)
        attend_part[(sequences, kv_heads, parts)](
            query,
            memory.rows,
            tables.blocks,
            tables.lengths,
            mixed,
            sums,
            dim**-0.5 * LOG2_E,
            tables.blocks.stride(0),
            memory.block_rows,
            memory.layer_offset(layer),
            KV_HEADS=kv_heads,
            SHARED=heads // kv_heads,
            QUERIES=tables.queries,
            ROWS=_power(tables.queries * (heads // kv_heads)),
            DIM=dim,
            WIDE=wide,
            BLOCK_TOKENS=memory.block_tokens,
            WINDOW=window,
            PARTS=parts,
            TILE=max(LEAST, min(MOST_TILE, TILE_BYTES // (wide * query.element_size()))),
        )
        joined = torch.empty_like(query)
        join_parts[(rows * heads,)](mixed, sums, joined, DIM=dim, WIDE=wide, PARTS=parts)
        return joined

    def parts(self, pairs: int, longest: int) -> int:
        """Parts of the keys of each of so many pairs of sequence and KV head: enough to keep the device busy."""
        wanted = -(-PROGRAMS * self._processors // pairs)
        most = min(wanted, -(-longest // LEAST_KEYS), MOST_PARTS)
        return 1 << (most.bit_length() - 1)


def _power(count: int) -> int:
    """The next power of two that a product takes."""
    return max(LEAST, 1 << (count - 1).bit_length())
