"""Attention for GPUs: sequences with few queries read K and V through their block tables, the others are gathered.

A decoding sequence has one query and many keys; gathering them first moves them three times. The kernel (paged_launch)
reads them where they lie. Prompts have many queries for each key: there the gather is a small part, and SDPA's own
kernels are the best (gathered.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from isthmus.execution.inference.attention.base import AttentionBackend, Span, StepAttention
from isthmus.execution.inference.attention.plan import SHORT_QUERY
from isthmus.execution.inference.kv_memory import KvMemory


@dataclass(frozen=True, slots=True)
class Tables:
    """Sequences with equally many `queries` each, the last of their keys.

    `blocks` [sequences, width] int32: the blocks of each in order, anything behind them. `lengths` [sequences] int32:
    keys of each, this step's with them. `longest`: no length is over it, known without asking the device.
    """

    blocks: torch.Tensor
    lengths: torch.Tensor
    queries: int
    longest: int


class PagedKernel(Protocol):
    """Attention over block tables in one operation."""

    def __call__(self, query: torch.Tensor, memory: KvMemory, tables: Tables, layer: int, window: int) -> torch.Tensor:
        """`query` [sequences * queries, heads, head_dim] in one piece; the same shape. See `StepAttention`."""
        ...


class TableAttention:
    """`StepAttention` of a step in which every row is in `tables`, in order."""

    def __init__(self, kernel: PagedKernel, memory: KvMemory, tables: Tables) -> None:
        self._kernel, self._memory, self._tables = kernel, memory, tables

    def __call__(self, layer: int, query: torch.Tensor, window: int = 0) -> torch.Tensor:
        """See `StepAttention`."""
        return self._kernel(query.contiguous(), self._memory, self._tables, layer, window)


class PagedAttention:
    """`AttentionBackend`: few queries by `kernel`, many by `gathered`."""

    def __init__(self, kernel: PagedKernel, gathered: AttentionBackend) -> None:
        self._kernel, self._gathered = kernel, gathered

    def plan(self, spans: Sequence[Span], memory: KvMemory, heads: int) -> StepAttention:
        """See `AttentionBackend`."""
        device = memory.rows.device
        groups: dict[int, list[Span]] = {}
        for span in spans:
            groups.setdefault(span.count if span.count <= SHORT_QUERY else 0, []).append(span)
        many = groups.pop(0, [])
        paged = [
            _Paged(_packed(group, device), TableAttention(self._kernel, memory, _tables(group, memory, count)))
            for count, group in groups.items()
        ]
        if many:
            rest = self._gathered.plan(_in_order(many), memory, heads)
            paged.append(_Paged(_packed(many, device), rest))
        return _PagedStep(paged)


@dataclass(frozen=True, slots=True)
class _Paged:
    """Some rows of the step, and what attends for them alone."""

    rows: torch.Tensor
    attention: StepAttention


class _PagedStep:
    """`StepAttention` of several parts."""

    def __init__(self, parts: Sequence[_Paged]) -> None:
        self._parts = parts

    def __call__(self, layer: int, query: torch.Tensor, window: int = 0) -> torch.Tensor:
        """See `StepAttention`."""
        out = torch.zeros_like(query)
        for part in self._parts:
            out.index_copy_(0, part.rows, part.attention(layer, query.index_select(0, part.rows), window))
        return out


def _packed(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    """The packed rows of the spans' queries, one span after the other."""
    rows = np.concatenate([np.arange(span.first, span.first + span.count) for span in spans])
    return torch.from_numpy(rows).to(device)


def _in_order(spans: Sequence[Span]) -> list[Span]:
    """The spans as if they alone were the step."""
    first = np.cumsum([0, *(span.count for span in spans)])
    return [replace(span, first=int(start)) for span, start in zip(spans, first, strict=False)]


def _tables(spans: Sequence[Span], memory: KvMemory, queries: int) -> Tables:
    longest = max(span.end for span in spans)
    blocks = np.zeros((len(spans), -(-longest // memory.block_tokens)), np.int32)
    for place, span in enumerate(spans):
        own = span.rows[: span.end : memory.block_tokens] // memory.block_rows
        blocks[place, : own.size] = own
    lengths = np.array([span.end for span in spans], np.int32)
    device = memory.rows.device
    return Tables(torch.from_numpy(blocks).to(device), torch.from_numpy(lengths).to(device), queries, longest)
