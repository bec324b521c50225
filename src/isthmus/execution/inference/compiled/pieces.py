"""The pieces as modules to be exported, and as callables once they are compiled.

The arithmetic is that of models/pieces.py and models/step.py: RMSNorm in float32 inside, everything else in the model's
dtype. Fused, values between two operators may stay in float32, so bfloat16 results can differ in the last bits.
"""

from collections.abc import Callable, Sequence

import torch

from isthmus.contracts.errors import EngineFailed
from isthmus.execution.inference.compiled.spec import DTYPES, PieceSpec
from isthmus.execution.inference.models.pieces import AddNorm, Angles, Heads, RotateWrite

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""A loaded library: flat inputs to outputs."""


def _norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = rows.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(rows.dtype)


class AddNormModule(torch.nn.Module):
    """`AddNorm` as a module: hidden [rows, n], delta [rows, n], weight [n]."""

    def __init__(self, spec: PieceSpec) -> None:
        super().__init__()
        self._eps = spec.eps

    def forward(self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Adds delta to hidden in place."""
        total = hidden + delta
        normed = _norm(total, weight, self._eps)
        hidden.copy_(total)
        return normed


class RotateWriteModule(torch.nn.Module):
    """`RotateWrite` as a module, every row real: places has two of each row."""

    def __init__(self, spec: PieceSpec) -> None:
        super().__init__()
        self._spec = spec

    def forward(  # noqa: PLR0917 - libraries take flat inputs
        self,
        projected: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        memory: torch.Tensor,
        places: torch.Tensor,
        query_weight: torch.Tensor | None = None,
        key_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes into the memory in place. The query comes out in one piece."""
        spec, pair = self._spec, self._spec.heads + self._spec.kv_heads
        split = projected.view(projected.shape[0], -1, spec.head_dim)
        turned = split[:, :pair]
        if query_weight is not None and key_weight is not None:
            query = _norm(split[:, : spec.heads], query_weight, spec.eps)
            turned = torch.cat((query, _norm(split[:, spec.heads : pair], key_weight, spec.eps)), 1)
        first = turned[..., : spec.rotary_dim]
        # A flip of the two halves is an index to the compiler, a concatenation would be a copy; so are two writes.
        halves = first.reshape(*first.shape[:-1], 2, -1).flip(-2).flatten(-2)
        rotated: torch.Tensor = first * cos + halves * sin
        if spec.rotary_dim < spec.head_dim:
            rotated = torch.cat((rotated, turned[..., spec.rotary_dim :]), -1)
        rows = projected.shape[0]
        memory.index_copy_(0, places[:rows], rotated[:, spec.heads :].flatten(1))
        memory.index_copy_(0, places[rows:], split[:, pair : pair + spec.kv_heads].flatten(1))
        return rotated[:, : spec.heads].contiguous()


def example(spec: PieceSpec, rows: int, pool: int, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random inputs of the two modules, for `rows` rows and a memory of `pool` rows, at least twice as many."""
    generator = torch.Generator().manual_seed(seed)
    dtype, norm_dtype = DTYPES[spec.dtype], DTYPES[spec.norm_dtype]

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    added = [random(rows, spec.hidden), random(rows, spec.hidden), random(spec.hidden, dtype=norm_dtype)]
    angles = torch.rand(rows, 1, spec.rotary_dim // 2, generator=generator) * 6.3
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((-angles.sin(), angles.sin()), -1)
    places = torch.randperm(pool, generator=generator)[: 2 * rows]
    memory = random(pool, spec.kv_heads * spec.head_dim)
    turned = [random(rows, spec.columns), cos.to(dtype), sin.to(dtype), memory, places]
    if spec.head_norm:
        turned += [random(spec.head_dim, dtype=DTYPES[spec.head_norm]) for _ in range(2)]
    return added, turned


def compiled_add_norm(run: Run) -> AddNorm:
    """`AddNorm` by a loaded library. The epsilon is the one that it was built with."""

    def add_norm(hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        del eps
        # Libraries read tensors as if in one piece: the hidden rows are, the delta is whatever a layer gave.
        return run([hidden, delta.contiguous(), weight])[0]

    return add_norm


def compiled_rotate_write(run: Run) -> RotateWrite:
    """`RotateWrite` by a loaded library, for steps without padding."""

    def rotate_write(
        projected: torch.Tensor, heads: Heads, angles: Angles, memory: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        if places.shape[0] != 2 * projected.shape[0]:
            raise EngineFailed("compiled pieces were given padded rows")
        inputs = [projected.contiguous(), *angles, memory, places]
        if heads.norms is not None:
            inputs += heads.norms
        return run(inputs)[0]

    return rotate_write
