"""The dense feed-forward part: SwiGLU (Shazeer 2020), gate and up as one product."""

import torch

from isthmus.execution.inference.linear.base import Linear
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layers import Feed, LayerWeights
from isthmus.execution.inference.models.step import Kernels


class Mlp:
    """See the module."""

    def __init__(self, gate_up: Linear, down: Linear, kernels: Kernels) -> None:
        self._gate_up, self._down, self._gate = gate_up, down, kernels.gate

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Feed`."""
        gate, up = self._gate_up(rows).chunk(2, -1)
        return self._down(self._gate(gate, up))


def read_mlp(weights: LayerWeights, name: str) -> Mlp:
    """The MLP whose weights are named `name`.{gate,up,down}_proj."""
    gate_up = weights.linear(f"{name}.gate_proj", f"{name}.up_proj")
    return Mlp(gate_up, weights.linear(f"{name}.down_proj"), weights.kernels)


def dense_mlp(config: ModelConfig, index: int, weights: LayerWeights) -> Feed:
    """`FeedBuilder` of a dense layer."""
    del config, index
    return read_mlp(weights, "mlp")
