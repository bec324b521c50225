"""The order of work of a recurrent layer in one step, shared by all its layers.

A sequence's part of the step is cut into *cells*, the 64 positions of one cell of the grid (absolute positions, no
state wanted inside), and *runs*, everything else, one position after the other. Turn by turn the next piece of every
sequence is done: runs in lockstep, then cells as one batch, or several when there are many. So a decode step is one
round of runs of length 1, and a cell's numbers are the same in whatever step and chunk it comes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

GRID_TOKENS = 64
"""Tokens of a cell: the chunk of the chunked delta rule."""
WINDOW_CELLS = 64
"""Cells whose parts that need no state are computed together, a limit on scratch memory."""


_Index = Callable[[Sequence[int] | np.ndarray], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StateSpan:
    """Rows [first, first + count) of the packed step are positions [start, start + count) of one sequence.

    `source` is the slot with the state before them; `captures` are (end, slot): the state after positions [0, end).
    """

    first: int
    count: int
    start: int
    source: int
    captures: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Writes:
    """States to be kept: those at `places` (of the batch at hand) go to `slots`."""

    places: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of one round: `sequences` that have one, in the order of their places in the window."""

    sequences: torch.Tensor
    window: slice
    writes: Writes | None


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of one round, longest first, position after position: `rows` are the packed rows in that order.

    Step t has the first `active[t]` of `sequences`. `whole`: they are all sequences in order; `every`: the rows are all
    rows in order. Then nothing needs to be copied.
    """

    sequences: torch.Tensor
    rows: torch.Tensor
    active: Sequence[int]
    writes: Mapping[int, Writes | None]
    whole: bool
    every: bool


@dataclass(frozen=True, slots=True)
class Window:
    """Rounds in a row, and the packed rows [cells * GRID_TOKENS] of all their cells."""

    cell_rows: torch.Tensor
    rounds: Sequence[tuple[Cells | None, Runs | None]]


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """One step. The convolution reads rows of (inputs kept of each sequence, then the step's own rows).

    `sources` [sequences] slots; `taps` [history + 1, rows] what each row reads, oldest first; `kept`
    [captures, history] what is to be kept in `kept_slots`. `rows` real rows come first in the packed step.
    """

    rows: int
    sources: torch.Tensor
    taps: torch.Tensor
    kept: torch.Tensor
    kept_slots: torch.Tensor
    windows: Sequence[Window]


def plan_delta(spans: Sequence[StateSpan], history: int, device: torch.device, *, cells: bool) -> DeltaPlan:
    """Plan a step. Without `cells` every span is one run. The spans lie one after the other from row 0."""

    def on(values: Sequence[int] | np.ndarray) -> torch.Tensor:
        """An index on the device."""
        return torch.from_numpy(np.asarray(values, np.int64)).to(device)

    reads = [_reads(index, span, len(spans), history) for index, span in enumerate(spans)]
    lines = list(zip(reads, spans, strict=True))
    taps = [np.stack([line[tap : tap + span.count] for tap in range(history + 1)]) for line, span in lines]
    kept = [line[end - span.start : end - span.start + history] for line, span in lines for end, _ in span.captures]
    return DeltaPlan(
        rows=sum(span.count for span in spans),
        sources=on([span.source for span in spans]),
        taps=on(np.concatenate(taps, 1)),
        kept=on(np.array(kept, np.int64).reshape(-1, history)),
        kept_slots=on([slot for span in spans for _, slot in span.captures]),
        windows=_windows(spans, on, cells=cells),
    )


def _reads(index: int, span: StateSpan, spans: int, history: int) -> np.ndarray:
    """Convolution inputs of a span in order, as rows of the joined inputs: first those kept, then its own."""
    own = np.arange(span.first, span.first + span.count) + spans * history
    return np.concatenate((np.arange(index * history, (index + 1) * history), own))


def _pieces(span: StateSpan, *, cells: bool) -> list[tuple[int, int, bool]]:
    """(low, high, whether it is a cell), in order, without neighbouring runs."""
    if not cells:
        return [(span.start, span.start + span.count, False)]
    end = span.start + span.count
    inside = {at for at, _ in span.captures if at % GRID_TOKENS}
    pieces: list[tuple[int, int, bool]] = []
    low = span.start
    while low < end:
        high = min(end, (low // GRID_TOKENS + 1) * GRID_TOKENS)
        cell = high - low == GRID_TOKENS and not any(low < at < high for at in inside)
        if pieces and not cell and not pieces[-1][2]:
            pieces[-1] = (pieces[-1][0], high, False)
        else:
            pieces.append((low, high, cell))
        low = high
    return pieces


def _windows(spans: Sequence[StateSpan], on: _Index, *, cells: bool) -> list[Window]:
    """Rounds, grouped so that a window has at most WINDOW_CELLS cells."""
    pieces = [_pieces(span, cells=cells) for span in spans]
    windows: list[Window] = []
    rows: list[np.ndarray] = []
    rounds: list[tuple[Cells | None, Runs | None]] = []
    for turn in range(max(len(part) for part in pieces)):
        now = [(index, spans[index], *part[turn]) for index, part in enumerate(pieces) if turn < len(part)]
        rounds.append((None, _runs([piece for piece in now if not piece[4]], spans, on)))
        every = [piece for piece in now if piece[4]]
        for batch in (every[low : low + WINDOW_CELLS] for low in range(0, len(every), WINDOW_CELLS)):
            if len(rows) + len(batch) > WINDOW_CELLS:
                windows.append(Window(on(np.concatenate(rows)), rounds))
                rows, rounds = [], []
            rounds.append((_cells(batch, len(rows), on), None))
            rows += [np.arange(low, high) - span.start + span.first for _, span, low, high, _ in batch]
    windows.append(Window(on(np.concatenate(rows) if rows else []), rounds))
    return windows


_Piece = tuple[int, StateSpan, int, int, bool]


def _cells(batch: Sequence[_Piece], before: int, on: _Index) -> Cells | None:
    if not batch:
        return None
    wanted = [(place, slot) for place, piece in enumerate(batch) for end, slot in piece[1].captures if end == piece[3]]
    sequences = on([index for index, *_ in batch])
    return Cells(sequences, slice(before, before + len(batch)), _writes(wanted, on))


def _runs(batch: Sequence[_Piece], spans: Sequence[StateSpan], on: _Index) -> Runs | None:
    if not batch:
        return None
    ordered = sorted(batch, key=lambda piece: piece[2] - piece[3])
    counts = np.array([high - low for _, _, low, high, _ in ordered])
    firsts = np.array([low - span.start + span.first for _, span, low, _, _ in ordered])
    active = [int((counts > step).sum()) for step in range(int(counts[0]))]
    wanted: dict[int, list[tuple[int, int]]] = {}
    for place, (_, span, low, high, _) in enumerate(ordered):
        for end, slot in span.captures:
            if low < end <= high:
                wanted.setdefault(end - low - 1, []).append((place, slot))
    indexes = [index for index, *_ in ordered]
    rows = np.concatenate([firsts[:count] + step for step, count in enumerate(active)])
    total = sum(span.count for span in spans)
    return Runs(
        sequences=on(indexes),
        rows=on(rows),
        active=active,
        writes={step: _writes(pairs, on) for step, pairs in wanted.items()},
        whole=indexes == list(range(len(spans))),
        every=rows.size == total and bool((rows == np.arange(total)).all()),
    )


def _writes(pairs: Sequence[tuple[int, int]], on: _Index) -> Writes | None:
    return Writes(on([place for place, _ in pairs]), on([slot for _, slot in pairs])) if pairs else None
