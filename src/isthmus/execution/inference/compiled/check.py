"""The self-check of loaded pieces: against the eager ones, on random rows, before any request meets them."""

import torch

from isthmus.execution.inference.compiled.pieces import example
from isthmus.execution.inference.compiled.spec import PieceSpec
from isthmus.execution.inference.models.pieces import (
    AddNorm,
    Heads,
    RotateWrite,
    eager_add_norm,
    eager_rotate_write,
)
from isthmus.execution.inference.models.step import rms_norm

ROWS = (1, 2, 33)
TOLERANCE = {"f32": 2e-5, "bf16": 2.0**-5}
"""Relative and absolute. bfloat16 has 8 bits; three roundings of values up to 4 may differ."""


def differs(add_norm: AddNorm, rotate_write: RotateWrite, spec: PieceSpec, rows: int) -> str:
    """Which piece differs from its eager form on so many rows; empty when none does.

    Values are copied bit for bit and memory that is not addressed keeps its bits, else they differ.
    """
    near = TOLERANCE[spec.dtype]
    added, turned = example(spec, rows, 4 * rows + 5, seed=rows)
    with torch.inference_mode():
        ours, theirs = [one.clone() for one in added], [one.clone() for one in added]
        normed = add_norm(ours[0], ours[1], ours[2], spec.eps)
        expected = eager_add_norm(rms_norm)(theirs[0], theirs[1], theirs[2], spec.eps)
        pairs = [(ours[0], theirs[0]), (normed, expected)]
        if not all(_near(one, other, near) for one, other in pairs):
            return "add_norm"
        projected, cos, sin, memory, places, *weights = turned
        norms = (weights[0], weights[1]) if weights else None
        heads = Heads(spec.heads, spec.kv_heads, spec.head_dim, spec.eps, norms)
        mine, other = memory.clone(), memory.clone()
        query = rotate_write(projected, heads, (cos, sin), mine, places)
        wanted = eager_rotate_write(rms_norm)(projected, heads, (cos, sin), other, places)
        keys, values = places[:rows], places[rows:]
        rest = torch.ones(memory.shape[0], dtype=torch.bool).index_fill_(0, keys, value=False)
        if not _near(query, wanted, near) or not _near(mine[keys], other[keys], near):
            return "rotate_write"
        if not torch.equal(mine[rest], other[rest]) or not torch.equal(mine[values], projected_values(projected, spec)):
            return "rotate_write"
    return ""


def projected_values(projected: torch.Tensor, spec: PieceSpec) -> torch.Tensor:
    """The values in a projection [rows, columns]: [rows, kv_heads * head_dim]."""
    first = (spec.heads + spec.kv_heads) * spec.head_dim
    return projected[:, first : first + spec.kv_heads * spec.head_dim]


def _near(one: torch.Tensor, other: torch.Tensor, near: float) -> bool:
    same = one.dtype is other.dtype and one.shape == other.shape
    return same and torch.allclose(one.float(), other.float(), rtol=near, atol=near)
