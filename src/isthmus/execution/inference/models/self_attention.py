"""Grouped-query attention over the KV memory (Ainslie et al. 2023): q, k and v are one product.

With `gated`, the output of each head is multiplied by the sigmoid of a gate that the query's projection gives beside
the query (Qiu et al. 2025, Qwen3-Next).
"""

import torch

from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.linear.base import Linear
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layers import LayerWeights, Mixer
from isthmus.execution.inference.models.pieces import Heads
from isthmus.execution.inference.models.step import StepTensors


class SelfAttention:
    """See the module. `slot` is the layer's place in the KV memory, `window` how many keys a query sees, 0 for all.

    `heads` and `gated` say how the projection is laid out.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        *,
        slot: int,
        window: int = 0,
        query_key_norm: bool = False,
        gated: bool = False,
    ) -> None:
        norms = None
        if query_key_norm:
            norms = weights.norm("self_attn.q_norm"), weights.norm("self_attn.k_norm")
        self.heads, self.gated = Heads(config.heads, config.kv_heads, config.head_dim, config.norm_eps, norms), gated
        self._slot, self._window = slot, window
        self._pieces, self._sigmoid = weights.kernels.pieces, weights.kernels.sigmoid
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._project = self._gated_projection(weights) if gated else weights.linear(*names)
        self._output = weights.linear("self_attn.o_proj")

    def _gated_projection(self, weights: LayerWeights) -> Linear:
        """q, k, v, gate: the file has query and gate of a head beside each other."""

        def ordered(kind: str) -> list[torch.Tensor]:
            query = weights.tensor(f"self_attn.q_proj.{kind}")
            query = query.view(self.heads.query, 2, self.heads.dim, *query.shape[1:])
            key, value = (weights.tensor(f"self_attn.{name}.{kind}") for name in ("k_proj", "v_proj"))
            return [query[:, 0].flatten(0, 1), key, value, query[:, 1].flatten(0, 1)]

        biased = f"{weights.prefix}.self_attn.q_proj.bias" in weights.tensors
        bias = torch.cat(ordered("bias")) if biased else None
        return weights.kernels.linear.prepare(torch.cat(ordered("weight")), bias)

    def __call__(self, rows: torch.Tensor, step: StepTensors, memory: KvMemory) -> torch.Tensor:
        """See `Mixer`: project, normalise, rotate, write K and V, attend."""
        projected = self._project(rows)
        places = step.write[self._slot]
        query = self._pieces.rotate_write(projected, self.heads, (step.cos, step.sin), memory.rows, places)
        mixed = step.attention(self._slot, query, self._window).flatten(1)
        if self.gated:
            mixed = mixed * self._sigmoid(projected[:, -mixed.shape[1] :])
        return self._output(mixed)


def plain_attention(config: ModelConfig, index: int, weights: LayerWeights) -> Mixer:
    """`MixerBuilder` of a layer whose queries and keys are rotated as they are."""
    return SelfAttention(config, weights, slot=index, window=config.windows[index])


def normed_attention(config: ModelConfig, index: int, weights: LayerWeights) -> Mixer:
    """`MixerBuilder` of a layer whose queries and keys are normalised by head before the rotation."""
    return SelfAttention(config, weights, slot=index, window=config.windows[index], query_key_norm=True)
