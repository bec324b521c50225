"""Keys and values of decoding sequences, copied once into one piece each and extended at every step.

SDPA wants K and V of a sequence in one piece; they lie in blocks. Gathering them anew at every step moves four times
the bytes that attention needs. A sequence that decodes is copied here when it begins to, and from then on each step
adds what it wrote: one row of K and of V a layer.

Promise: a copy is used only for the sequence that it was made for (`Span.serial`, never given twice), over the same
rows of the KV memory, up to what earlier steps computed. What a sequence has in a block never changes while it is the
same sequence, so copy and blocks hold the same numbers. A sequence that skips a step, or has several queries in one,
loses its copy. Memory is bounded by `most_bytes`, while a place grows by what it had besides; sequences beyond it are
gathered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from isthmus.execution.inference.attention.base import Span, packed_rows
from isthmus.execution.inference.kv_memory import KvMemory

LEAST_TOKENS = 16
"""Keys of its own under which a sequence is not worth a copy."""
SMALLEST = 256
"""The least capacity of a place, in tokens."""
_CLEARED = 64


@dataclass(slots=True)
class _Copy:
    """One sequence's place: its keys at [low, end) are those of `rows`, which has the row of each position."""

    serial: int
    low: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Mirrored:
    """Decoding sequences whose keys lie in one piece each.

    `rows` [n] packed rows, None for all rows of the step in order; `fresh` for each layer [2n] rows of the K, then of
    the V of this step, to be written to the places `into` of a layer's [2 * slots * capacity] tokens; `mask`
    [n, 1, 1, length] additive, None if all are equal.
    """

    tokens: torch.Tensor  # [layers, 2, slots, capacity, kv_heads * head_dim]
    sequences: int
    rows: torch.Tensor | None
    fresh: Sequence[torch.Tensor]
    into: torch.Tensor
    length: int
    mask: torch.Tensor | None

    def keys_values(self, layer: int, memory: KvMemory) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, this step's with them, each [n, length, kv_heads * head_dim] (strided)."""
        tokens = self.tokens[layer]
        fresh = memory.rows.index_select(0, self.fresh[layer])
        tokens.view(-1, tokens.shape[-1]).index_copy_(0, self.into, fresh)
        both = tokens[:, : self.sequences, : self.length]
        return both[0], both[1]


class Mirror:
    """The copies of one engine. One step at a time."""

    def __init__(self, memory: KvMemory, most_bytes: int) -> None:
        self._memory = memory
        self._shelves: dict[int, _Shelf] = {}
        self._token_bytes = 2 * memory.layers * memory.rows.shape[1] * memory.rows.element_size()
        self._most_tokens = most_bytes // self._token_bytes

    @property
    def sequences(self) -> int:
        """How many have a copy."""
        return sum(len(shelf.copies) for shelf in self._shelves.values())

    @property
    def bytes(self) -> int:
        """Memory reserved."""
        return self._token_bytes * sum(shelf.reserved for shelf in self._shelves.values())

    def place(self, spans: Sequence[Span], low: Sequence[int], total: int) -> tuple[list[Mirrored], set[int]]:
        """For a step of `total` rows: the sequences that decode from copies, and their places in `spans`.

        `low` is where the own keys of each span begin. Copies of sequences that are not among them are dropped.
        """
        wanted: dict[int, list[int]] = {}
        for place, (span, first) in enumerate(zip(spans, low, strict=True)):
            if span.serial and span.count == 1 and span.start - first >= LEAST_TOKENS:
                wanted.setdefault(_capacity(span.end - first), []).append(place)
        for capacity in [capacity for capacity in self._shelves if capacity not in wanted]:
            del self._shelves[capacity]
        found: list[Mirrored] = []
        taken: set[int] = set()
        for capacity, places in wanted.items():
            shelf = self._shelves.get(capacity) or _Shelf(self._memory, capacity)
            others = sum(one.reserved for size, one in self._shelves.items() if size != capacity)
            most = max(0, self._most_tokens - others) // capacity
            kept = places[:most]
            shelf.hold([(spans[place], low[place]) for place in kept], most)
            if not kept:
                self._shelves.pop(capacity, None)
                continue
            self._shelves[capacity] = shelf
            order = {copy.serial: slot for slot, copy in enumerate(shelf.copies)}
            kept.sort(key=lambda place: order[spans[place].serial])
            found.append(shelf.step([spans[place] for place in kept], total))
            taken.update(kept)
        return found, taken


def _capacity(tokens: int) -> int:
    """The size of the place for so many tokens: a power of two."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


class _Shelf:
    """The copies of one capacity, in slots [0, n) without a gap.

    Of slot s the tokens [0, length of its copy) are that copy's, those up to `_clean[s]` zero, and what lies behind is
    never read: what another sequence left there, even NaN, can reach no sum.
    """

    def __init__(self, memory: KvMemory, capacity: int) -> None:
        self._memory, self._capacity = memory, capacity
        self.copies: list[_Copy] = []
        self._clean: list[int] = []
        self._tokens = self._reserve(0)

    def _reserve(self, slots: int) -> torch.Tensor:
        memory = self._memory
        shape = (memory.layers, 2, slots, self._capacity, memory.rows.shape[1])
        return torch.empty(shape, dtype=memory.rows.dtype, device=memory.rows.device)

    @property
    def reserved(self) -> int:
        """Tokens that there is room for."""
        return int(self._tokens.shape[2]) * self._capacity

    def hold(self, wanted: Sequence[tuple[Span, int]], most_slots: int) -> None:
        """Have a copy of each, made now where there is none that fits, and of no others."""
        self._drop({span.serial for span, _ in wanted})
        self._grow(len(wanted), most_slots)
        slots = {copy.serial: slot for slot, copy in enumerate(self.copies)}
        for span, low in wanted:
            slot = slots.get(span.serial, len(self.copies))
            if slot == len(self.copies):
                self.copies.append(_Copy(span.serial, low, span.rows[:0]))
            copy, before = self.copies[slot], span.rows[: span.start]
            if copy.low != low or not np.array_equal(copy.rows[: span.start], before):
                self._fill(slot, before[low:])
            self.copies[slot] = _Copy(span.serial, low, span.rows)

    def _drop(self, kept: set[int]) -> None:
        """Forget all but the sequences in `kept`; the last ones move into the gaps."""
        slot = 0
        while slot < len(self.copies):
            if self.copies[slot].serial in kept:
                slot += 1
                continue
            last = self.copies.pop()
            if slot < len(self.copies):
                self.copies[slot] = last
                length = last.rows.size - last.low
                self._tokens[:, :, slot, :length] = self._tokens[:, :, len(self.copies), :length]
                self._filled(slot, length)

    def _grow(self, slots: int, most: int) -> None:
        had = int(self._tokens.shape[2])
        if slots > had:
            grown = self._reserve(min(most, max(slots, 2 * had)))
            for slot, clean in enumerate(self._clean):
                grown[:, :, slot, :clean] = self._tokens[:, :, slot, :clean]
            self._tokens = grown
            self._clean += [0] * (int(grown.shape[2]) - had)

    def _fill(self, slot: int, rows: np.ndarray) -> None:
        """Copy the tokens in `rows` (layer 0) into a slot, for all layers."""
        memory = self._memory
        both = torch.from_numpy(np.stack((rows, rows + memory.value_offset))).to(memory.rows.device)
        for layer, index in enumerate(memory.in_layers(both)):
            found = memory.rows.index_select(0, index).view(2, rows.size, -1)
            self._tokens[layer, :, slot, : rows.size] = found
        self._filled(slot, rows.size)

    def _filled(self, slot: int, length: int) -> None:
        """A slot has new tokens in [0, length): what was left behind them becomes zero."""
        self._tokens[:, :, slot, length : self._clean[slot]] = 0
        self._clean[slot] = max(self._clean[slot], length)

    def _clear(self, length: int) -> None:
        """Make zero what lies behind the copies, up to `length` and some further."""
        length = min(self._capacity, -(-length // _CLEARED) * _CLEARED)
        for slot in range(len(self.copies)):
            if self._clean[slot] < length:
                self._tokens[:, :, slot, self._clean[slot] : length] = 0
                self._clean[slot] = length

    def step(self, spans: Sequence[Span], total: int) -> Mirrored:
        """What the step reads and writes; `spans` in the order of the slots."""
        memory, capacity, reserved = self._memory, self._capacity, int(self._tokens.shape[2])
        places = np.array([span.start - copy.low for span, copy in zip(spans, self.copies, strict=True)])
        into = np.arange(len(spans)) * capacity + places
        fresh = np.array([span.rows[span.start] for span in spans])
        length = int(places.max()) + 1
        self._clear(length)
        mask = None
        if places.min() + 1 < length:
            hidden = np.zeros((len(spans), length), np.float32)
            hidden[np.arange(length)[None, :] > places[:, None]] = -np.inf
            mask = torch.from_numpy(hidden).to(memory.rows.device, memory.rows.dtype)[:, None, None]
        device = memory.rows.device
        return Mirrored(
            tokens=self._tokens,
            sequences=len(spans),
            rows=packed_rows(spans, total, device),
            fresh=memory.in_layers(torch.from_numpy(np.stack((fresh, fresh + memory.value_offset))).to(device)),
            into=torch.from_numpy(np.concatenate((into, into + reserved * capacity))).to(device),
            length=length,
            mask=mask,
        )
