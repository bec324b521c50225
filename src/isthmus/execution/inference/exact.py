"""Exact mode: logits bitwise the same for any batch, chunking or reuse. float32 on a CPU.

How the promise is kept: a row's numbers go only through operators of a fixed shape.
 - Rows of a step are padded to a multiple of `ROW_TILE`; every linear runs tile by tile on [ROW_TILE, in].
 - Attention runs on items of `QUERY_TILE` queries of one sequence, at absolute positions p with equal p // QUERY_TILE,
   a query always in row p % QUERY_TILE; keys come in tiles of `KEY_TILE` aligned to absolute positions, combined by an
   online softmax (Milakov & Gimelshein 2018) in which a tile out of sight changes nothing, ahead or behind a window.
 - exp, silu and the sigmoid, whose vector code differs from their scalar tails, run on pieces of a fixed number of
   elements; the routing of experts on tiles of rows. An expert's rows are padded like those of a step.
That a row's result does not depend on its place in a tile or on the other rows is a property of the machine's matrix
kernels. `prove_exact` (exact_proof.py) tests it at load with the model's own weights and refuses the mode with
`ExactUnavailable`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from isthmus.execution.inference.attention.base import Span, StepAttention
from isthmus.execution.inference.exact_delta import exact_delta
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.linear.base import Linear, LinearBackend
from isthmus.execution.inference.linear.dense import dense_linear
from isthmus.execution.inference.models.pieces import eager_pieces
from isthmus.execution.inference.models.step import Kernels, route

ROW_TILE = 32
QUERY_TILE = 4
KEY_TILE = 64
PIECE = 16_384
"""Elements a call of exp or silu: under the 32,768 from which torch splits work over threads, a multiple of 32."""
ITEM_LIMIT = 256
"""Attention items at a time, a limit on scratch memory."""


class TiledLinear:
    """A linear whose every product has ROW_TILE rows."""

    def __init__(self, inner: LinearBackend) -> None:
        self._inner = inner

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """See `LinearBackend`."""
        product = self._inner.prepare(weight, bias)

        def linear(rows: torch.Tensor) -> torch.Tensor:
            if rows.shape[0] == ROW_TILE:
                return product(rows.contiguous())
            out = rows.new_empty(rows.shape[0], weight.shape[0])
            for low in range(0, rows.shape[0], ROW_TILE):
                out[low : low + ROW_TILE] = product(rows[low : low + ROW_TILE].contiguous())
            return out

        return linear

    def prepare_swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> Linear | None:
        """See `LinearBackend`: the activation has rules of its own here (`exact_gate`)."""
        del gate, up
        return None


def exact_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm by operators that treat each row alone and round each step exactly."""
    scale = rows.square().mean(-1, keepdim=True).add_(eps).sqrt_()
    return (rows / scale).mul_(weight)


def exact_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in pieces of a fixed size. Rows are a multiple of ROW_TILE."""
    flat = gate.contiguous().view(-1)
    for low in range(0, flat.numel(), PIECE):
        piece = flat[low : low + PIECE]
        torch.nn.functional.silu(piece, inplace=True)
    return flat.view(gate.shape).mul_(up)


def exact_sigmoid(rows: torch.Tensor) -> torch.Tensor:
    """The logistic function in pieces of a fixed size. Rows are a multiple of ROW_TILE."""
    flat = rows.clone(memory_format=torch.contiguous_format).view(-1)
    for low in range(0, flat.numel(), PIECE):
        flat[low : low + PIECE].sigmoid_()
    return flat.view(rows.shape)


def exact_route(logits: torch.Tensor, per_token: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` on one tile of rows after the other. Rows are a multiple of ROW_TILE."""
    parts = [route(tile.contiguous(), per_token, normalise) for tile in torch.split(logits, ROW_TILE)]
    return torch.cat([weights for weights, _ in parts]), torch.cat([experts for _, experts in parts])


@dataclass(frozen=True, slots=True)
class _Items:
    """Items with the same number of key tiles or fewer, longest first. Tile t of an item is its t-th in sight."""

    source: torch.Tensor  # [items * QUERY_TILE] packed rows; padding reads row 0
    targets: torch.Tensor  # packed rows of the real queries
    picked: torch.Tensor  # their places in [items * QUERY_TILE]
    positions: torch.Tensor  # [items, 1, 1, QUERY_TILE, 1]
    origins: torch.Tensor  # [items, 1, 1, 1, 1] position of the first key of tile 0
    keys: torch.Tensor  # [2, tiles, items, KEY_TILE]
    active: Sequence[int]  # items that see tile t
    masked: Sequence[bool]  # whether tile t has keys out of sight for a query


class TiledAttention:
    """See the module."""

    def plan(self, spans: Sequence[Span], memory: KvMemory, heads: int) -> StepAttention:
        """See `AttentionBackend`."""
        del heads
        return _TiledStep(memory, spans)


def _groups(spans: Sequence[Span], memory: KvMemory, window: int) -> list[_Items]:
    """All items of a step, for the layers of one window."""
    pieces = [(span, tile) for span in spans for tile in _tiles(span)]
    pieces.sort(key=lambda piece: -len(_key_tiles(piece[0], piece[1], window)))
    chunks = [pieces[low : low + ITEM_LIMIT] for low in range(0, len(pieces), ITEM_LIMIT)]
    return [_items(chunk, memory, window) for chunk in chunks]


def _tiles(span: Span) -> range:
    return range(span.start // QUERY_TILE, (span.end - 1) // QUERY_TILE + 1)


def _key_tiles(span: Span, tile: int, window: int) -> range:
    """Key tiles from the first in sight of the item's first place to the last in sight of its last query."""
    first = max(0, tile * QUERY_TILE - window + 1) // KEY_TILE if window else 0
    return range(first, (min((tile + 1) * QUERY_TILE, span.end) - 1) // KEY_TILE + 1)


def _items(pieces: Sequence[tuple[Span, int]], memory: KvMemory, window: int) -> _Items:
    sights = [_key_tiles(*piece, window) for piece in pieces]
    counts = [len(sight) for sight in sights]
    origins = np.array([sight.start for sight in sights], np.int64) * KEY_TILE
    keys = np.full((len(pieces), counts[0] * KEY_TILE), memory.zero_row, np.int64)
    source = np.zeros((len(pieces), QUERY_TILE), np.int64)
    positions = np.zeros((len(pieces), QUERY_TILE), np.int64)
    real = np.zeros((len(pieces), QUERY_TILE), bool)
    for index, (span, tile) in enumerate(pieces):
        low, high = max(span.start, tile * QUERY_TILE), min(span.end, (tile + 1) * QUERY_TILE)
        slots = slice(low - tile * QUERY_TILE, high - tile * QUERY_TILE)
        source[index, slots] = np.arange(low, high) - span.start + span.first
        real[index, slots] = True
        positions[index] = np.arange(QUERY_TILE) + tile * QUERY_TILE
        keys[index, : high - origins[index]] = span.rows[origins[index] : high]
    tiled = keys.reshape(len(pieces), counts[0], KEY_TILE).swapaxes(0, 1)
    places = np.flatnonzero(real)
    active = [sum(count > tile for count in counts) for tile in range(counts[0])]
    # The first query of an item sees the least ahead, the last one the least behind.
    ahead, behind = positions[:, 0] - origins, positions[:, -1] - origins
    masked = [
        bool((ahead[:count] < (tile + 1) * KEY_TILE - 1).any())
        or bool(window and (behind[:count] - window >= tile * KEY_TILE).any())
        for tile, count in enumerate(active)
    ]
    return _Items(
        source=torch.from_numpy(source.reshape(-1)),
        targets=torch.from_numpy(source.reshape(-1)[places]),
        picked=torch.from_numpy(places),
        positions=torch.from_numpy(positions)[:, None, None, :, None],
        origins=torch.from_numpy(origins)[:, None, None, None, None],
        keys=torch.from_numpy(np.stack((tiled, tiled + memory.value_offset))),
        active=active,
        masked=masked,
    )


def _exp(values: torch.Tensor) -> torch.Tensor:
    """The exponential of `values` in place, in pieces of a fixed size: the last one is padded."""
    flat = values.view(-1)
    whole = flat.numel() // PIECE * PIECE
    for low in range(0, whole, PIECE):
        flat[low : low + PIECE].exp_()
    if whole < flat.numel():
        rest = flat.new_zeros(PIECE)
        rest[: flat.numel() - whole] = flat[whole:]
        flat[whole:] = rest.exp_()[: flat.numel() - whole]
    return values


class _TiledStep:
    """The plan of one step."""

    def __init__(self, memory: KvMemory, spans: Sequence[Span]) -> None:
        self._memory = memory
        self._spans = spans
        self._groups: dict[int, list[_Items]] = {}

    def __call__(self, layer: int, query: torch.Tensor, window: int = 0) -> torch.Tensor:
        """See `StepAttention`."""
        groups = self._groups.get(window)
        if groups is None:
            groups = self._groups[window] = _groups(self._spans, self._memory, window)
        out = torch.zeros_like(query)
        for group in groups:
            mixed = self._mix(layer, query, group, window)
            out.index_copy_(0, group.targets, mixed.index_select(0, group.picked))
        return out

    def _mix(self, layer: int, query: torch.Tensor, group: _Items, window: int) -> torch.Tensor:
        """[items * QUERY_TILE, heads, head_dim]: softmax(q k / sqrt(d)) v, one key tile after the other."""
        memory, (_, heads, dim) = self._memory, query.shape
        items, kv_heads = group.source.numel() // QUERY_TILE, memory.kv_heads
        shared = heads // kv_heads
        rows = query.index_select(0, group.source).view(items, QUERY_TILE, kv_heads, shared, dim)
        rows = rows.permute(0, 2, 3, 1, 4).reshape(items * kv_heads, shared * QUERY_TILE, dim) * dim**-0.5
        # Finite, so that a query may meet a tile that is out of its window before the first one in it.
        best = query.new_full((items, kv_heads, shared, QUERY_TILE, 1), torch.finfo(query.dtype).min)
        total = query.new_zeros(best.shape)
        mixed = query.new_zeros(items, kv_heads, shared, QUERY_TILE, dim)
        for tile, count in enumerate(group.active):
            key, value = self._gather(layer, group.keys[:, tile, :count])
            scores = torch.bmm(rows[: count * kv_heads], key.transpose(1, 2))
            scores = scores.view(count, kv_heads, shared, QUERY_TILE, KEY_TILE)
            if group.masked[tile]:
                seen = torch.arange(tile * KEY_TILE, (tile + 1) * KEY_TILE) + group.origins[:count]
                positions = group.positions[:count]
                hidden = (seen > positions) | (seen <= positions - window) if window else seen > positions
                scores.masked_fill_(hidden, -torch.inf)
            higher = torch.maximum(best[:count], scores.amax(-1, keepdim=True))
            shrink = _exp(best[:count] - higher)
            weights = _exp(scores.sub_(higher))
            best[:count] = higher
            total[:count] = total[:count] * shrink + weights.sum(-1, keepdim=True)
            part = torch.bmm(weights.view(count * kv_heads, shared * QUERY_TILE, KEY_TILE), value)
            mixed[:count] = mixed[:count] * shrink + part.view(count, kv_heads, shared, QUERY_TILE, dim)
        # Adding zero makes -0 into +0, so that tiles out of sight leave no trace at all.
        return (mixed / total).add_(0.0).permute(0, 3, 1, 2, 4).reshape(-1, heads, dim)

    def _gather(self, layer: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one key tile, each [items * kv_heads, KEY_TILE, head_dim]."""
        memory, count = self._memory, keys.shape[1]
        both = memory.rows.index_select(0, (keys + memory.layer_offset(layer)).reshape(-1))
        both = both.view(2, count, KEY_TILE, memory.kv_heads, memory.head_dim).transpose(2, 3).contiguous()
        both = both.view(2, count * memory.kv_heads, KEY_TILE, memory.head_dim)
        return both[0], both[1]


def exact_kernels() -> Kernels:
    """The kernels of exact mode."""
    inner = dense_linear(torch.device("cpu"), torch.float32)
    return Kernels(
        TiledLinear(inner),
        TiledAttention(),
        exact_norm,
        exact_gate,
        ROW_TILE,
        eager_pieces(exact_norm),
        sigmoid=exact_sigmoid,
        route=exact_route,
        delta=exact_delta(),
    )
