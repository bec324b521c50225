"""The families that are served, by model_type."""

from collections.abc import Callable

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout
from isthmus.execution.inference.models.llama import llama_layout
from isthmus.execution.inference.models.mistral import mistral_layout
from isthmus.execution.inference.models.qwen2 import qwen2_layout
from isthmus.execution.inference.models.qwen3 import qwen3_layout
from isthmus.execution.inference.models.qwen3_moe import qwen3_moe_layout
from isthmus.execution.inference.models.qwen3_next import qwen3_next_layout

FAMILIES: dict[str, Callable[[ModelConfig], TensorLayout]] = {
    "llama": llama_layout,
    "mistral": mistral_layout,
    "qwen2": qwen2_layout,
    "qwen3": qwen3_layout,
    "qwen3_moe": qwen3_moe_layout,
    "qwen3_next": qwen3_next_layout,
}


def tensor_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of the model; `load_config` accepted its model_type."""
    return FAMILIES[config.model_type](config)
