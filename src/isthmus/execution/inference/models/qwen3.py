"""The Qwen3 family (Qwen Team 2025): Llama with an explicit head_dim and RMSNorm of queries and keys by head."""

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout, decoder_shapes, ignored_names
from isthmus.execution.inference.models.mlp import dense_mlp
from isthmus.execution.inference.models.self_attention import normed_attention


def qwen3_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of a dense Qwen3 model."""
    shapes = decoder_shapes(config, output_bias=True, query_key_norm=True)
    return TensorLayout(shapes, ignored_names(config), normed_attention, dense_mlp)
