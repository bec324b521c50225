"""The Qwen2 family (Yang et al. 2024): Llama with biases of q, k and v, and sliding windows in the upper layers."""

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout, decoder_shapes, ignored_names
from isthmus.execution.inference.models.mlp import dense_mlp
from isthmus.execution.inference.models.self_attention import plain_attention


def qwen2_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of a dense Qwen2 or Qwen2.5 model."""
    shapes = decoder_shapes(config, output_bias=False, query_key_norm=False)
    return TensorLayout(shapes, ignored_names(config), plain_attention, dense_mlp)
