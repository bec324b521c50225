"""The hybrid twin: gated delta nets and one layer of full attention, in the Qwen3-Next layout.

Parameter names, shapes and arithmetic are those that transformers publishes as
``qwen3_next`` with dense feed-forward layers only; ``tests/unit/training`` compares both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from training.embedded.delta import gated_delta_rule, unit
from training.embedded.model import MLP, rope_tables, rotate

FULL, LINEAR = "full_attention", "linear_attention"


@dataclass(frozen=True)
class HybridConfig:
    """The shape of the hybrid; the defaults are those of the embedded hybrid."""

    vocab_size: int = 8192
    hidden_size: int = 320
    num_hidden_layers: int = 4
    num_attention_heads: int = 5
    num_key_value_heads: int = 5
    head_dim: int = 64
    intermediate_size: int = 896
    linear_num_key_heads: int = 5
    linear_num_value_heads: int = 5
    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    full_attention_interval: int = 4
    partial_rotary_factor: float = 0.25
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    @property
    def layer_types(self) -> list[str]:
        """What mixes positions in each layer: every so many layers full attention, else the delta net."""
        every = self.full_attention_interval
        return [LINEAR if (at + 1) % every else FULL for at in range(self.num_hidden_layers)]


class CentredNorm(nn.Module):
    """Root-mean-square normalisation in float32 with a scale of one plus the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The vectors of ``x``, scaled."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight)).to(x.dtype)


class GatedNorm(nn.Module):
    """Root-mean-square normalisation in float32, then a gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """The vectors of ``x``, scaled and gated by the SiLU of ``gate``."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide * self.weight * functional.silu(gate.float())


class GatedDeltaNet(nn.Module):
    """A linear-attention layer whose state is changed by the gated delta rule."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.groups, self.heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.keys, self.values = config.linear_key_head_dim, config.linear_value_head_dim
        self.share = self.heads // self.groups
        wide, tall = self.groups * self.keys, self.heads * self.values
        self.in_proj_qkvz = nn.Linear(config.hidden_size, 2 * wide + 2 * tall, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * self.heads, bias=False)
        channels = 2 * wide + tall
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.norm = GatedNorm(self.values, config.rms_norm_eps)
        self.out_proj = nn.Linear(tall, config.hidden_size, bias=False)

    def _convolve(self, x: Tensor, first: int) -> Tensor:
        """Each channel of ``x`` over the last few positions; ``first`` is its place among the channels."""
        count, length = x.shape[2] * x.shape[3], x.shape[1]
        taps = self.conv1d.weight[first : first + count, 0].float().reshape(*x.shape[2:], -1)
        reach = taps.shape[-1]
        padded = functional.pad(x.float(), (0, 0, 0, 0, reach - 1, 0))
        parts = [padded[:, at : at + length] * taps[..., at] for at in range(reach)]
        return functional.silu(torch.stack(parts).sum(0) if reach != 4 else parts[0] + parts[1] + parts[2] + parts[3])

    def forward(self, x: Tensor) -> Tensor:
        """What each position reads from the state."""
        batch, length, _ = x.shape
        mixed = self.in_proj_qkvz(x).view(batch, length, self.groups, -1)
        size = self.share * self.values
        q, k, v, z = mixed.split((self.keys, self.keys, size, size), -1)
        b, a = self.in_proj_ba(x).view(batch, length, self.groups, -1).chunk(2, -1)
        b, a = b.reshape(batch, length, self.heads), a.reshape(batch, length, self.heads)
        with torch.autocast(x.device.type, enabled=False):
            wide = self.groups * self.keys
            q, k = unit(self._convolve(q, 0)), unit(self._convolve(k, wide))
            v = self._convolve(v.reshape(batch, length, self.heads, self.values), 2 * wide)
            if self.share > 1:
                q, k = q.repeat_interleave(self.share, 2), k.repeat_interleave(self.share, 2)
            g = -self.A_log.exp() * functional.softplus(a.float() + self.dt_bias)
            y = gated_delta_rule(q, k, v, g, b.float().sigmoid())
            y = self.norm(y, z.reshape(batch, length, self.heads, self.values)).to(x.dtype)
        out: Tensor = self.out_proj(y.reshape(batch, length, -1))
        return out


class GatedAttention(nn.Module):
    """Causal attention with grouped keys and values, normalised heads, partly rotated, and a gate."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim * 2, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)
        self.q_norm = CentredNorm(self.dim, config.rms_norm_eps)
        self.k_norm = CentredNorm(self.dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What each position reads from those before it."""
        batch, length, _ = x.shape
        q, gate = self.q_proj(x).view(batch, length, self.heads, 2 * self.dim).chunk(2, -1)
        k = self.k_norm(self.k_proj(x).view(batch, length, self.groups, self.dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.groups, self.dim).transpose(1, 2)
        q = self.q_norm(q).transpose(1, 2)
        turned = cos.shape[-1]
        q = torch.cat((rotate(q[..., :turned], cos, sin), q[..., turned:]), -1)
        k = torch.cat((rotate(k[..., :turned], cos, sin), k[..., turned:]), -1)
        share = self.heads // self.groups
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, -1) * gate.reshape(batch, length, -1).sigmoid()
        out: Tensor = self.o_proj(y)
        return out


class HybridLayer(nn.Module):
    """One layer: a delta net or full attention, then the feed-forward part."""

    def __init__(self, config: HybridConfig, kind: str) -> None:
        super().__init__()
        self.input_layernorm = CentredNorm(config.hidden_size, config.rms_norm_eps)
        self.linear_attn = GatedDeltaNet(config) if kind == LINEAR else None
        self.self_attn = GatedAttention(config) if kind == FULL else None
        self.post_attention_layernorm = CentredNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The residual stream after this layer."""
        y = self.input_layernorm(x)
        if self.linear_attn is not None:
            x = x + self.linear_attn(y)
        if self.self_attn is not None:
            x = x + self.self_attn(y, cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class HybridBackbone(nn.Module):
    """Embedding, layers and the last norm: what the layout calls ``model``."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HybridLayer(config, kind) for kind in config.layer_types)
        self.norm = CentredNorm(config.hidden_size, config.rms_norm_eps)


class Hybrid(nn.Module):
    """The whole model; the embedding is also the output layer."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.model = HybridBackbone(config)
        turned = int(config.head_dim * config.partial_rotary_factor)
        cos, sin = rope_tables(turned, config.rope_theta, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fresh weights: normal, nought where a layer writes to the residual stream, and decays of 10 to 1,000."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                weight.zero_()
            elif name.endswith("conv1d.weight"):
                weight.normal_(std=0.1, generator=generator)
                weight[:, 0, -1] += 1.0
            elif name.endswith("dt_bias"):
                step = torch.logspace(-3, -1, weight.numel())
                weight.copy_(step.expm1().log())  # what softplus maps to the step
            elif weight.ndim == 2:
                deviation = 0.02 if "embed" in name else self.config.hidden_size**-0.5
                weight.normal_(std=deviation, generator=generator)

    def hidden(self, tokens: Tensor, layers: Sequence[nn.Module] = ()) -> Tensor:
        """The normalised last states of a batch of sequences; ``layers`` may be compiled stand-ins for the own ones."""
        cos, sin = self.get_buffer("cos")[: tokens.shape[1]], self.get_buffer("sin")[: tokens.shape[1]]
        x = self.model.embed_tokens(tokens)
        for layer in layers or self.model.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.model.norm(x)
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits after every position."""
        return functional.linear(self.hidden(tokens), self.model.embed_tokens.weight)
