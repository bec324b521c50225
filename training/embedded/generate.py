"""Greedy decoding with the training model, plainly: the whole text again for every token."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from training.embedded.model import Llama, ModelConfig


def load_exported(folder: Path) -> Llama:
    """The exported model, its bfloat16 weights widened to float32."""
    published = json.loads((folder / "config.json").read_text())
    shape = {name: published[name] for name in ModelConfig.__dataclass_fields__}
    model = Llama(ModelConfig(**shape))
    model.load_state_dict({k: v.float() for k, v in load_file(str(folder / "model.safetensors")).items()})
    return model.eval()


@torch.no_grad()
def greedy(model: Llama, prompt: list[int], most: int, stops: set[int]) -> list[int]:
    """The tokens after a prompt, up to ``most`` or to the first stop, which is not returned."""
    ids = list(prompt)
    while len(ids) - len(prompt) < most and len(ids) < model.config.max_position_embeddings:
        states: Tensor = model.hidden(torch.tensor([ids]))
        following = int((states[0, -1] @ model.model.embed_tokens.weight.T).argmax())
        if following in stops:
            break
        ids.append(following)
    return ids[len(prompt) :]
