"""A model folder's config.json, checked once: what is built from it needs no further checks.

Accepted: model_type "llama" and "qwen3" in the Hugging Face layout (both the rope_scaling and the transformers-5
rope_parameters spelling). Everything that would change the mathematics and is not implemented here is refused by name
with `ModelInvalid`, never ignored.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.contracts.errors import ModelInvalid
from isthmus.execution.inference.rope import ROPE_TYPES, RopeConfig

MAX_CONFIG_BYTES = 1 << 20
MAX_EOS_IDS = 64
MODEL_TYPES = ("llama", "qwen3")
REFUSED_SETTINGS = ("auto_map", "quantization_config", "compression_config")
DTYPE_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and constants of a decoder. `dtype` is what the folder says its weights are, "f32" when silent.

    `max_positions` is how many tokens the position encoding was made for, scaling included.
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


class _Fields:
    """Typed, bounded reading of one JSON object; every complaint names file and field."""

    def __init__(self, raw: dict[str, Any], file: str) -> None:
        self.raw = raw
        self.file = file

    def refuse(self, text: str) -> ModelInvalid:
        return ModelInvalid(f"{self.file}: {text}")

    def integer(self, name: str, high: int, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if type(value) is not int or not 1 <= value <= high:
            raise self.refuse(f"{name} is {_shown(value)}, accepted: an integer from 1 to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refuse(f"{name} is {_shown(value)}, accepted: a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return None if self.raw.get(name) is None else self.number(name, low, high)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(f"{name} is {_shown(value)}, accepted: true or false")
        return value


def _shown(value: object) -> str:
    """A short form of a config value for a message."""
    return json.dumps(value)[:60] if isinstance(value, str | int | float | bool | None) else type(value).__name__


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises `ModelInvalid` naming the file."""
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise ModelInvalid(f"{path.name}: over {limit} bytes")
        value = json.loads(data)
    except OSError as error:
        raise ModelInvalid(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{path.name}: not valid JSON") from error
    if not isinstance(value, dict):
        raise ModelInvalid(f"{path.name}: not a JSON object")
    return value


def load_config(folder: Path) -> ModelConfig:
    """Read and check config.json and generation_config.json of `folder`. Raises `ModelInvalid`."""
    if not folder.is_dir():
        raise ModelInvalid(f"{folder.name}: no such folder")
    fields = _Fields(read_json(folder / "config.json", MAX_CONFIG_BYTES), "config.json")
    _refuse_unsupported(fields)
    model_type = fields.raw["model_type"]
    hidden = fields.integer("hidden_size", 1 << 16)
    heads = fields.integer("num_attention_heads", 1024)
    kv_heads = fields.integer("num_key_value_heads", 1024, default=heads)
    if heads % kv_heads:
        raise fields.refuse(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    default_dim = 128 if model_type == "qwen3" else hidden // heads
    head_dim = fields.integer("head_dim", 1024, default=default_dim)
    if head_dim % 2 or head_dim < 4:
        raise fields.refuse(f"head_dim is {head_dim}, accepted: even, from 4")
    vocab = fields.integer("vocab_size", 1 << 22)
    positions = fields.integer("max_position_embeddings", 1 << 24, default=32768 if model_type == "qwen3" else 2048)
    rope = _rope(fields, positions)
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1 << 20),
        layers=fields.integer("num_hidden_layers", 1024),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        max_positions=rope.reach(positions),
        rope=rope,
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        tied=fields.flag("tie_word_embeddings", False),
        dtype=_dtype(fields),
        eos_token_ids=_eos(folder, fields, vocab),
    )


def _refuse_unsupported(fields: _Fields) -> None:
    """Everything that is well formed but would be computed wrongly."""
    raw = fields.raw
    if raw.get("model_type") not in MODEL_TYPES:
        shown = _shown(raw.get("model_type"))
        raise fields.refuse(f"model_type {shown} is not served; accepted: {', '.join(MODEL_TYPES)}")
    for name in REFUSED_SETTINGS:
        if raw.get(name) is not None:
            raise fields.refuse(f"{name} is not served; the folder must do without it")
    if raw.get("hidden_act", "silu") != "silu":
        raise fields.refuse(f"hidden_act {_shown(raw['hidden_act'])} is not served; accepted: silu")
    if fields.flag("use_sliding_window", False):
        raise fields.refuse("use_sliding_window true is not served: every layer has full attention")
    if raw.get("sliding_window") is not None and "use_sliding_window" not in raw:
        raise fields.refuse("sliding_window is not served: every layer has full attention")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.refuse("layer_types is not served with anything but full_attention")
    if fields.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        raise fields.refuse("partial_rotary_factor is not served with anything but 1")
    if raw.get("pretraining_tp") not in (None, 1):
        raise fields.refuse("pretraining_tp is not served with anything but 1")


def _rope(fields: _Fields, positions: int) -> RopeConfig:
    """The position encoding, from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    raw = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.refuse("rope_scaling is not an object")
    part = _Fields(raw, f"{fields.file}: rope_parameters")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise part.refuse(f"rope_type {_shown(kind)} is not served; accepted: {', '.join(ROPE_TYPES)}")
    if part.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        raise part.refuse("partial_rotary_factor is not served with anything but 1")
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
    return config


def _dtype(fields: _Fields) -> str:
    name = fields.raw.get("dtype", fields.raw.get("torch_dtype"))
    if name is None:
        return "f32"
    if name not in DTYPE_NAMES:
        raise fields.refuse(f"torch_dtype {_shown(name)} is not served; accepted: {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def _eos(folder: Path, fields: _Fields, vocab: int) -> tuple[int, ...]:
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
