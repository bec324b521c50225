"""The training loss, over no more positions than are worth it.

Most targets of the exercises weigh little: they are setting, not answer. The output layer
and its softmax are a third of the work of a small model, so a step computes them for all
heavy targets and for a sample of the light ones, which then stand for the others.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

HEAVY = 0.5
Chosen = tuple[NDArray[np.int64], NDArray[np.float32]]


def choose(weights: NDArray[np.float32], share: float, seed: list[int]) -> Chosen:
    """Positions (of the flattened batch, ascending) and their weights, ``share`` of all positions.

    The expected weighted sum over heavy and over light targets stays what it is. Too few
    targets are made up with weight 0. The choice depends on ``seed`` alone.
    """
    flat, rng = weights.reshape(-1), np.random.default_rng(seed)
    most = round(share * flat.size)
    chosen, scaled = [], []
    light = np.flatnonzero((flat > 0) & (flat < HEAVY))
    reserved = min(len(light), most // 10)
    for part, spare in ((np.flatnonzero(flat >= HEAVY), reserved), (light, 0)):
        room = most - spare - sum(map(len, chosen))
        kept = rng.permutation(part)[:room] if len(part) > room else part
        chosen.append(kept)
        scaled.append(flat[kept] * np.float32(len(part) / max(1, len(kept))))
    lacking = most - sum(map(len, chosen))
    positions = np.concatenate([*chosen, np.zeros(lacking, np.int64)])
    values = np.concatenate([*scaled, np.zeros(lacking, np.float32)])
    order = np.argsort(positions, kind="stable")
    return positions[order], values[order].astype(np.float32)


def weighted_loss(states: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean cross-entropy in nats of ``[n]`` targets after ``[n, hidden]`` states."""
    each = functional.cross_entropy(functional.linear(states, head).float(), targets, reduction="none")
    return (each * weights).sum() / weights.sum()


class Objective(nn.Module):
    """A model's loss on a batch, at chosen positions."""

    def __init__(self, model: nn.Module, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self._loss = torch.compile(weighted_loss, dynamic=False) if compiled else weighted_loss
        # Compiled beside the model, not in place: probes ask it at many lengths, and each would be compiled anew.
        self._layers = tuple(torch.compile(one, dynamic=False) for one in model.model.layers) if compiled else ()

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
        """The loss of ``[rows, length]`` targets at the ``[n]`` flattened positions."""
        states = self.model.hidden(tokens, self._layers).flatten(0, 1).index_select(0, positions)
        loss: Tensor = self._loss(states, self.model.model.embed_tokens.weight, targets.flatten()[positions], weights)
        return loss
