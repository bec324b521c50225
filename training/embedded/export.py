"""Writes a checkpoint in the Hugging Face layout: bfloat16 weights, configuration, tokenizer, template.

Every file is written beside the old one and then put in its place, so a reader
never sees half a file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from training.embedded import checkpoint
from training.embedded.models import KINDS, published

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("bos", "eos", "pad", "end")}
    return {"bos_token_id": ids["bos"], "eos_token_id": [ids["end"], ids["eos"]], "pad_token_id": ids["pad"]}


def export(model: str, run: Path, tokenizer_folder: Path, target: Path) -> dict[str, Any]:
    """Writes everything of a named model into ``target``; returns the progress of the exported checkpoint."""
    found = checkpoint.load(run)
    if found is None:
        raise SystemExit(f"no checkpoint in {run}")
    weights, _, progress = found
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    config = {**published(KINDS[model].config), **_token_ids(tokenizer)}
    generation = {**_token_ids(tokenizer), "do_sample": False, "max_new_tokens": 256}
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    _replace(target / "model.safetensors", lambda p: save_file(tensors, str(p), metadata={"format": "pt"}))
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        text = json.dumps(content, indent=2) + "\n"
        _replace(target / name, lambda p, text=text: p.write_text(text))  # type: ignore[misc]
    for name in TOKENIZER_FILES:
        _replace(target / name, lambda p, name=name: shutil.copyfile(tokenizer_folder / name, p))  # type: ignore[misc]
    return progress


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="work folder")
    parser.add_argument("--model", choices=sorted(KINDS), default="main", help="which model")
    parser.add_argument("--run", help="name of the run to export (default: by model)")
    parser.add_argument("--data", type=Path, default=Path("src/isthmus/data"), help="where the models' folders are")
    options = parser.parse_args()
    kind = KINDS[options.model]
    run, target = options.work / (options.run or kind.run), options.data / kind.folder
    print(json.dumps(export(options.model, run, options.work / "tokenizer", target)))


if __name__ == "__main__":
    main()
