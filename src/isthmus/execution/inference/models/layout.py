"""What a family tells the decoder: which tensors it has, under which names and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.execution.inference.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Tensors by name with their shapes. `ignored` may be in the files and is not used.

    `query_key_norm`: queries and keys are normalised by head before the rotation.
    """

    shapes: Mapping[str, tuple[int, ...]]
    ignored: frozenset[str]
    query_key_norm: bool


def decoder_shapes(config: ModelConfig, *, output_bias: bool, query_key_norm: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder of the Llama kind. `output_bias`: the attention's output has a bias where q, k, v do."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, pair = config.heads * dim, config.kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        linears = {"q_proj": (query, hidden), "k_proj": (pair, hidden), "v_proj": (pair, hidden)}
        for name, shape in {**linears, "o_proj": (hidden, query)}.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = shape
            if config.attention_bias and (name != "o_proj" or output_bias):
                shapes[f"{prefix}.self_attn.{name}.bias"] = shape[:1]
        for name, shape in {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }.items():
            shapes[f"{prefix}.mlp.{name}.weight"] = shape
            if config.mlp_bias:
                shapes[f"{prefix}.mlp.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (hidden,)
        if query_key_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (dim,)
    return shapes


def ignored_names(config: ModelConfig) -> frozenset[str]:
    """Tensors that some exporters write although they can be derived."""
    inverse = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.layers)}
    return frozenset(inverse | ({"lm_head.weight"} if config.tied else set()))
