"""Cascade attention: keys that several sequences of a step have in common are read once for all of them.

What is common is found by the rows in the KV memory: sequences that share a prefix share its blocks. The result over
all keys of a query is put together from the results over parts of them by their log-sum-exp (Milakov & Gimelshein
2018; the decomposition of Hydragen, Juravsky et al. 2024, and of FlashInfer's cascades, Ye et al. 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isthmus.execution.inference.attention.base import Span

LEAST_SAVED = 512
"""Keys that need not be read a second time, under which a part of its own costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The keys at positions [low, high) lie in the same rows for all `members`, before the queries of each."""

    members: Sequence[int]
    low: int
    high: int


def find_shared(spans: Sequence[Span], least_saved: int = LEAST_SAVED) -> tuple[list[Shared], list[int]]:
    """The shared parts of a step, and for each span the position from which its keys are its own.

    Parts of one span follow each other from position 0 on: a prefix of all, then one of some of those, and so on.
    """
    parts: list[Shared] = []
    own = [0] * len(spans)
    # (spans that are alike up to `high`, of which `low` is where what is not in a part yet begins)
    alike: list[tuple[list[int], int, int]] = [(list(range(len(spans))), 0, 0)]
    while alike:
        members, low, high = alike.pop()
        for group in _by_row(spans, members, high):
            end = _common(spans, group, high)
            start = low
            if (len(group) - 1) * (end - low) >= least_saved:
                parts.append(Shared(group, low, end))
                start = end
                for member in group:
                    own[member] = end
            alike.append((group, start, end))
    return parts, own


def _by_row(spans: Sequence[Span], members: Sequence[int], at: int) -> list[list[int]]:
    """The members with keys before their queries at position `at`, by the row there; only groups of several."""
    groups: dict[int, list[int]] = {}
    for member in members:
        if spans[member].start > at:
            groups.setdefault(int(spans[member].rows[at]), []).append(member)
    return [group for group in groups.values() if len(group) > 1]


def _common(spans: Sequence[Span], members: Sequence[int], low: int) -> int:
    """The first position from `low` on where two members differ, or where the queries of one begin."""
    end = min(spans[member].start for member in members)
    first = spans[members[0]].rows
    for member in members[1:]:
        differ = first[low:end] != spans[member].rows[low:end]
        if differ.any():
            end = low + int(differ.argmax())
    return end


def merge(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Take the result over further keys into `out` [rows, heads, head_dim] and `lse` [rows, heads], both float32.

    `lse` is the log of the sum of the exponentials of the scores that a result was normalised by.
    """
    both = torch.logaddexp(lse, more_lse)
    out.lerp_(more, (more_lse - both).exp_()[..., None])
    lse.copy_(both)
