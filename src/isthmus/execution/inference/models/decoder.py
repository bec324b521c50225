"""A pre-norm decoder of the Llama kind over packed rows.

One step is one flat [rows, hidden] tensor, whatever requests the rows belong to; only attention knows spans. Weights
of q, k, v and of gate, up are fused at load. How linears, attention and the pointwise parts are computed comes from
`Kernels`, so the default and the exact mode are the same model code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from isthmus.execution.inference.attention.base import AttentionBackend, StepAttention
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.linear.base import Linear, LinearBackend
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout
from isthmus.execution.inference.rope import rope_tables, rotate


@dataclass(frozen=True, slots=True)
class Kernels:
    """How the parts are computed. Rows of a step are padded to a multiple of `row_tile`."""

    linear: LinearBackend
    attention: AttentionBackend
    norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    row_tile: int


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension (Zhang & Sennrich 2019), in float32 inside."""
    return functional.rms_norm(rows, weight.shape, weight, eps)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return functional.silu(gate).mul_(up)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights, ready to be used."""

    input_norm: torch.Tensor
    query_key_value: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step gives every layer: token ids, angles, where K and V go, attention."""

    tokens: torch.Tensor  # [rows] int64
    cos: torch.Tensor  # [rows, 1, head_dim]
    sin: torch.Tensor
    write: torch.Tensor  # [2, real rows] rows of K and V in layer 0 of the memory
    real_rows: int
    attention: StepAttention


class Decoder:
    """The model. Rows in, hidden states out; logits on demand for chosen rows."""

    def __init__(
        self,
        config: ModelConfig,
        layout: TensorLayout,
        weights: Mapping[str, torch.Tensor],
        kernels: Kernels,
        *,
        positions: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.kernels = kernels
        placed = {name: tensor.to(device) for name, tensor in weights.items()}
        self._embedding = placed["model.embed_tokens.weight"]
        self._final_norm = placed["model.norm.weight"]
        head = self._embedding if config.tied else placed["lm_head.weight"]
        self.head = kernels.linear.prepare(head, None)
        self._layers = [self._layer(index, layout, placed) for index in range(config.layers)]
        cos, sin = rope_tables(config.rope, config.head_dim, positions)
        self.cos = cos.to(device, self._embedding.dtype)[:, None]
        self.sin = sin.to(device, self._embedding.dtype)[:, None]

    def _layer(self, index: int, layout: TensorLayout, weights: Mapping[str, torch.Tensor]) -> Layer:
        prefix = f"model.layers.{index}"

        def linear(*names: str) -> Linear:
            """One linear of the fused weights."""
            weight = torch.cat([weights[f"{prefix}.{name}.weight"] for name in names])
            biases = [weights[f"{prefix}.{name}.bias"] for name in names if f"{prefix}.{name}.bias" in weights]
            return self.kernels.linear.prepare(weight, torch.cat(biases) if biases else None)

        normed = layout.query_key_norm
        return Layer(
            input_norm=weights[f"{prefix}.input_layernorm.weight"],
            query_key_value=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            query_norm=weights[f"{prefix}.self_attn.q_norm.weight"] if normed else None,
            key_norm=weights[f"{prefix}.self_attn.k_norm.weight"] if normed else None,
            output=linear("self_attn.o_proj"),
            mlp_norm=weights[f"{prefix}.post_attention_layernorm.weight"],
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
        )

    def forward(self, step: StepTensors, memory: KvMemory) -> torch.Tensor:
        """Hidden states [rows, hidden] before the final norm; K and V of the real rows are in the memory after it."""
        eps, norm = self.config.norm_eps, self.kernels.norm
        hidden = functional.embedding(step.tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            mixed = self._attend(index, layer, norm(hidden, layer.input_norm, eps), step, memory)
            hidden += layer.output(mixed)
            gate, up = layer.gate_up(norm(hidden, layer.mlp_norm, eps)).chunk(2, -1)
            hidden += layer.down(self.kernels.gate(gate, up))
        return hidden

    def _attend(
        self, index: int, layer: Layer, rows: torch.Tensor, step: StepTensors, memory: KvMemory
    ) -> torch.Tensor:
        """Project, normalise, rotate, write K and V, attend. [rows, heads * head_dim]."""
        config, eps = self.config, self.config.norm_eps
        split = layer.query_key_value(rows).view(rows.shape[0], -1, config.head_dim)
        pair = config.heads + config.kv_heads
        turned = split[:, :pair]
        if layer.query_norm is not None and layer.key_norm is not None:
            norm = self.kernels.norm
            query = norm(split[:, : config.heads], layer.query_norm, eps)
            turned = torch.cat((query, norm(split[:, config.heads : pair], layer.key_norm, eps)), 1)
        turned = rotate(turned, step.cos, step.sin)
        real = step.real_rows
        fresh = torch.stack((turned[:real, config.heads :].flatten(1), split[:real, pair:].flatten(1))).flatten(0, 1)
        memory.rows.index_copy_(0, (step.write + memory.layer_offset(index)).view(-1), fresh)
        return step.attention(index, turned[:, : config.heads]).flatten(1)

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm of chosen rows."""
        return self.kernels.norm(hidden, self._final_norm, self.config.norm_eps)
