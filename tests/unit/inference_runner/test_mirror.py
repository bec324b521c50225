"""Copies of decoding sequences: whatever joins, leaves, skips or is moved, attention is that over the blocks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from isthmus.execution.inference.attention import gathered, mirror
from isthmus.execution.inference.attention.base import Span
from isthmus.execution.inference.attention.gathered import GatheredAttention
from isthmus.execution.inference.attention.mirror import Mirror
from isthmus.execution.inference.kv_memory import KvMemory

KV_HEADS, DIM, BLOCK, BLOCKS, LAYERS = 2, 8, 4, 300, 2


def memory(dtype: torch.dtype = torch.float32) -> KvMemory:
    return KvMemory(
        blocks=BLOCKS,
        layers=LAYERS,
        block_tokens=BLOCK,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@dataclass
class Story:
    """One sequence: its blocks, and how many of its tokens are computed."""

    serial: int
    blocks: list[int]
    computed: int = 0
    seed: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class Site:
    """A KV memory, sequences in it, and an engine's steps on them."""

    def __init__(self, seed: int, heads: int, copies_bytes: int = 1 << 22) -> None:
        self.rng = random.Random(seed)
        self.heads = heads
        self.memory = memory()
        # What others left, which must reach no sum.
        self.memory.rows[: self.memory.zero_row] = torch.nan
        self.free = list(range(BLOCKS))
        self.rng.shuffle(self.free)
        self.stories: list[Story] = []
        self.serials = 0
        self.attention = GatheredAttention(copies_bytes)
        self.noise = torch.Generator().manual_seed(seed)

    def join(self, tokens: int) -> None:
        """A new sequence whose prompt is computed, in blocks that others may have had."""
        self.serials += 1
        story = Story(self.serials, [])
        self.stories.append(story)
        self._write(story, tokens)
        story.computed = tokens

    def leave(self, story: Story) -> None:
        """It ends; its blocks are the next to be taken."""
        self.stories.remove(story)
        self.free += story.blocks

    def move(self, story: Story) -> None:
        """It is preempted, and computed again elsewhere."""
        self.free = story.blocks + self.free
        story.blocks = []
        self._write(story, story.computed)

    def _write(self, story: Story, end: int) -> None:
        """Blocks for positions [0, end), and new K and V from `computed` on, or from 0 where it has no blocks."""
        first = story.computed if story.blocks else 0
        while len(story.blocks) * BLOCK < end:
            story.blocks.append(self.free.pop())
        rows = np.array(story.blocks)[:, None] * self.memory.block_rows + np.arange(BLOCK)
        story.rows = rows.reshape(-1)[:end]
        for layer in range(LAYERS):
            for offset in (0, self.memory.value_offset):
                index = torch.from_numpy(story.rows[first:end]) + self.memory.layer_offset(layer) + offset
                fresh = torch.randn(end - first, KV_HEADS * DIM, generator=self.noise)
                self.memory.rows.index_copy_(0, index, fresh)

    def step(self, parts: Sequence[tuple[Story, int]]) -> None:
        """A step with so many queries of each, compared with what each gives alone over its blocks."""
        spans, first = [], 0
        for story, count in parts:
            self._write(story, story.computed + count)
            spans.append(Span(first, count, story.computed, story.rows, story.serial))
            first += count
        planned = self.attention.plan(spans, self.memory, self.heads)
        for layer in range(LAYERS):
            query = torch.randn(first, self.heads, DIM, generator=self.noise)
            found = planned(layer, query)
            expected = torch.cat([self._alone(query, span, layer) for span in spans])
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        for story, count in parts:
            story.computed += count

    def _alone(self, query: torch.Tensor, span: Span, layer: int) -> torch.Tensor:
        rows = torch.from_numpy(span.rows) + self.memory.layer_offset(layer)
        key, value = self.memory.rows[rows], self.memory.rows[rows + self.memory.value_offset]
        key, value = (
            part.view(-1, KV_HEADS, DIM).repeat_interleave(self.heads // KV_HEADS, 1) for part in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[span.first : span.first + span.count], key) / DIM**0.5
        scores[:, torch.arange(span.start, span.end)[:, None] < torch.arange(span.end)[None, :]] = -torch.inf
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_attention_is_that_over_the_blocks(
    seed: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SMALLEST", 16)
    monkeypatch.setattr(mirror, "LEAST_TOKENS", 6)
    monkeypatch.setattr(gathered, "LEAST_FOLDED", 3)
    # In some runs there is room for a few copies only.
    site = Site(seed, heads, copies_bytes=(1 << 22) if seed % 2 else 40_000)
    copied = 0
    for _ in range(40):
        roll = site.rng.random()
        if len(site.stories) < 2 or (roll < 0.25 and len(site.stories) < 9):
            site.join(site.rng.randint(1, 60))
        elif roll < 0.4:
            site.leave(site.rng.choice(site.stories))
        elif roll < 0.5:
            site.move(site.rng.choice(site.stories))
        order = site.rng.sample(site.stories, len(site.stories))
        # Most decode; some skip a step, some have drafts or a chunk of a prompt.
        parts = [(one, site.rng.choice([1, 1, 1, 1, 1, 1, 2, 5, 12])) for one in order if site.rng.random() < 0.9]
        if parts and sum(len(one.blocks) for one in site.stories) < BLOCKS - 60:
            site.step(parts)
        made = site.attention._mirror
        copied = max(copied, made.sequences if made is not None else 0)
        assert made is None or made.bytes <= (1 << 22 if seed % 2 else 40_000)
    assert copied > 1


def test_a_copy_is_made_once_and_then_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(1, 4)
    for _ in range(5):
        site.join(100)
    filled: list[int] = []
    real = mirror._Shelf._fill
    monkeypatch.setattr(mirror._Shelf, "_fill", lambda *args: (filled.append(args[1]), real(*args)))
    for _ in range(20):
        site.step([(story, 1) for story in site.stories])
    assert len(filled) == 5
    site.step([(story, 1) for story in site.stories[1:]])
    assert len(filled) == 5, "one that ends leaves the others as they are"


def test_another_sequence_in_the_same_rows_gets_a_copy_of_its_own() -> None:
    site = Site(2, 4)
    site.join(80)
    old = site.stories[0]
    site.step([(old, 1)])
    site.leave(old)
    site.free.clear()
    site.free += old.blocks[::-1]
    site.join(80)
    new = site.stories[0]
    assert new.blocks == old.blocks[: len(new.blocks)]
    site.step([(new, 1)])


def test_what_a_sequence_left_in_its_place_reaches_no_other() -> None:
    site = Site(5, 4)
    for tokens in (150, 140):
        site.join(tokens)
    long, sick = site.stories
    for layer in range(LAYERS):
        site.memory.rows[torch.from_numpy(sick.rows) + site.memory.layer_offset(layer)] = torch.nan
    spans = [Span(place, 1, one.rows.size - 1, one.rows, one.serial) for place, one in enumerate((long, sick))]
    planned = site.attention.plan(spans, site.memory, 4)
    for layer in range(LAYERS):
        assert planned(layer, torch.ones(2, 4, DIM)).isnan().any(1).any(1).tolist() == [False, True]
    site.leave(sick)
    site.free = [block for block in site.free if block not in sick.blocks]
    site.join(70)
    site.step([(one, 1) for one in site.stories])


def test_a_sequence_without_a_number_is_never_copied() -> None:
    site = Site(3, 4)
    site.join(100)
    site.stories[0].serial = 0
    site.step([(site.stories[0], 1)])
    assert site.attention._mirror is not None
    assert site.attention._mirror.sequences == 0


def test_memory_is_bounded_and_given_back() -> None:
    site = Site(4, 4)
    token = 2 * LAYERS * KV_HEADS * DIM * 4
    made = Mirror(site.memory, 3 * 256 * token)
    rows = [np.arange(place * 100, place * 100 + 100) for place in range(5)]
    spans = [Span(place, 1, 99, rows[place], place + 1) for place in range(5)]
    site.memory.rows[:] = 0.0
    batches, taken = made.place(spans, [0] * 5, 5)
    assert len(taken) == 3
    assert [batch.sequences for batch in batches] == [3]
    assert made.bytes <= 3 * 256 * token
    batches, taken = made.place([], [], 0)
    assert (batches, taken, made.bytes, made.sequences) == ([], set(), 0, 0)
