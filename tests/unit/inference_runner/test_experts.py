"""Sparse experts: the sum a slow loop gives, the shared expert, ties, and in exact mode a row's own bits."""

import pytest
import torch
from torch.nn.functional import linear, silu

from isthmus.execution.inference.config_families import MoeConfig
from isthmus.execution.inference.exact import ROW_TILE, exact_kernels
from isthmus.execution.inference.models.layers import LayerWeights
from isthmus.execution.inference.models.mlp import read_mlp
from isthmus.execution.inference.models.moe import SparseMoe, moe_shapes
from isthmus.execution.inference.models.step import Kernels, route
from isthmus.execution.inference.runner import default_kernels

HIDDEN, EXPERTS = 24, 5
CPU = torch.device("cpu")


def moe_of(per_token: int = 2, *, normalise: bool = True, shared: int = 12) -> MoeConfig:
    return MoeConfig(EXPERTS, per_token, 16, normalise, (True,), shared)


def tensors_of(moe: MoeConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"layer.{name}": torch.randn(shape, generator=generator) for name, shape in moe_shapes(moe, HIDDEN).items()}


def made(moe: MoeConfig, kernels: Kernels) -> SparseMoe:
    weights = LayerWeights(tensors_of(moe), "layer", kernels)
    experts = [read_mlp(weights, f"mlp.experts.{number}") for number in range(moe.experts)]
    shared = None
    if moe.shared_intermediate_size:
        shared = read_mlp(weights, "mlp.shared_expert"), weights.linear("mlp.shared_expert_gate")
    return SparseMoe(moe, weights.linear("mlp.gate"), experts, kernels, shared)


def slow(moe: MoeConfig, rows: torch.Tensor) -> torch.Tensor:
    """Row by row, expert by expert."""
    tensors = tensors_of(moe)

    def mlp(name: str, row: torch.Tensor) -> torch.Tensor:
        gate, up, down = (tensors[f"layer.mlp.{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return linear(silu(linear(row, gate)) * linear(row, up), down)

    out = []
    for row in rows:
        shares = linear(row, tensors["layer.mlp.gate.weight"]).softmax(-1)
        best = shares.topk(moe.per_token)
        total = best.values.sum() if moe.normalise else 1.0
        mixed = sum(
            share / total * mlp(f"experts.{number}", row)
            for share, number in zip(best.values, best.indices.tolist(), strict=True)
        )
        if moe.shared_intermediate_size:
            mixed += torch.sigmoid(linear(row, tensors["layer.mlp.shared_expert_gate.weight"])) * mlp(
                "shared_expert", row
            )
        out.append(mixed)
    return torch.stack(out)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "moe",
    [moe_of(), moe_of(1, normalise=False), moe_of(3, normalise=False, shared=0), moe_of(EXPERTS, shared=0)],
    ids=["two-shared", "one-shared", "three", "all"],
)
def test_every_row_meets_its_best_experts(moe: MoeConfig, exact: bool) -> None:
    rows = torch.randn(ROW_TILE * 3, HIDDEN, generator=torch.Generator().manual_seed(4))
    kernels = exact_kernels() if exact else default_kernels(CPU, torch.float32)
    torch.testing.assert_close(made(moe, kernels)(rows), slow(moe, rows), atol=1e-3, rtol=1e-4)


def test_in_exact_mode_a_row_does_not_feel_the_others() -> None:
    block = made(moe_of(3), exact_kernels())
    rows = torch.randn(ROW_TILE * 5, HIDDEN, generator=torch.Generator().manual_seed(5))
    whole = block(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(6))
    assert torch.equal(block(rows[order]), whole[order])
    for place in (0, 17, 159):
        alone = torch.zeros(ROW_TILE, HIDDEN)
        alone[9] = rows[place]
        assert torch.equal(block(alone)[9], whole[place])


def test_of_equal_experts_the_lower_number_is_chosen() -> None:
    weights, experts = route(torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]]), 2, True)
    assert experts.tolist() == [[1, 2], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
