"""Default attention in plain PyTorch: gather K and V of a group of sequences through the block tables, then SDPA.

Sequences with few query tokens (decode, drafts) are grouped by length and padded, one gather and one SDPA a group.
Longer spans go one by one, in chunks of queries, so that no mask exceeds `QUERY_CHUNK` rows. Padding reads the zero
row of the memory and is masked. With a sliding window only the keys that some query of the span sees are gathered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from isthmus.execution.inference.attention.base import Span, StepAttention
from isthmus.execution.inference.kv_memory import KvMemory

SHORT_QUERY = 8
QUERY_CHUNK = 512
GROUP_TOKENS = 1 << 17
"""Keys gathered at a time, a limit on scratch memory."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences with the same number of queries, padded to the same number of keys."""

    queries: int
    rows: torch.Tensor  # [sequences * queries] packed rows
    keys: torch.Tensor  # [2, sequences * length] rows of K and V in layer 0
    mask: torch.Tensor  # [sequences, 1, queries, length], additive


@dataclass(frozen=True, slots=True)
class _Long:
    """One sequence with many queries. The first key gathered is that of position `low`."""

    first: int
    count: int
    start: int
    low: int
    keys: torch.Tensor  # [2, length]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the layers of one window share."""

    window: int
    groups: Sequence[_Group]
    long: Sequence[_Long]


class GatheredAttention:
    """See the module. Works on any device that has SDPA."""

    def plan(self, spans: Sequence[Span], memory: KvMemory, heads: int) -> StepAttention:
        """See `AttentionBackend`."""
        del heads
        return _GatheredStep(memory, spans)


def _plan(spans: Sequence[Span], memory: KvMemory, window: int) -> _Plan:
    short = [span for span in spans if span.count <= SHORT_QUERY]
    long = [_long(span, memory, window) for span in spans if span.count > SHORT_QUERY]
    return _Plan(window, [_group(part, memory, window) for part in _split(short, window)], long)


def _length(span: Span, window: int) -> int:
    """Keys that some query of the span sees."""
    return span.end - span.first_key(window)


def _split(spans: Sequence[Span], window: int) -> list[list[Span]]:
    """Groups in which padding at most doubles the keys, and which fit the scratch limit."""
    groups: list[list[Span]] = []
    length = 0
    for span in sorted(spans, key=lambda span: (span.count, -_length(span, window))):
        fits = groups and span.count == groups[-1][0].count and 2 * _length(span, window) >= length
        if not fits or (len(groups[-1]) + 1) * length > GROUP_TOKENS:
            groups.append([])
            length = _length(span, window)
        groups[-1].append(span)
    return groups


def _both(rows: np.ndarray, memory: KvMemory) -> torch.Tensor:
    """Rows of K, then of V, as an index on the device."""
    flat = rows.reshape(-1)
    return torch.from_numpy(np.stack((flat, flat + memory.value_offset))).to(memory.rows.device)


def _group(spans: Sequence[Span], memory: KvMemory, window: int) -> _Group:
    length, queries = max(_length(span, window) for span in spans), spans[0].count
    keys = np.full((len(spans), length), memory.zero_row, np.int64)
    for index, span in enumerate(spans):
        keys[index, : _length(span, window)] = span.rows[span.first_key(window) :]
    # How far each key lies behind each query; padding lies ahead of all of them.
    offsets = np.array([span.start - span.first_key(window) for span in spans])[:, None] + np.arange(queries)
    behind = offsets[:, :, None] - np.arange(length)
    hidden = (behind < 0) | (behind >= window) if window else behind < 0
    mask = np.zeros(hidden.shape, np.float32)
    mask[hidden] = -np.inf
    source = np.array([span.first for span in spans])[:, None] + np.arange(queries)
    device = memory.rows.device
    rows = torch.from_numpy(source.reshape(-1)).to(device)
    bias = torch.from_numpy(mask).to(device, memory.rows.dtype)[:, None]
    return _Group(queries, rows, _both(keys, memory), bias)


def _long(span: Span, memory: KvMemory, window: int) -> _Long:
    low = span.first_key(window)
    return _Long(span.first, span.count, span.start, low, _both(span.rows[low:], memory))


class _GatheredStep:
    """The plan of one step."""

    def __init__(self, memory: KvMemory, spans: Sequence[Span]) -> None:
        self._memory = memory
        self._spans = spans
        self._rows = sum(span.count for span in spans)
        self._plans: dict[int, _Plan] = {}

    def __call__(self, layer: int, query: torch.Tensor, window: int = 0) -> torch.Tensor:
        """See `StepAttention`."""
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = _plan(self._spans, self._memory, window)
        out = torch.empty_like(query) if self._rows == query.shape[0] else torch.zeros_like(query)
        for group in plan.groups:
            result = self._short(layer, query, group)
            out.index_copy_(0, group.rows, result)
        for part in plan.long:
            self._prefill(layer, query, part, window, out)
        return out

    def _gather(self, layer: int, keys: torch.Tensor, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each [sequences, kv_heads, length, head_dim] (strided)."""
        memory = self._memory
        index = (keys + memory.layer_offset(layer)).view(-1)
        both = memory.rows.index_select(0, index).view(2, sequences, -1, memory.kv_heads, memory.head_dim)
        return both[0].transpose(1, 2), both[1].transpose(1, 2)

    def _short(self, layer: int, query: torch.Tensor, group: _Group) -> torch.Tensor:
        """[real queries, heads, head_dim]."""
        queries = group.queries
        sequences = group.rows.numel() // queries
        key, value = self._gather(layer, group.keys, sequences)
        rows = query.index_select(0, group.rows).view(sequences, queries, *query.shape[1:])
        kv_heads, head_dim = self._memory.kv_heads, self._memory.head_dim
        # Queries of the heads that share K and V are rows of one product: [sequences, kv_heads, shared * queries, d].
        shared = query.shape[1] // kv_heads
        folded = rows.view(sequences, queries, kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
        folded = folded.reshape(sequences, kv_heads, shared * queries, head_dim)
        mask = group.mask if queries == 1 else group.mask.repeat(1, 1, shared, 1)
        mixed = scaled_dot_product_attention(folded, key, value, attn_mask=mask)
        mixed = mixed.view(sequences, kv_heads, shared, queries, head_dim).permute(0, 3, 1, 2, 4)
        return mixed.reshape(-1, query.shape[1], head_dim)

    def _prefill(self, layer: int, query: torch.Tensor, part: _Long, window: int, out: torch.Tensor) -> None:
        key, value = self._gather(layer, part.keys, 1)
        if part.start == 0 and (not window or part.count <= window):
            rows = query[part.first : part.first + part.count].transpose(0, 1)[None]
            mixed = scaled_dot_product_attention(rows, key, value, is_causal=True, enable_gqa=True)
            out[part.first : part.first + part.count] = mixed[0].transpose(0, 1)
            return
        for low in range(0, part.count, QUERY_CHUNK):
            high = min(low + QUERY_CHUNK, part.count)
            end = part.start + high
            first = max(part.low, part.start + low - window + 1) if window else 0
            seen = torch.arange(first, end, device=query.device)[None, :]
            at = torch.arange(part.start + low, end, device=query.device)[:, None]
            mask = (seen <= at) & (seen > at - window) if window else seen <= at
            rows = query[part.first + low : part.first + high].transpose(0, 1)[None]
            kept = slice(first - part.low, end - part.low)
            mixed = scaled_dot_product_attention(
                rows, key[:, :, kept], value[:, :, kept], attn_mask=mask, enable_gqa=True
            )
            out[part.first + low : part.first + high] = mixed[0].transpose(0, 1)
