"""A model folder's config.json, checked once: what is built from it needs no further checks.

Accepted: the model types of config_families.py in the Hugging Face layout (both the rope_scaling and the transformers-5
rope_parameters spelling). Everything that would change the mathematics and is not implemented here is refused by name
with `ModelInvalid`, never ignored.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from isthmus.contracts.errors import ModelInvalid
from isthmus.execution.inference.config_families import (
    FAMILIES,
    MAX_LAYERS,
    Family,
    MoeConfig,
    attention_bias,
    experts,
    mlp_bias,
    windows,
)
from isthmus.execution.inference.config_fields import Fields, read_json, shown
from isthmus.execution.inference.config_hybrid import DeltaConfig, delta_net
from isthmus.execution.inference.rope import ROPE_TYPES, RopeConfig

MAX_CONFIG_BYTES = 1 << 20
MAX_EOS_IDS = 64
MODEL_TYPES = tuple(FAMILIES)
REFUSED_SETTINGS = ("auto_map", "quantization_config", "compression_config", "dual_chunk_attention_config")
DTYPE_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and constants of a decoder. `dtype` is what the folder says its weights are, "f32" when silent.

    `max_positions` is how many tokens the position encoding was made for, scaling included; it turns the first
    `rotary_dim` dimensions of a head. `windows[layer]` is a layer's sliding window, 0 where a query sees every key.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    windows: tuple[int, ...]
    rotary_dim: int
    moe: MoeConfig | None
    delta: DeltaConfig | None

    @property
    def kv_layers(self) -> int:
        """How many layers keep keys and values."""
        return self.layers - (sum(self.delta.recurrent) if self.delta else 0)


def load_config(folder: Path) -> ModelConfig:
    """Read and check config.json and generation_config.json of `folder`. Raises `ModelInvalid`."""
    if not folder.is_dir():
        raise ModelInvalid(f"{folder.name}: no such folder")
    fields = Fields(read_json(folder / "config.json", MAX_CONFIG_BYTES), "config.json")
    _refuse_unsupported(fields)
    model_type = fields.raw["model_type"]
    family = FAMILIES[model_type]
    heads, kv_heads, head_dim = _heads(fields, family)
    layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    vocab = fields.integer("vocab_size", 1 << 22)
    positions = fields.integer("max_position_embeddings", 1 << 24, default=family.positions)
    rope, rotary_dim = _rope(fields, positions, head_dim, family)
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=fields.integer("hidden_size", 1 << 16),
        intermediate_size=fields.integer("intermediate_size", 1 << 20),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        max_positions=rope.reach(positions),
        rope=rope,
        attention_bias=attention_bias(fields, family),
        mlp_bias=mlp_bias(fields, family),
        tied=fields.flag("tie_word_embeddings", False),
        dtype=_dtype(fields),
        eos_token_ids=_eos(folder, fields, vocab),
        windows=(0,) * layers if family.recurrent else windows(fields, family, layers, rope.reach(positions)),
        rotary_dim=rotary_dim,
        moe=experts(fields, family, layers),
        delta=delta_net(fields, layers) if family.recurrent else None,
    )


def _heads(fields: Fields, family: Family) -> tuple[int, int, int]:
    """Heads of queries, heads of keys and values, and the size of a head."""
    hidden = fields.integer("hidden_size", 1 << 16)
    heads = fields.integer("num_attention_heads", 1024)
    default = heads if "num_key_value_heads" in fields.raw else family.kv_heads or heads
    kv_heads = fields.integer("num_key_value_heads", 1024, default=default)
    if heads % kv_heads:
        raise fields.refuse(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = fields.integer("head_dim", 1024, default=family.head_dim or hidden // heads)
    if head_dim % 2 or head_dim < 4:
        raise fields.refuse(f"head_dim is {head_dim}, accepted: even, from 4")
    return heads, kv_heads, head_dim


def _refuse_unsupported(fields: Fields) -> None:
    """Everything that is well formed but would be computed wrongly."""
    raw = fields.raw
    if raw.get("model_type") not in MODEL_TYPES:
        given = shown(raw.get("model_type"))
        raise fields.refuse(f"model_type {given} is not served; accepted: {', '.join(MODEL_TYPES)}")
    for name in REFUSED_SETTINGS:
        if raw.get(name) is not None:
            raise fields.refuse(f"{name} is not served; the folder must do without it")
    if raw.get("hidden_act", "silu") != "silu":
        raise fields.refuse(f"hidden_act {shown(raw['hidden_act'])} is not served; accepted: silu")
    if raw.get("pretraining_tp") not in (None, 1):
        raise fields.refuse("pretraining_tp is not served with anything but 1")


def _rope(fields: Fields, positions: int, head_dim: int, family: Family) -> tuple[RopeConfig, int]:
    """The position encoding, from rope_parameters (transformers 5) or rope_theta and rope_scaling, and how many
    dimensions of a head it turns.
    """
    raw = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.refuse("rope_scaling is not an object")
    part = Fields(raw, f"{fields.file}: rope_parameters")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise part.refuse(f"rope_type {shown(kind)} is not served; accepted: {', '.join(ROPE_TYPES)}")
    outer = fields.number("partial_rotary_factor", 0.0, 1.0, default=family.rotary or 1.0)
    share = part.number("partial_rotary_factor", 0.0, 1.0, default=outer)
    rotary_dim = int(head_dim * share)
    if family.rotary is None and (share != 1.0 or outer != 1.0):
        raise part.refuse("partial_rotary_factor is not served with anything but 1")
    if rotary_dim % 2 or rotary_dim < 4:
        raise part.refuse(f"partial_rotary_factor turns {rotary_dim} dimensions, accepted: even, from 4")
    theta = fields.number("rope_theta", 1.0001, 1e12, default=10_000.0)
    original = part.integer("original_max_position_embeddings", 1 << 24, default=positions)
    config = RopeConfig(
        kind=kind,
        theta=part.number("rope_theta", 1.0001, 1e12, default=theta),
        factor=1.0 if kind == "default" else part.number("factor", 1.0, 65_536.0),
        original_positions=positions if kind == "dynamic" else original,
        low_freq_factor=part.number("low_freq_factor", 1e-3, 1e6, default=1.0),
        high_freq_factor=part.number("high_freq_factor", 1e-3, 1e6, default=4.0),
        beta_fast=part.number("beta_fast", 1e-3, 1e6, default=32.0) or 32.0,
        beta_slow=part.number("beta_slow", 1e-3, 1e6, default=1.0) or 1.0,
        attention_factor=part.optional_number("attention_factor", 0.0, 1e3),
        mscale=part.optional_number("mscale", 0.0, 1e3),
        mscale_all_dim=part.optional_number("mscale_all_dim", 0.0, 1e3),
        truncate=part.flag("truncate", True),
    )
    if kind == "llama3" and not config.low_freq_factor < config.high_freq_factor:
        raise part.refuse("low_freq_factor is not under high_freq_factor")
    if not math.isfinite(config.theta * config.factor):
        raise part.refuse("rope_theta and factor are too large together")
    return config, rotary_dim


def _dtype(fields: Fields) -> str:
    name = fields.raw.get("dtype", fields.raw.get("torch_dtype"))
    if name is None:
        return "f32"
    if name not in DTYPE_NAMES:
        raise fields.refuse(f"torch_dtype {shown(name)} is not served; accepted: {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def _eos(folder: Path, fields: Fields, vocab: int) -> tuple[int, ...]:
    """End tokens of generation_config.json, else of config.json."""
    path = folder / "generation_config.json"
    value, file = fields.raw.get("eos_token_id"), fields.file
    if path.exists():
        generation = read_json(path, MAX_CONFIG_BYTES).get("eos_token_id")
        if generation is not None:
            value, file = generation, path.name
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS_IDS or any(type(token) is not int or not 0 <= token < vocab for token in ids):
        raise ModelInvalid(f"{file}: eos_token_id is not a token id under {vocab}, nor a list of {MAX_EOS_IDS} of them")
    return tuple(dict.fromkeys(ids))
