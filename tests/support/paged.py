"""Attention over block tables as plainly as it can be written, and captured work that is simply done again."""

from collections.abc import Callable

import torch

from isthmus.execution.inference.attention.paged import Tables
from isthmus.execution.inference.gpu import Accelerator
from isthmus.execution.inference.graphs import Output
from isthmus.execution.inference.kv_memory import KvMemory


def plain_kernel(query: torch.Tensor, memory: KvMemory, tables: Tables, layer: int, window: int) -> torch.Tensor:
    """`PagedKernel`: every score of every sequence, in float32."""
    heads, dim, size = query.shape[1], query.shape[2], memory.block_tokens
    out = []
    for place, length in enumerate(tables.lengths.tolist()):
        keys = torch.arange(length)
        block = tables.blocks[place].long()[keys // size]
        rows = block * memory.block_rows + memory.layer_offset(layer) + keys % size
        key, value = (
            memory.rows[rows + offset].view(length, memory.kv_heads, dim).float() for offset in (0, memory.value_offset)
        )
        key, value = (one.repeat_interleave(heads // memory.kv_heads, 1) for one in (key, value))
        own = query[place * tables.queries : (place + 1) * tables.queries].float()
        scores = torch.einsum("qhd,khd->hqk", own, key) * dim**-0.5
        behind = torch.arange(length - tables.queries, length)[:, None] - keys
        hidden = (behind < 0) | (behind >= window) if window else behind < 0
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value))
    return torch.cat(out).to(query.dtype)


def again(work: Callable[[], Output]) -> Callable[[], Output]:
    """`Capture`: the work itself."""
    return work


PLAIN = Accelerator(lambda: plain_kernel, again)
