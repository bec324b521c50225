"""The three embedded models by name: their shapes, how they are built, and their published configuration."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from training.embedded.hybrid import Hybrid, HybridConfig
from training.embedded.model import Llama, ModelConfig

Network = Llama | Hybrid
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Kind:
    """One of the embedded models: its shape, the name of its run, and its folder in the package."""

    config: ModelConfig | HybridConfig
    run: str
    recipe: str
    folder: str


KINDS: dict[str, Kind] = {
    "main": Kind(ModelConfig(), "run", "recipe.toml", "embedded"),
    "hybrid": Kind(HybridConfig(), "run-hybrid", "recipe-hybrid.toml", "embedded-hybrid"),
    "draft": Kind(
        ModelConfig(
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=352,
        ),
        "run-draft",
        "recipe-draft.toml",
        "embedded-draft",
    ),
}


def build(config: ModelConfig | HybridConfig) -> Network:
    """A model of this shape; its weights are yet to be set."""
    return Hybrid(config) if isinstance(config, HybridConfig) else Llama(config)


def published(config: ModelConfig | HybridConfig) -> dict[str, Any]:
    """What ``config.json`` says of a shape, without the ids of tokens."""
    shape: dict[str, Any] = asdict(config)
    if isinstance(config, ModelConfig):
        rest = {"rope_scaling": None, "mlp_bias": False}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, **_COMMON, **rest}
    theta, factor = shape.pop("rope_theta"), shape.pop("partial_rotary_factor")
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **shape,
        **_COMMON,
        "layer_types": config.layer_types,
        "mlp_only_layers": list(range(config.num_hidden_layers)),
        "decoder_sparse_step": 1,
        "rope_theta": theta,
        "partial_rotary_factor": factor,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor},
    }


def read_config(folder: Path) -> ModelConfig | HybridConfig:
    """The shape that an exported folder's ``config.json`` tells."""
    found = json.loads((folder / "config.json").read_text())
    kind = HybridConfig if found["model_type"] == "qwen3_next" else ModelConfig
    return kind(**{name: found[name] for name in kind.__dataclass_fields__})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an exported folder, widened to float32."""
    return {name: tensor.float() for name, tensor in load_file(str(folder / "model.safetensors")).items()}


def load_exported(folder: Path) -> Network:
    """An exported model, ready to be asked."""
    model = build(read_config(folder))
    model.load_state_dict(read_weights(folder))
    return model.eval()
