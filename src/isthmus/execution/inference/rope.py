"""Rotary position encoding (Su et al. 2021, RoFormer) and its scalings, as tables over positions.

Promise: the angle of a position is a function of the position alone, never of the batch, the chunk or the length of
the sequence, so stored keys can be used again. For linear (kaiokendev), llama3 (Meta), yarn (Peng et al. 2023) and the
default this is what transformers computes. Dynamic NTK is not a function of the position in transformers: it derives
frequencies from the length seen so far. Here position p has the frequencies of length max(p + 1, original): the same
as transformers for every sequence within the original length, and for positions decoded token by token beyond it; a
prompt longer than the original length differs from transformers' one-pass prefill.
"""

import math
from dataclasses import dataclass

import torch

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters by their Hugging Face names. `original_positions` is the length of pretraining."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_positions: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def reach(self, max_positions: int) -> int:
        """How many positions the encoding covers when config.json says `max_positions`."""
        match self.kind:
            case "linear" | "dynamic":
                return int(max_positions * self.factor)
            case "yarn":
                return max(max_positions, int(self.original_positions * self.factor))
        return max_positions


def rope_tables(config: RopeConfig, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine and signed sine tables, each [positions, head_dim] float32, for `rotate`.

    With x = (x1, x2) halves of a head, the rotation is x * cos + (x2, x1) * sin where sin is (-s, s).
    """
    index = torch.arange(positions, dtype=torch.float32)
    if config.kind == "dynamic":
        frequencies, scale = _dynamic_ntk(config, head_dim, positions), 1.0
        angles = index[:, None] * frequencies
    else:
        row, scale = _frequencies(config, head_dim)
        angles = index[:, None] * row[None, :]
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [rows, heads, head_dim] by each row's angles: cos and signed sin [rows, 1, head_dim]."""
    first, second = heads.chunk(2, -1)
    return (heads * cos).add_(torch.cat((second, first), -1).mul_(sin))


def _base_frequencies(theta: float, head_dim: int) -> torch.Tensor:
    """theta^(-2i/d), [head_dim / 2], float32."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def _frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies [head_dim / 2] and the factor on cos and sin."""
    match config.kind:
        case "linear":
            return _base_frequencies(config.theta, head_dim) / config.factor, 1.0
        case "llama3":
            return _llama3(config, _base_frequencies(config.theta, head_dim)), 1.0
        case "yarn":
            return _yarn(config, head_dim), _yarn_attention_factor(config)
    return _base_frequencies(config.theta, head_dim), 1.0


def _dynamic_ntk(config: RopeConfig, head_dim: int, positions: int) -> torch.Tensor:
    """Frequencies by position, [positions, head_dim / 2] (see the module)."""
    original = config.original_positions
    rows = _base_frequencies(config.theta, head_dim).expand(positions, -1).clone()
    for position in range(original, positions):
        stretch = config.factor * (position + 1) / original - (config.factor - 1)
        rows[position] = _base_frequencies(config.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)
    return rows


def _llama3(config: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Long waves are divided by the factor, short ones kept, those between interpolated."""
    original, low, high = config.original_positions, config.low_freq_factor, config.high_freq_factor
    wave = 2 * math.pi / base
    scaled = torch.where(wave > original / low, base / config.factor, base)
    smooth = (original / wave - low) / (high - low)
    between = (1 - smooth) * scaled / config.factor + smooth * scaled
    return torch.where((wave >= original / high) & (wave <= original / low), between, scaled)


def _yarn(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """A ramp over dimensions between extrapolation (fast waves) and interpolation (slow waves)."""

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original length."""
        length = config.original_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    waves = config.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    keep = 1 - ramp
    return (1.0 / (config.factor * waves)) * (1 - keep) + (1.0 / waves) * keep


def _yarn_attention_factor(config: RopeConfig) -> float:
    """The factor on cos and sin (Peng et al. 2023, equation 22; DeepSeek's mscale where given)."""

    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)
