"""The Qwen3-Next family (Qwen Team 2025): gated delta nets, every few layers gated attention, experts or dense MLPs.

A layer of either kind is norm, mixer, norm, feed, as everywhere; all RMSNorms but that of the delta net store their
weight less one. Tensors of the multi-token prediction head (`mtp.`) are ignored.
"""

import torch

from isthmus.contracts.errors import EngineFailed, ModelInvalid
from isthmus.execution.inference.config_hybrid import DeltaConfig
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.gated_delta import DeltaInputs, convolve, scan
from isthmus.execution.inference.models.layers import LayerWeights, Mixer
from isthmus.execution.inference.models.layout import (
    Shapes,
    TensorLayout,
    attention_shapes,
    feed_shapes,
    ignored_names,
    outer_shapes,
)
from isthmus.execution.inference.models.moe import sparse_moe
from isthmus.execution.inference.models.self_attention import SelfAttention
from isthmus.execution.inference.models.step import StepTensors

# Small tensors whose rounding would be felt at every position: kept in float32 in every mode.
PRECISE = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.conv1d.weight", "linear_attn.norm.weight")


def qwen3_next_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of a Qwen3-Next model."""
    delta = _delta(config)
    shapes = outer_shapes(config)
    for layer in range(config.layers):
        mixer = delta_shapes(delta, config.hidden_size)
        if not delta.recurrent[layer]:
            mixer = attention_shapes(config, output_bias=True, query_key_norm=True, gated=True)
        parts = mixer | feed_shapes(config, layer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    precise = frozenset(name for name in shapes if name.endswith(PRECISE) or name.endswith("norm.weight"))
    return TensorLayout(
        shapes, ignored_names(config), _mixer, sparse_moe, norm_offset=1.0, precise=precise, ignored_prefix="mtp."
    )


def delta_shapes(delta: DeltaConfig, hidden: int) -> Shapes:
    """The tensors of one layer's gated delta net, named from `linear_attn.` on."""
    keys, values = delta.key_heads * delta.key_dim, delta.heads * delta.value_dim
    return {
        "linear_attn.in_proj_qkvz.weight": (2 * keys + 2 * values, hidden),
        "linear_attn.in_proj_ba.weight": (2 * delta.heads, hidden),
        "linear_attn.conv1d.weight": (delta.channels, 1, delta.history + 1),
        "linear_attn.A_log": (delta.heads,),
        "linear_attn.dt_bias": (delta.heads,),
        "linear_attn.norm.weight": (delta.value_dim,),
        "linear_attn.out_proj.weight": (hidden, values),
    }


class GatedDeltaNet:
    """`Mixer` of a recurrent layer. `slot` is the layer's place in the state memory."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, slot: int) -> None:
        self._delta, self._kernels, self._slot = _delta(config), weights.kernels, slot
        self._project = weights.kernels.linear.prepare(self._ordered(weights), None)
        self._output = weights.linear("linear_attn.out_proj")
        self._taps = weights.tensor("linear_attn.conv1d.weight")[:, 0].float().T.contiguous()
        self._speed = -weights.tensor("linear_attn.A_log").float().exp()
        self._bias = weights.tensor("linear_attn.dt_bias").float()
        self._norm, self._eps = weights.tensor("linear_attn.norm.weight").float(), config.norm_eps

    def _ordered(self, weights: LayerWeights) -> torch.Tensor:
        """One projection to queries, keys, values, gates, rates and steps: the files have them by key head."""
        delta, shared = self._delta, self._delta.heads // self._delta.key_heads

        def grouped(name: str, sizes: list[int]) -> list[torch.Tensor]:
            tensor = weights.tensor(f"linear_attn.{name}.weight")
            by_head = tensor.view(delta.key_heads, -1, tensor.shape[1])
            return [part.flatten(0, 1) for part in torch.split(by_head, sizes, 1)]

        wide = shared * delta.value_dim
        return torch.cat(
            grouped("in_proj_qkvz", [delta.key_dim, delta.key_dim, wide, wide])
            + grouped("in_proj_ba", [shared, shared])
        )

    def __call__(self, rows: torch.Tensor, step: StepTensors, memory: KvMemory) -> torch.Tensor:
        """See `Mixer`. Keeps the states that the step wants kept; padded rows are computed from nothing."""
        del memory
        if step.states is None:
            raise EngineFailed("a hybrid model's step has no recurrent state")
        delta, kernels, real = self._delta, self._kernels.delta, step.real_rows
        keys, values = delta.key_heads * delta.key_dim, delta.heads * delta.value_dim
        sizes = [delta.channels, values, delta.heads, delta.heads]
        mixed, gate, rate, pace = torch.split(self._project(rows), sizes, -1)
        mixed = convolve(mixed[:real].float(), self._taps, step.states.plan, step.states.memory, self._slot)
        mixed = kernels.pointwise(torch.nn.functional.silu, mixed)
        query, key, value = torch.split(mixed, [keys, keys, values], -1)
        inputs = DeltaInputs(
            query=kernels.unit(query.view(real, delta.key_heads, -1)) * delta.key_dim**-0.5,
            key=kernels.unit(key.view(real, delta.key_heads, -1)),
            value=value.view(real, delta.heads, -1),
            decay=kernels.pointwise(torch.nn.functional.softplus, pace[:real].float() + self._bias) * self._speed,
            rate=kernels.pointwise(torch.sigmoid, rate[:real].float()),
        )
        read = scan(inputs, kernels, step.states.plan, step.states.memory, self._slot)
        if rows.shape[0] > real:
            read = torch.cat((read, read.new_zeros(rows.shape[0] - real, *read.shape[1:])))
        normed = self._kernels.norm(read, self._norm, self._eps).flatten(1)
        return self._output(self._kernels.gate(gate.float(), normed).to(rows.dtype))


def _mixer(config: ModelConfig, index: int, weights: LayerWeights) -> Mixer:
    """`MixerBuilder` of the family: slots count the layers of one kind before this one."""
    recurrent = _delta(config).recurrent
    slot = sum(kind == recurrent[index] for kind in recurrent[:index])
    if recurrent[index]:
        return GatedDeltaNet(config, weights, slot)
    return SelfAttention(config, weights, slot=slot, query_key_norm=True, gated=True)


def _delta(config: ModelConfig) -> DeltaConfig:
    if config.delta is None:
        raise ModelInvalid(f"{config.model_type}: config.json describes no linear attention")
    return config.delta
