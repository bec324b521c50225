"""Starting weights taken from another model of the family, where shapes allow it.

A model of the same shape takes everything. The hybrid takes from the main model what
does not mix positions: the embedding, the feed-forward parts of four of its six layers
and their norms. The draft takes the embedding's principal directions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from training.embedded.hybrid import Hybrid
from training.embedded.models import Network, read_weights

_LAYERS_FOR_HYBRID = (0, 1, 4, 5)


def _for_hybrid(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    taken = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}
    taken["model.norm.weight"] = weights["model.norm.weight"] - 1
    for here, there in enumerate(_LAYERS_FOR_HYBRID):
        ours, theirs = f"model.layers.{here}.", f"model.layers.{there}."
        for name in ("gate_proj", "up_proj", "down_proj"):
            taken[f"{ours}mlp.{name}.weight"] = weights[f"{theirs}mlp.{name}.weight"]
        norm = "post_attention_layernorm.weight"
        taken[ours + norm] = weights[theirs + norm] - 1
    return taken


def _principal(embedding: Tensor, size: int) -> Tensor:
    """The embedding along its ``size`` main directions, at its own mean length."""
    _, _, directions = torch.linalg.svd(embedding, full_matrices=False)
    small = embedding @ directions[:size].T
    return small * (embedding.std() / small.std())


@torch.no_grad()
def inherit(model: Network, folder: Path) -> int:
    """Copies what fits from an exported folder into an initialised model; returns the number of tensors."""
    weights, own = read_weights(folder), dict(model.named_parameters())
    if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in own.items()}:
        if isinstance(model, Hybrid):
            weights = _for_hybrid(weights)
        else:
            name = "model.embed_tokens.weight"
            weights = {name: _principal(weights[name], model.config.hidden_size)}
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return len(weights)
