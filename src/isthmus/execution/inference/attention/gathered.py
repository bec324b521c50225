"""Default attention in plain PyTorch, over the parts that a plan has (plan.py): gathers and SDPA.

A span with many queries goes in chunks of them, each over the keys up to its last query: a product over all keys would
compute twice what is needed, and no mask exceeds a chunk.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from isthmus.execution.inference.attention.base import Span, StepAttention
from isthmus.execution.inference.attention.mirror import Mirror, Mirrored
from isthmus.execution.inference.attention.plan import Group, Plan, Prefill, make_plan
from isthmus.execution.inference.attention.shared import merge
from isthmus.execution.inference.kv_memory import KvMemory

CHUNK_BYTES = 512
"""Queries of a chunk on a CPU, times the bytes of an element (SDPA packs the keys of a call anew in half precision)."""
LAUNCHED_CHUNK = 512
"""Queries of a chunk elsewhere."""
LEAST_FOLDED = 4
"""Sequences from which on one product for all heads keeps the threads busy."""
WIDEST_FOLDED = 512
"""Elements of K of a token up to which that product costs less than a product a head."""


class GatheredAttention:
    """See the module. Works on any device that has SDPA. Up to `copies_bytes` of decoding sequences are kept in one
    piece each, on a CPU (mirror.py).
    """

    def __init__(self, copies_bytes: int = 0) -> None:
        self._copies_bytes = copies_bytes
        self._mirror: Mirror | None = None

    def plan(self, spans: Sequence[Span], memory: KvMemory, heads: int) -> StepAttention:
        """See `AttentionBackend`."""
        del heads
        if self._mirror is None and self._copies_bytes and memory.rows.device.type == "cpu":
            self._mirror = Mirror(memory, self._copies_bytes)
        return _GatheredStep(memory, spans, self._mirror)


class _Result:
    """Where the parts of a step put their results; with log-sum-exps when others are to be merged with them.

    `rows` None stands for all rows in order: then nothing is copied.
    """

    def __init__(self, query: torch.Tensor, *, merged: bool) -> None:
        self._query = query
        self._merged = merged
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def put(self, rows: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """The first result for `rows`: [rows, heads, head_dim], [rows, heads]."""
        out = out.float() if self._merged else out
        if rows is None:
            self._out, self._lse = out, lse
            return
        if self._out is None:
            self._out = torch.empty(self._query.shape, dtype=out.dtype, device=out.device)
            if self._merged and lse is not None:
                self._lse = torch.empty(self._query.shape[:2], dtype=lse.dtype, device=lse.device)
        self._out.index_copy_(0, rows, out)
        if self._lse is not None and lse is not None:
            self._lse.index_copy_(0, rows, lse)

    def merge(self, rows: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """The result over further keys."""
        if self._out is None or self._lse is None or lse is None:
            raise ValueError("nothing was to be merged")
        if rows is None:
            merge(self._out, self._lse, out.float(), lse)
            return
        had, had_lse = self._out.index_select(0, rows), self._lse.index_select(0, rows)
        merge(had, had_lse, out.float(), lse)
        self.put(rows, had, had_lse)

    def tensor(self) -> torch.Tensor:
        """The whole, in the query's dtype."""
        return torch.zeros_like(self._query) if self._out is None else self._out.to(self._query.dtype)


class _GatheredStep:
    """The plan of one step."""

    def __init__(self, memory: KvMemory, spans: Sequence[Span], mirror: Mirror | None) -> None:
        self._memory = memory
        self._mirror = mirror
        self._spans = spans
        self._rows = sum(span.count for span in spans)
        self._plans: dict[int, Plan] = {}
        self._masks: dict[tuple[int, int, int], torch.Tensor] = {}
        self._merging = memory.rows.device.type == "cpu"

    def __call__(self, layer: int, query: torch.Tensor, window: int = 0) -> torch.Tensor:
        """See `StepAttention`."""
        plan = self._plans.get(window)
        if plan is None:
            plan = make_plan(self._spans, self._memory, window, merging=self._merging, mirror=self._mirror)
            self._plans[window] = plan
        if self._rows == query.shape[0]:
            return self._attention(layer, query, plan, window)
        out = torch.zeros_like(query)
        out[: self._rows] = self._attention(layer, query[: self._rows], plan, window)
        return out

    def _attention(self, layer: int, query: torch.Tensor, plan: Plan, window: int) -> torch.Tensor:
        result = _Result(query, merged=bool(plan.common))
        for mirrored in plan.mirrored:
            result.put(mirrored.rows, *self._mirrored(layer, query, mirrored))
        for group in plan.groups:
            result.put(group.rows, *self._folded(layer, query, group))
        for part in plan.prefills:
            result.put(part.rows, *self._prefill(layer, query, part, window))
        for common in plan.common:
            result.merge(common.rows, *self._folded(layer, query, common))
        return result.tensor()

    def _gather(self, layer: int, keys: Sequence[torch.Tensor], sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each [sequences, kv_heads, length, head_dim] (strided)."""
        memory = self._memory
        both = memory.rows.index_select(0, keys[layer]).view(2, sequences, -1, memory.kv_heads, memory.head_dim)
        return both[0].transpose(1, 2), both[1].transpose(1, 2)

    def _folded(self, layer: int, query: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[rows, heads, head_dim], and the log-sum-exp [rows, heads].

        Queries of the heads that share K and V are rows of one product: [sequences, kv_heads, shared * queries, d].
        """
        sequences, queries, mask = group.sequences, group.queries, group.mask
        key, value = self._gather(layer, group.keys, sequences)
        heads, kv_heads, head_dim = query.shape[1], self._memory.kv_heads, self._memory.head_dim
        shared = heads // kv_heads
        picked = _pick(query, group.rows).view(sequences, queries, kv_heads, shared, head_dim)
        folded = picked.permute(0, 2, 3, 1, 4).reshape(sequences, kv_heads, shared * queries, head_dim)
        if mask is not None and queries > 1:
            mask = mask.repeat(1, 1, shared, 1)
        mixed, lse = _attend(folded, key, value, mask)
        mixed = mixed.reshape(sequences, kv_heads, shared, queries, head_dim).permute(0, 3, 1, 2, 4)
        if lse is not None:
            lse = lse.reshape(sequences, kv_heads, shared, queries).permute(0, 3, 1, 2).reshape(-1, heads)
        return mixed.reshape(-1, heads, head_dim), lse

    def _mirrored(
        self, layer: int, query: torch.Tensor, mirrored: Mirrored
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One query a sequence: [rows, heads, head_dim], and the log-sum-exp [rows, heads]."""
        key, value = mirrored.keys_values(layer, self._memory)
        picked = _pick(query, mirrored.rows)
        count, heads, head_dim = picked.shape
        kv_heads = self._memory.kv_heads
        shared, width = heads // kv_heads, kv_heads * head_dim
        if count < LEAST_FOLDED or width > WIDEST_FOLDED:
            split = (count, mirrored.length, kv_heads, head_dim)
            key, value = (one.view(split).transpose(1, 2) for one in (key, value))
            mixed, lse = _attend(picked.view(count, kv_heads, shared, head_dim), key, value, mirrored.mask)
        else:
            # All heads as rows of one product: each row is zero but where the K of its head is.
            own = torch.eye(kv_heads, dtype=query.dtype, device=query.device).view(1, kv_heads, 1, kv_heads, 1)
            rows = (picked.view(count, kv_heads, shared, 1, head_dim) * own).view(count, 1, heads, width)
            mixed, lse = _attend(rows, key[:, None], value[:, None], mirrored.mask, scale=head_dim**-0.5)
            mixed = mixed.reshape(count, kv_heads, shared, kv_heads, head_dim).diagonal(dim1=1, dim2=3)
            mixed = mixed.permute(0, 3, 1, 2)
        return mixed.reshape(count, heads, head_dim), None if lse is None else lse.reshape(count, heads)

    def _prefill(
        self, layer: int, query: torch.Tensor, part: Prefill, window: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[rows, heads, head_dim], and the log-sum-exp [rows, heads]. Each query sees the keys up to its own."""
        key, value = self._gather(layer, part.keys, part.sequences)
        rows = _pick(query, part.rows).view(part.sequences, part.queries, *query.shape[1:]).transpose(1, 2)
        on_cpu = query.device.type == "cpu"
        chunk = CHUNK_BYTES // query.element_size() if on_cpu else LAUNCHED_CHUNK
        if not (part.before or window) and (part.queries <= chunk or not on_cpu):
            return _unfold(*_attend(rows, key, value, None, causal=True))
        mixed: list[torch.Tensor] = []
        sums: list[torch.Tensor] = []
        for low in range(0, part.queries, chunk):
            count = min(chunk, part.queries - low)
            end = part.before + low + count
            first = max(0, part.before + low - window + 1) if window else 0
            mask = self._mask(count, end - first, window)
            kept = slice(first, end)
            out, lse = _attend(rows[:, :, low : low + count], key[:, :, kept], value[:, :, kept], mask)
            mixed.append(out)
            if lse is not None:
                sums.append(lse)
        return _unfold(torch.cat(mixed, 2), torch.cat(sums, 2) if sums else None)

    def _mask(self, queries: int, keys: int, window: int) -> torch.Tensor:
        """[queries, keys] additive, where the last query belongs to the last key. The same for every layer."""
        found = self._masks.get((queries, keys, window))
        if found is None:
            behind = np.arange(keys - queries, keys)[:, None] - np.arange(keys)
            hidden = (behind < 0) | (behind >= window) if window else behind < 0
            rows = self._memory.rows
            found = torch.from_numpy(np.where(hidden, -np.inf, 0.0).astype(np.float32)).to(rows.device, rows.dtype)
            self._masks[queries, keys, window] = found
        return found


def _pick(query: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return query if rows is None else query.index_select(0, rows)


def _unfold(mixed: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From [sequences, heads, queries, ...] to [sequences * queries, heads, ...]."""
    return mixed.transpose(1, 2).flatten(0, 1), None if lse is None else lse.transpose(1, 2).flatten(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA, and on a CPU its log-sum-exp [sequences, heads, queries] float32. Heads may share K and V."""
    if query.device.type != "cpu":
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out, None
    # What SDPA calls on a CPU; the public function keeps the log-sum-exp to itself.
    return torch._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
        query, key, value, is_causal=causal, attn_mask=mask, scale=scale
    )
