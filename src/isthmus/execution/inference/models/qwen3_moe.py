"""The Qwen3-MoE family (Qwen Team 2025): Qwen3 with sparse experts in place of the MLP of some or all layers."""

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout, decoder_shapes, ignored_names
from isthmus.execution.inference.models.moe import sparse_moe
from isthmus.execution.inference.models.self_attention import normed_attention


def qwen3_moe_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of a Qwen3-MoE model."""
    shapes = decoder_shapes(config, output_bias=True, query_key_norm=True)
    return TensorLayout(shapes, ignored_names(config), normed_attention, sparse_moe)
