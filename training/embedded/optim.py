"""Muon for the matrices of the layers, AdamW for the embedding and the norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MATRIX_RATE = 0.02
OTHER_RATE = 3e-3


def orthogonalise(stack: Tensor, rounds: int = 5) -> Tensor:
    """Each matrix of a stack pulled towards the nearest orthogonal one (Newton-Schulz)."""
    x = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    out: Tensor = (x.mT if tall else x).to(stack.dtype)
    return out


def _is_other(name: str) -> bool:
    """Whether a matrix is no map between states: the embedding, and the gates of a delta net."""
    return "embed" in name or "in_proj_ba" in name


class Optimizer:
    """Steps every parameter of a model; its state is a flat dictionary of tensors."""

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self._matrices = {n: p for n, p in named.items() if p.ndim == 2 and not _is_other(n)}
        self._others = {n: p for n, p in named.items() if n not in self._matrices}
        self._state = {f"momentum.{n}": torch.zeros_like(p) for n, p in self._matrices.items()}
        for name, weight in self._others.items():
            self._state[f"first.{name}"] = torch.zeros_like(weight)
            self._state[f"second.{name}"] = torch.zeros_like(weight)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs."""
        return self._state

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over the state of a stopped run."""
        for name, tensor in self._state.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def step(self, number: int, scale: float) -> None:
        """One update; ``scale`` is the schedule's factor, ``number`` counts from 0."""
        self._step_matrices(number, scale)
        for name, weight in self._others.items():
            gradient = weight.grad
            if gradient is None:
                continue
            first, second = self._state[f"first.{name}"], self._state[f"second.{name}"]
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.05)
            step = (first / (1 - 0.9 ** (number + 1))) / ((second / (1 - 0.95 ** (number + 1))).sqrt() + 1e-9)
            weight.sub_(step, alpha=OTHER_RATE * scale)

    def _step_matrices(self, number: int, scale: float) -> None:
        momentum = 0.85 + 0.1 * min(1.0, number / 300)
        shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for name, weight in self._matrices.items():
            gradient = weight.grad
            if gradient is None:
                continue
            moving = self._state[f"momentum.{name}"]
            moving.lerp_(gradient, 1 - momentum)
            shapes.setdefault(weight.shape, []).append((weight, gradient.lerp(moving, momentum)))
        for shape, entries in shapes.items():
            steps = orthogonalise(torch.stack([update for _, update in entries]))
            rate = MATRIX_RATE * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            for (matrix, _), step in zip(entries, steps, strict=True):
                matrix.mul_(1 - 0.01 * rate).sub_(step, alpha=rate)
