"""The gated delta rule over whole sequences, in chunks, for training on a CPU or a GPU.

The recurrence is that of Gated DeltaNet (arXiv 2412.06464): ``S <- exp(g) S``, then
``S <- S + k (beta (v - k S))``, and the output is ``q S``. Within a chunk the corrections
solve one triangular system; across chunks the state follows an affine map
``S <- A S + B`` whose parts are made for all chunks at once, so that the loop over the
chunks is a single small product each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def unit(x: Tensor) -> Tensor:
    """The vectors of ``x`` at length one, as the published layout computes it."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _chunks(x: Tensor, size: int) -> Tensor:
    """``[batch, length, heads, ...]`` as ``[batch * heads, chunks, size, ...]``."""
    batch, length, heads = x.shape[:3]
    x = x.transpose(1, 2).reshape(batch * heads, length // size, size, *x.shape[3:])
    return x.contiguous()


def _states(decay: Tensor, keep: Tensor, add: Tensor) -> Tensor:
    """The state before every chunk: ``[n, chunks, keys, values]``."""
    state = torch.zeros_like(add[:, 0])
    found = [state]
    for at in range(add.shape[1] - 1):
        state = decay[:, at] * state + torch.baddbmm(add[:, at], keep[:, at], state)
        found.append(state)
    return torch.stack(found, 1)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int = 64) -> Tensor:
    """The outputs of the rule from a zero state.

    ``q`` and ``k`` are ``[batch, length, heads, keys]`` of unit length, ``v`` is
    ``[batch, length, heads, values]``, ``g`` (log of the decay, at most 0) and ``beta``
    are ``[batch, length, heads]``; all float32. Returns the shape of ``v``.
    """
    batch, length, heads, _ = q.shape
    short = -length % chunk
    if short:
        q, k, v = (functional.pad(x, (0, 0, 0, 0, 0, short)) for x in (q, k, v))
        g, beta = (functional.pad(x, (0, 0, 0, short)) for x in (g, beta))
    q, k, v, g, beta = (_chunks(x, chunk) for x in (q * q.shape[-1] ** -0.5, k, v, g, beta))
    total = g.cumsum(-1)
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    pairs = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(above, float("-inf")).exp()
    k_beta, grown = k * beta.unsqueeze(-1), total.exp().unsqueeze(-1)
    system = (k_beta @ k.mT) * pairs
    right = torch.cat((v * beta.unsqueeze(-1), k_beta * grown), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, read = solved.split((v.shape[-1], k.shape[-1]), -1)
    k_late = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).mT
    states = _states(total[..., -1].exp()[..., None, None], -(k_late @ read), k_late @ new)
    out = (q * grown) @ states + ((q @ k.mT) * pairs) @ (new - read @ states)
    return out.reshape(batch, heads, length + short, -1)[:, :, :length].transpose(1, 2)
