"""Grouped-query attention over the KV memory (Ainslie et al. 2023): q, k and v are one product.

With `gated`, the output of each head is multiplied by the sigmoid of a gate that the query's projection gives beside
the query (Qiu et al. 2025, Qwen3-Next).
"""

import torch

from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.linear.base import Linear
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layers import LayerWeights, Mixer
from isthmus.execution.inference.models.step import StepTensors
from isthmus.execution.inference.rope import rotate


class SelfAttention:
    """See the module. `slot` is the layer's place in the KV memory, `window` how many keys a query sees, 0 for all."""

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
        self._heads, self._pair, self._dim = config.heads, config.heads + config.kv_heads, config.head_dim
        self._slot, self._window, self._gated = slot, window, gated
        self._eps, self._norm, self._sigmoid = config.norm_eps, weights.kernels.norm, weights.kernels.sigmoid
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._project = self._gated_projection(weights) if gated else weights.linear(*names)
        self._output = weights.linear("self_attn.o_proj")
        self._norms = None
        if query_key_norm:
            self._norms = weights.norm("self_attn.q_norm"), weights.norm("self_attn.k_norm")

    def _gated_projection(self, weights: LayerWeights) -> Linear:
        """q, k, v, gate: the file has query and gate of a head beside each other."""

        def ordered(kind: str) -> list[torch.Tensor]:
            query = weights.tensor(f"self_attn.q_proj.{kind}")
            query = query.view(self._heads, 2, self._dim, *query.shape[1:])
            key, value = (weights.tensor(f"self_attn.{name}.{kind}") for name in ("k_proj", "v_proj"))
            return [query[:, 0].flatten(0, 1), key, value, query[:, 1].flatten(0, 1)]

        biased = f"{weights.prefix}.self_attn.q_proj.bias" in weights.tensors
        bias = torch.cat(ordered("bias")) if biased else None
        return weights.kernels.linear.prepare(torch.cat(ordered("weight")), bias)

    def __call__(self, rows: torch.Tensor, step: StepTensors, memory: KvMemory) -> torch.Tensor:
        """See `Mixer`: project, normalise, rotate, write K and V, attend."""
        split = self._project(rows).view(rows.shape[0], -1, self._dim)
        heads, pair, real = self._heads, self._pair, step.real_rows
        end = 2 * pair - heads
        turned = split[:, :pair]
        if self._norms is not None:
            query = self._norm(split[:, :heads], self._norms[0], self._eps)
            turned = torch.cat((query, self._norm(split[:, heads:pair], self._norms[1], self._eps)), 1)
        turned = rotate_first(turned, step.cos, step.sin)
        fresh = torch.stack((turned[:real, heads:].flatten(1), split[:real, pair:end].flatten(1))).flatten(0, 1)
        memory.rows.index_copy_(0, step.write[self._slot], fresh)
        mixed = step.attention(self._slot, turned[:, :heads], self._window).flatten(1)
        if self._gated:
            mixed = mixed * self._sigmoid(split[:, end:].flatten(1))
        return self._output(mixed)


def rotate_first(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of [rows, heads, head_dim], as many as cos and sin [rows, 1, n] have."""
    count = cos.shape[-1]
    if count == heads.shape[-1]:
        return rotate(heads, cos, sin)
    return torch.cat((rotate(heads[..., :count], cos, sin), heads[..., count:]), -1)


def plain_attention(config: ModelConfig, index: int, weights: LayerWeights) -> Mixer:
    """`MixerBuilder` of a layer whose queries and keys are rotated as they are."""
    return SelfAttention(config, weights, slot=index, window=config.windows[index])


def normed_attention(config: ModelConfig, index: int, weights: LayerWeights) -> Mixer:
    """`MixerBuilder` of a layer whose queries and keys are normalised by head before the rotation."""
    return SelfAttention(config, weights, slot=index, window=config.windows[index], query_key_norm=True)
