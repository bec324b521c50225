"""The dense feed-forward part: SwiGLU (Shazeer 2020)."""

import torch

from isthmus.execution.inference.linear.base import Linear
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layers import Feed, LayerWeights
from isthmus.execution.inference.models.step import Kernels


class Mlp:
    """See the module. `inner` gives silu(gate) * up, `down` leads back to the hidden size."""

    def __init__(self, inner: Linear, down: Linear) -> None:
        self._inner, self._down = inner, down

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Feed`."""
        return self._down(self._inner(rows))


def read_mlp(weights: LayerWeights, name: str) -> Mlp:
    """The MLP whose weights are named `name`.{gate,up,down}_proj."""
    gate, up = f"{name}.gate_proj", f"{name}.up_proj"
    inner = None
    if not weights.biased(gate):
        inner = weights.kernels.linear.prepare_swiglu(weights.tensor(f"{gate}.weight"), weights.tensor(f"{up}.weight"))
    return Mlp(inner or _in_parts(weights.linear(gate, up), weights.kernels), weights.linear(f"{name}.down_proj"))


def _in_parts(gate_up: Linear, kernels: Kernels) -> Linear:
    """Gate and up as one product, then the activation."""
    return lambda rows: kernels.gate(*gate_up(rows).chunk(2, -1))


def dense_mlp(config: ModelConfig, index: int, weights: LayerWeights) -> Feed:
    """`FeedBuilder` of a dense layer."""
    del config, index
    return read_mlp(weights, "mlp")
