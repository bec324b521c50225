"""The gated delta rule of exact mode: every position by the recurrence, whatever a step holds.

A sequence's numbers go only through products and sums of single elements, which round the same wherever they stand,
through sums over the key dimension, one contiguous vector a sum (states lie transposed for it), and through
elementwise functions on padded pieces of a fixed size. No cells: a sequence may be cut anywhere.
"""

import torch

from isthmus.execution.inference.models.gated_delta import DeltaKernels, Pointwise

LANES = 32
"""Elementwise functions get a multiple of it: the vector code of torch leaves no scalar tail then."""
PIECE = 16_384
"""Elements a call: under the 32,768 from which torch splits work over threads, a multiple of LANES."""


def exact_pointwise(function: Pointwise, values: torch.Tensor) -> torch.Tensor:
    """`function` of each element, on pieces of a fixed size; the last one is padded to LANES."""
    flat = values.reshape(-1)
    count = flat.numel()
    padded = flat.new_zeros(-(-count // LANES) * LANES)
    padded[:count] = flat
    out = torch.cat([function(padded[low : low + PIECE]) for low in range(0, padded.numel(), PIECE)])
    return out[:count].view(values.shape)


def exact_unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors over the last dimension divided by their length, with 1e-6 beneath the root."""
    squares = vectors.square()
    return vectors / squares.sum(-1, keepdim=True).add_(1e-6).sqrt_()


def exact_advance(
    state: torch.Tensor, pair: torch.Tensor, decay: torch.Tensor, scaled: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """See `Advance`; states [n, heads, value_dim, key_dim]. No fused multiply-add: each step rounds once."""
    # The products have their own memory, so that their layout, and with it the order of sums, does not depend on n.
    products = state.new_empty(*pair.shape[:3], *state.shape[2:])
    found = torch.mul(state[:, :, None], pair[..., None, :], out=products).sum(-1)
    change = found[..., 0, :]
    change.copy_(value - scaled * change)
    state.mul_(decay[..., None]).add_(change[..., None] * pair[..., 0, None, :])
    return found


def exact_delta() -> DeltaKernels:
    """The kernels of exact mode."""
    return DeltaKernels(False, True, exact_advance, exact_pointwise, exact_unit)
