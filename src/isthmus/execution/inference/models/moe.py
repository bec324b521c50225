"""Sparse experts (Shazeer et al. 2017; Fedus et al. 2021): each row goes to its best experts, weighted by the router.

Rows are sorted by expert, so that every expert that is met runs once a step, on all of its rows; they are padded to
the kernels' row tile. A row's experts are added in the order of their numbers, then the shared expert: the sum does
not depend on the other rows.
"""

from collections.abc import Sequence

import torch

from isthmus.execution.inference.config_families import MoeConfig
from isthmus.execution.inference.linear.base import Linear
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layers import Feed, LayerWeights
from isthmus.execution.inference.models.mlp import read_mlp
from isthmus.execution.inference.models.step import Kernels


class SparseMoe:
    """`Feed` of routed experts and, where there is one, a shared expert that every row meets.

    `shared` is the shared expert and its gate [hidden] -> [1], whose sigmoid weighs it (Qwen2-MoE).
    """

    def __init__(
        self,
        moe: MoeConfig,
        router: Linear,
        experts: Sequence[Feed],
        kernels: Kernels,
        shared: tuple[Feed, Linear] | None = None,
    ) -> None:
        self._moe, self._router, self._experts, self._kernels, self._shared = moe, router, experts, kernels, shared

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Feed`."""
        weights, chosen = self._kernels.route(self._router(rows), self._moe.per_token, self._moe.normalise)
        numbers, order = chosen.flatten().sort(stable=True)
        # Places in the flat [rows, per_token]: the row is the quotient.
        source, shares = order // self._moe.per_token, weights.flatten()[order, None]
        counts = torch.bincount(numbers, minlength=self._moe.experts).tolist()
        out = torch.zeros_like(rows)
        low = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                part = slice(low, low + count)
                mixed = expert(self._padded(rows.index_select(0, source[part])))[:count]
                out.index_add_(0, source[part], mixed * shares[part])
                low += count
        if self._shared is not None:
            feed, gate = self._shared
            out += feed(rows) * self._kernels.sigmoid(gate(rows))
        return out

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        rest = -rows.shape[0] % self._kernels.row_tile
        return torch.cat((rows, rows.new_zeros(rest, rows.shape[1]))) if rest else rows


def sparse_moe(config: ModelConfig, index: int, weights: LayerWeights) -> Feed:
    """`FeedBuilder` of a model with experts: dense in the layers that have none."""
    moe = config.moe
    if moe is None or not moe.sparse[index]:
        return read_mlp(weights, "mlp")
    experts = [read_mlp(weights, f"mlp.experts.{number}") for number in range(moe.experts)]
    shared = None
    if moe.shared_intermediate_size:
        shared = read_mlp(weights, "mlp.shared_expert"), weights.linear("mlp.shared_expert_gate")
    return SparseMoe(moe, weights.linear("mlp.gate"), experts, weights.kernels, shared)


def moe_shapes(moe: MoeConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's experts, router and shared expert, named from `mlp.` on."""
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (moe.experts, hidden)}
    parts = [(f"mlp.experts.{number}", moe.intermediate_size) for number in range(moe.experts)]
    if moe.shared_intermediate_size:
        parts.append(("mlp.shared_expert", moe.shared_intermediate_size))
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    for name, inner in parts:
        shapes[f"{name}.gate_proj.weight"] = (inner, hidden)
        shapes[f"{name}.up_proj.weight"] = (inner, hidden)
        shapes[f"{name}.down_proj.weight"] = (hidden, inner)
    return shapes
