"""Greedy decoding with the training models, plainly: the whole text again for every token."""

from __future__ import annotations

import torch
from torch import Tensor
from training.embedded.models import Network, load_exported

__all__ = ["greedy", "load_exported"]


@torch.no_grad()
def greedy(model: Network, prompt: list[int], most: int, stops: set[int]) -> list[int]:
    """The tokens after a prompt, up to ``most`` or to the first stop, which is not returned."""
    ids = list(prompt)
    while len(ids) - len(prompt) < most and len(ids) < model.config.max_position_embeddings:
        states: Tensor = model.hidden(torch.tensor([ids]))
        following = int((states[0, -1] @ model.model.embed_tokens.weight.T).argmax())
        if following in stops:
            break
        ids.append(following)
    return ids[len(prompt) :]
