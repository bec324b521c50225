"""The pointwise work of a layer between its linears and attention, behind a seam that may change between two steps.

The eager pieces are plain operators. Compiled ones (compiled/) may take their place while a server runs; all layers
read them through one `Pieces`, so a change reaches all of them at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from isthmus.execution.inference.rope import rotate

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""RMSNorm of rows over the last dimension: rows, weight, eps."""
AddNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""hidden [rows, n], delta [rows, n], weight [n], eps: adds delta to hidden in place, returns hidden's RMSNorm."""


@dataclass(frozen=True, slots=True)
class Heads:
    """How a layer's projection is laid out: queries, keys, values and, if the layer has them, gates, head by head.

    `norms`: the weights [dim] of the RMSNorms of queries and of keys, None for a layer without.
    """

    query: int
    key: int
    dim: int
    eps: float
    norms: tuple[torch.Tensor, torch.Tensor] | None = None


Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosine and signed sine of each row [rows, 1, n] (rope.py); the first n dimensions of a head are rotated."""
RotateWrite = Callable[[torch.Tensor, Heads, Angles, torch.Tensor, torch.Tensor], torch.Tensor]
"""projected [rows, columns], heads, angles, memory rows [pool, key heads * dim], places [2 * real rows] of K, then V.

Writes K, normalised and rotated, and V of the first real rows into the memory. Returns the query, normalised and
rotated, [rows, query heads, dim].
"""


class Pieces:
    """The two pieces in use. Changed by the thread that runs steps, between two of them, or before the first."""

    def __init__(self, add_norm: AddNorm, rotate_write: RotateWrite) -> None:
        self.add_norm = add_norm
        self.rotate_write = rotate_write

    def use(self, add_norm: AddNorm, rotate_write: RotateWrite) -> None:
        """Compute with these from now on."""
        self.add_norm = add_norm
        self.rotate_write = rotate_write


def eager_pieces(norm: Norm) -> Pieces:
    """Pieces of plain operators, each norm of them by `norm`."""
    return Pieces(eager_add_norm(norm), eager_rotate_write(norm))


def eager_add_norm(norm: Norm) -> AddNorm:
    """`AddNorm` by an addition and `norm`."""

    def add_norm(hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        hidden += delta
        return norm(hidden, weight, eps)

    return add_norm


def eager_rotate_write(norm: Norm) -> RotateWrite:
    """`RotateWrite` by one operator after the other."""

    def rotate_write(
        projected: torch.Tensor, heads: Heads, angles: Angles, memory: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        split = projected.view(projected.shape[0], -1, heads.dim)
        pair, real = heads.query + heads.key, places.shape[0] // 2
        turned = split[:, :pair]
        if heads.norms is not None:
            query = norm(split[:, : heads.query], heads.norms[0], heads.eps)
            turned = torch.cat((query, norm(split[:, heads.query : pair], heads.norms[1], heads.eps)), 1)
        turned = rotate_first(turned, *angles)
        keys, values = turned[:real, heads.query :], split[:real, pair : pair + heads.key]
        fresh = torch.stack((keys.flatten(1), values.flatten(1))).flatten(0, 1)
        memory.index_copy_(0, places, fresh)
        return turned[:, : heads.query]

    return rotate_write


def rotate_first(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of [rows, heads, head_dim], as many as cos and sin [rows, 1, n] have."""
    count = cos.shape[-1]
    if count == heads.shape[-1]:
        return rotate(heads, cos, sin)
    return torch.cat((rotate(heads[..., :count], cos, sin), heads[..., count:]), -1)
