"""Processes that share the rows of a step, started by torchrun; a process alone is a group of one."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed
from numpy.typing import NDArray
from torch import nn


class Group:
    """The processes of a run. Every one holds the whole model and takes the same steps."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if self.size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")

    @property
    def first(self) -> bool:
        """Whether this process saves and reports."""
        return self.rank == 0

    def share(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The part of a batch that this process takes; the rows are a multiple of the processes."""
        each = len(rows) // self.size
        return rows[self.rank * each : (self.rank + 1) * each]

    def from_first(self, value: float) -> float:
        """The first process's value."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(told, 0)
        return float(told)

    def average(self, model: nn.Module) -> None:
        """Makes every gradient the mean of all processes' gradients."""
        if self.size == 1:
            return
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
