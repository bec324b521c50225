"""The Mistral family (Jiang et al. 2023): Llama with a sliding window in every layer, or in none."""

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout, decoder_shapes, ignored_names
from isthmus.execution.inference.models.mlp import dense_mlp
from isthmus.execution.inference.models.self_attention import plain_attention


def mistral_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of a Mistral model."""
    shapes = decoder_shapes(config, output_bias=False, query_key_norm=False)
    return TensorLayout(shapes, ignored_names(config), plain_attention, dense_mlp)
