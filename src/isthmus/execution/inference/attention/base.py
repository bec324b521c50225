"""The seam for attention: a backend reads a step's layout once, then serves every layer of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from isthmus.execution.inference.kv_memory import KvMemory


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first, first + count) of the packed step are positions [start, start + count) of one sequence.

    `rows` [start + count] int64: the K row of layer 0 of each of its positions in the KV memory.
    """

    first: int
    count: int
    start: int
    rows: np.ndarray

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.count


class StepAttention(Protocol):
    """Attention of one step, for each layer in turn. K and V of the step are in the memory already."""

    def __call__(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Causal attention of `query` [rows, heads, head_dim]; the same shape. Rows of no span are zero."""
        ...


class AttentionBackend(Protocol):
    """Attention over block tables."""

    def plan(self, spans: Sequence[Span], memory: KvMemory, heads: int) -> StepAttention:
        """Prepare everything of a step that all layers share."""
        ...
