"""The Llama family (Touvron et al. 2023): grouped-query attention, SwiGLU, RMSNorm, rotary positions."""

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout, decoder_shapes, ignored_names


def llama_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of a Llama model."""
    shapes = decoder_shapes(config, output_bias=True, query_key_norm=False)
    return TensorLayout(shapes, ignored_names(config), query_key_norm=False)
