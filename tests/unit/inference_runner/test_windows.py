"""Sliding windows: both attentions give what a slow reference gives, and exact mode does so bitwise in any chunks."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.execution.inference.attention.base import AttentionBackend, Span
from isthmus.execution.inference.attention.gathered import GatheredAttention
from isthmus.execution.inference.exact import TiledAttention
from isthmus.execution.inference.kv_memory import KvMemory

HEADS, KV_HEADS, DIM, BLOCK, LONGEST = 6, 2, 8, 4, 300
BLOCKS = 3 * LONGEST // BLOCK
CPU = torch.device("cpu")


def memory() -> KvMemory:
    made = KvMemory(
        blocks=BLOCKS, layers=2, block_tokens=BLOCK, kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32, device=CPU
    )
    made.rows[: made.zero_row].normal_(generator=torch.Generator().manual_seed(1))
    return made


MEMORY = memory()


def rows_of(place: int, end: int) -> np.ndarray:
    """The K rows in layer 0 of a sequence in blocks of its own, in a shuffled order."""
    blocks = np.random.default_rng(place).permutation(LONGEST // BLOCK) + place * (LONGEST // BLOCK)
    return (blocks[:, None] * MEMORY.block_rows + np.arange(BLOCK)).reshape(-1)[:end]


def spans_of(pieces: Sequence[tuple[int, int]]) -> list[Span]:
    """One span a sequence: (start, count)."""
    spans, first = [], 0
    for place, (start, count) in enumerate(pieces):
        spans.append(Span(first, count, start, rows_of(place, start + count)))
        first += count
    return spans


def queries(spans: Sequence[Span]) -> torch.Tensor:
    """The query of a position depends on sequence and position alone."""
    every = [torch.randn(LONGEST, HEADS, DIM, generator=torch.Generator().manual_seed(9 + place)) for place in range(3)]
    return torch.cat([every[place][span.start : span.end] for place, span in enumerate(spans)])


def reference(query: torch.Tensor, spans: Sequence[Span], layer: int, window: int) -> torch.Tensor:
    """Every score of every sequence; those of the keys in (p - window, p] count."""
    out = []
    for span in spans:
        rows = torch.from_numpy(span.rows) + MEMORY.layer_offset(layer)
        key = MEMORY.rows[rows].view(-1, KV_HEADS, DIM).repeat_interleave(HEADS // KV_HEADS, 1)
        value = MEMORY.rows[rows + MEMORY.value_offset].view(-1, KV_HEADS, DIM)
        value = value.repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("qhd,khd->hqk", query[span.first : span.first + span.count], key) / DIM**0.5
        behind = torch.arange(span.start, span.end)[:, None] - torch.arange(span.end)[None, :]
        scores[:, (behind < 0) | (behind >= (window or span.end))] = -torch.inf
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(out)


PIECES = st.lists(st.tuples(st.integers(0, 150), st.sampled_from([1, 2, 7, 8, 9, 30, 100])), min_size=1, max_size=3)
WINDOWS = st.sampled_from([0, 1, 2, 3, 5, 60, 63, 64, 65, 66, 130, 1000])


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, window=WINDOWS)
def test_a_query_sees_its_window_and_nothing_else(pieces: list[tuple[int, int]], window: int) -> None:
    spans = spans_of(pieces)
    query = queries(spans)
    expected = reference(query, spans, 1, window)
    backends: list[AttentionBackend] = [GatheredAttention(), TiledAttention()]
    for backend in backends:
        found = backend.plan(spans, MEMORY, HEADS)(1, query, window)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 21])
def test_chunks_of_queries_see_each_query_its_own_keys(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.execution.inference.attention import gathered

    monkeypatch.setattr(gathered, "CHUNK_BYTES", 64)
    spans = spans_of([(0, 70), (33, 50), (0, 70)])
    query = queries(spans)
    found = GatheredAttention().plan(spans, MEMORY, HEADS)(0, query, window)
    torch.testing.assert_close(found, reference(query, spans, 0, window), atol=2e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(window=WINDOWS, cuts=st.lists(st.integers(1, 199), max_size=6), beside=PIECES)
def test_exact_attention_is_bitwise_the_same_in_any_chunks(
    window: int, cuts: list[int], beside: list[tuple[int, int]]
) -> None:
    whole = spans_of([(0, 200)])
    expected = TiledAttention().plan(whole, MEMORY, HEADS)(0, queries(whole), window)
    edges = [0, *sorted(set(cuts)), 200]
    for start, end in pairwise(edges):
        spans = spans_of([(start, end - start), *beside[:2]])
        found = TiledAttention().plan(spans, MEMORY, HEADS)(0, queries(spans), window)
        assert torch.equal(found[: end - start], expected[start:end])


def test_layers_of_other_windows_do_not_disturb_each_other() -> None:
    spans = spans_of([(90, 12), (40, 1)])
    query = queries(spans)
    backends: list[AttentionBackend] = [GatheredAttention(), TiledAttention()]
    for backend in backends:
        step = backend.plan(spans, MEMORY, HEADS)
        for window in (0, 7, 50, 0, 7):
            torch.testing.assert_close(step(0, query, window), reference(query, spans, 0, window), atol=2e-5, rtol=1e-4)
