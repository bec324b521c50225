"""The seam for linear layers: a backend turns a weight into a callable once, at load."""

from collections.abc import Callable
from typing import Protocol

import torch

Linear = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] -> [rows, out], in the weight's dtype."""


class LinearBackend(Protocol):
    """How y = x W^T + b is computed."""

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """A layer with `weight` [out, in] and `bias` [out]. The backend may keep the weight in another layout."""
        ...

    def prepare_swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> Linear | None:
        """silu(x gate^T) * (x up^T) in one (Shazeer 2020); None where the backend has nothing better than the parts."""
        ...
