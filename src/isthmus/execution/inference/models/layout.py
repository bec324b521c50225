"""What a family tells the decoder: which tensors it has, under which names and shapes, and how a layer is built."""

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layers import FeedBuilder, MixerBuilder
from isthmus.execution.inference.models.moe import moe_shapes

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Tensors by name with their shapes. `ignored` may be in the files and is not used.

    `mixer` and `feed` build a layer's parts; `norm_offset` is added to the weights of RMSNorms (1 where a family
    stores weight - 1). Tensors named in `precise` stay float32 in every mode; any whose name begins with
    `ignored_prefix` (where there is one) are ignored too.
    """

    shapes: Mapping[str, tuple[int, ...]]
    ignored: frozenset[str]
    mixer: MixerBuilder
    feed: FeedBuilder
    norm_offset: float = 0.0
    precise: frozenset[str] = frozenset()
    ignored_prefix: str = ""


def decoder_shapes(config: ModelConfig, *, output_bias: bool, query_key_norm: bool) -> Shapes:
    """The tensors of a decoder of the Llama kind, with experts in the layers that have them.

    `output_bias`: the attention's output has a bias where q, k, v have one.
    """
    shapes = outer_shapes(config)
    for layer in range(config.layers):
        parts = attention_shapes(config, output_bias=output_bias, query_key_norm=query_key_norm) | feed_shapes(
            config, layer
        )
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def outer_shapes(config: ModelConfig) -> Shapes:
    """Embedding, final norm and head, and the two norms of every layer."""
    hidden = config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    return shapes


def attention_shapes(config: ModelConfig, *, output_bias: bool, query_key_norm: bool, gated: bool = False) -> Shapes:
    """The tensors of one layer's attention, named from `self_attn.` on. `gated`: q_proj gives a gate beside a query."""
    hidden, dim = config.hidden_size, config.head_dim
    query, pair = config.heads * dim, config.kv_heads * dim
    linears = {"q_proj": (2 * query if gated else query, hidden), "k_proj": (pair, hidden), "v_proj": (pair, hidden)}
    shapes: Shapes = {}
    for name, shape in {**linears, "o_proj": (hidden, query)}.items():
        shapes[f"self_attn.{name}.weight"] = shape
        if config.attention_bias and (name != "o_proj" or output_bias):
            shapes[f"self_attn.{name}.bias"] = shape[:1]
    if query_key_norm:
        shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    return shapes


def feed_shapes(config: ModelConfig, layer: int) -> Shapes:
    """The tensors of one layer's MLP or experts, named from `mlp.` on."""
    hidden, inner = config.hidden_size, config.intermediate_size
    if config.moe is not None and config.moe.sparse[layer]:
        return moe_shapes(config.moe, hidden)
    shapes: Shapes = {}
    for name, shape in {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}.items():
        shapes[f"mlp.{name}.weight"] = shape
        if config.mlp_bias:
            shapes[f"mlp.{name}.bias"] = shape[:1]
    return shapes


def ignored_names(config: ModelConfig) -> frozenset[str]:
    """Tensors that some exporters write although they can be derived."""
    inverse = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.layers)}
    return frozenset(inverse | ({"lm_head.weight"} if config.tied else set()))
