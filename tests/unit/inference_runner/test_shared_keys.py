"""Cascade attention: keys that sequences share are read once, and the result is that of each sequence alone."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.execution.inference.attention import plan
from isthmus.execution.inference.attention.base import Span
from isthmus.execution.inference.attention.gathered import GatheredAttention
from isthmus.execution.inference.attention.shared import find_shared, merge
from isthmus.execution.inference.kv_memory import KvMemory

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 6, 2, 8, 4, 400


def memory() -> KvMemory:
    made = KvMemory(
        blocks=BLOCKS,
        layers=2,
        block_tokens=BLOCK,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    made.rows[: made.zero_row].normal_(generator=torch.Generator().manual_seed(1))
    return made


MEMORY = memory()


def spans_of(paths: Sequence[tuple[Sequence[int], int]]) -> list[Span]:
    """One span a path: its blocks, and how many of its last positions are queries."""
    spans, first = [], 0
    for blocks, queries in paths:
        rows = (np.array(blocks)[:, None] * MEMORY.block_rows + np.arange(BLOCK)).reshape(-1)
        count = min(queries, rows.size)
        spans.append(Span(first, count, rows.size - count, rows))
        first += count
    return spans


@st.composite
def forests(draw: st.DrawFn) -> list[Span]:
    """Sequences that share prefixes of each other's blocks."""
    paths: list[tuple[list[int], int]] = []
    fresh = 0
    for _ in range(draw(st.integers(1, 7))):
        kept: list[int] = []
        if paths and draw(st.booleans()):
            parent = draw(st.sampled_from(paths))[0]
            kept = parent[: draw(st.integers(0, len(parent)))]
        own = draw(st.integers(0 if kept else 1, 12))
        paths.append((kept + list(range(fresh, fresh + own)), draw(st.sampled_from([1, 1, 2, 3, 9, 20]))))
        fresh += own
    return spans_of(paths)


def alone(query: torch.Tensor, span: Span, layer: int) -> torch.Tensor:
    """Every score of one sequence."""
    rows = torch.from_numpy(span.rows) + MEMORY.layer_offset(layer)
    key, value = MEMORY.rows[rows], MEMORY.rows[rows + MEMORY.value_offset]
    key, value = (part.view(-1, KV_HEADS, DIM).repeat_interleave(HEADS // KV_HEADS, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query[span.first : span.first + span.count], key) / DIM**0.5
    scores[:, torch.arange(span.start, span.end)[:, None] < torch.arange(span.end)[None, :]] = -torch.inf
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@settings(max_examples=150, deadline=None)
@given(spans=forests(), least=st.sampled_from([1, 8, 40]))
def test_parts_cover_what_is_shared_and_nothing_else(spans: list[Span], least: int) -> None:
    parts, own = find_shared(spans, least)
    covered = [0] * len(spans)
    for part in parts:
        assert len(part.members) > 1
        assert (len(part.members) - 1) * (part.high - part.low) >= least
        first = spans[part.members[0]].rows[part.low : part.high]
        for member in part.members:
            assert covered[member] == part.low, "parts of a span follow each other"
            assert part.high <= spans[member].start, "no key of a query's own step"
            assert np.array_equal(first, spans[member].rows[part.low : part.high])
            covered[member] = part.high
    assert covered == own
    if least == 1:
        # Nothing that could be shared is left: no two spans have the same row at their first own position.
        left = [int(span.rows[low]) for span, low in zip(spans, own, strict=True) if low < span.start]
        assert len(left) == len(set(left))


@settings(max_examples=150, deadline=None)
@given(spans=forests(), least=st.sampled_from([1, 8, 10_000]))
def test_each_sequence_gets_what_it_gets_alone(spans: list[Span], least: int) -> None:
    count = sum(span.count for span in spans)
    query = torch.randn(count, HEADS, DIM, generator=torch.Generator().manual_seed(count))
    expected = torch.cat([alone(query, span, 1) for span in spans])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "find_shared", lambda spans: find_shared(spans, least))
        found = GatheredAttention().plan(spans, MEMORY, HEADS)(1, query)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_prefix_of_many_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = list(range(40))
    spans = spans_of([([*prefix, 50 + place], 1) for place in range(16)])
    gathered_rows = []
    real = torch.Tensor.index_select

    def counted(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        if tensor is MEMORY.rows:
            gathered_rows.append(index.numel())
        return real(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counted)
    GatheredAttention().plan(spans, MEMORY, HEADS)(0, torch.randn(16, HEADS, DIM))
    assert sorted(gathered_rows) == [2 * 16 * BLOCK, 2 * 40 * BLOCK]


def test_results_over_parts_of_the_keys_are_merged_whatever_their_scale() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(5, 2, 30, generator=generator) * torch.tensor([0.1, 1.0, 30.0, 200.0, 1000.0])[:, None, None]
    values = torch.randn(30, 4, generator=generator)

    def over(low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = scores[:, :, low:high]
        return part.softmax(-1) @ values[low:high], part.logsumexp(-1)

    out, lse = over(0, 7)
    for low, high in ((7, 8), (8, 30)):
        merge(out, lse, *over(low, high))
    expected, expected_lse = over(0, 30)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse)
