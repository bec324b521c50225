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

    `rows` [start + count] int64: the K row of layer 0 of each of its positions in the KV memory. `serial` is the
    sequence's own number, never given twice; 0 when it is not known.
    """

    first: int
    count: int
    start: int
    rows: np.ndarray
    serial: int = 0

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.count

    def first_key(self, window: int) -> int:
        """The first position that the first query sees: it sees `window` keys, its own with them; 0 for all."""
        return max(0, self.start - window + 1) if window else 0


def packed_rows(spans: Sequence[Span], total: int, device: torch.device) -> torch.Tensor | None:
    """The packed rows of the spans' queries, one span after the other; None when they are all `total` rows in order."""
    rows = np.concatenate([np.arange(span.first, span.first + span.count) for span in spans])
    if rows.size == total and bool((rows == np.arange(total)).all()):
        return None
    return torch.from_numpy(rows).to(device)


class StepAttention(Protocol):
    """Attention of one step, for each layer in turn. K and V of the step are in the memory already."""

    def __call__(self, layer: int, query: torch.Tensor, window: int = 0) -> torch.Tensor:
        """Causal attention of `query` [rows, heads, head_dim]; the same shape. Rows of no span are zero.

        With a `window` the query at position p sees the keys in (p - window, p]; 0 for all up to p. `layer` is the
        layer's place in the memory.
        """
        ...


class AttentionBackend(Protocol):
    """Attention over block tables."""

    def plan(self, spans: Sequence[Span], memory: KvMemory, heads: int) -> StepAttention:
        """Prepare what all layers of a step share; what layers of one window share is prepared when it is needed."""
        ...
