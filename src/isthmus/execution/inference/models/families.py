"""The families that are served, by model_type."""

from collections.abc import Callable

from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.layout import TensorLayout
from isthmus.execution.inference.models.llama import llama_layout
from isthmus.execution.inference.models.qwen3 import qwen3_layout

FAMILIES: dict[str, Callable[[ModelConfig], TensorLayout]] = {"llama": llama_layout, "qwen3": qwen3_layout}


def tensor_layout(config: ModelConfig) -> TensorLayout:
    """The tensors of the model; `load_config` accepted its model_type."""
    return FAMILIES[config.model_type](config)
