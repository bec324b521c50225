"""Says whether a model folder can be served without loading it: config.json, and every safetensors header."""

import math
from dataclasses import dataclass
from pathlib import Path

from isthmus.execution.inference.model_config import ModelConfig, load_config
from isthmus.execution.inference.models.families import tensor_layout
from isthmus.execution.inference.weights import check_weights

MAX_CODE_FILES = 16


@dataclass(frozen=True, slots=True)
class FolderReport:
    """What a folder holds. `code_files` lie in it and are never run. Sizes in bytes."""

    config: ModelConfig
    parameters: int
    weight_bytes: int
    weight_files: tuple[str, ...]
    code_files: tuple[str, ...]

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """KV memory of one token when an element takes `itemsize` bytes."""
        return 2 * self.config.kv_layers * self.config.kv_heads * self.config.head_dim * itemsize


def check_folder(folder: Path) -> FolderReport:
    """Check everything but the tensors' values. Raises `ModelInvalid` naming file and entry."""
    config = load_config(folder)
    layout = tensor_layout(config)
    entries = check_weights(folder, layout.shapes, layout.ignored, layout.ignored_prefix)
    parameters = sum(math.prod(entry.shape) for entry in entries)
    size = sum(entry.end - entry.start for entry in entries)
    files = tuple(sorted({entry.file for entry in entries}))
    code = tuple(sorted(path.name for path in folder.glob("*.py")))[:MAX_CODE_FILES]
    return FolderReport(config, parameters, size, files, code)
