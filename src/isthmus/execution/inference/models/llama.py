"""The Llama family (Touvron et al. 2023): grouped-query attention, SwiGLU, RMSNorm, rotary positions."""

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout, decoder_shapes, ignored_names
from isthmus.execution.inference.models.mlp import dense_mlp
from isthmus.execution.inference.models.self_attention import plain_attention


def llama_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of a Llama model."""
    shapes = decoder_shapes(config, output_bias=True, query_key_norm=False)
    return TensorLayout(shapes, ignored_names(config), plain_attention, dense_mlp)
