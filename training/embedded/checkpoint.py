"""Checkpoints: tensors in safetensors, everything else in JSON. Nothing is ever pickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def save(folder: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Writes a checkpoint; a reader sees the old one or the new one, never a mixture."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{progress['step']:07d}"
    tensors = {f"model/{k}": v for k, v in weights.items()} | {f"optimizer/{k}": v for k, v in optimizer.items()}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, str(folder / f"{name}.safetensors"))
    latest = folder / "latest.json"
    temporary = latest.with_suffix(".tmp")
    temporary.write_text(json.dumps({**progress, "tensors": f"{name}.safetensors"}, indent=2) + "\n")
    os.replace(temporary, latest)
    for old in folder.glob("step-*.safetensors"):
        if old.name != f"{name}.safetensors":
            old.unlink()


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
    """The latest checkpoint as (weights, optimizer state, progress), or none."""
    latest = folder / "latest.json"
    if not latest.exists():
        return None
    progress: dict[str, Any] = json.loads(latest.read_text())
    tensors = load_file(str(folder / progress.pop("tensors")))
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    return parts["model"], parts["optimizer"], progress
