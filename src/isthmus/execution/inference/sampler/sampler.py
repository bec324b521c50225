"""Sampling of a step: logits of all sampled rows in, tokens out.

Promise: a row's token depends only on its logits, parameters, seed, output index and history, never on the other rows.
Whatever runs over many rows at once (softmax, topk, argmax) works row by row inside; every sum that could be split
over threads is taken in numpy on one row. Drafts: a row a draft is judged as if the drafts before it were right, and
results after the first wrong one are dropped, which is the same as sampling one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3

from isthmus.contracts.events import TokenLogprob
from isthmus.execution.inference.batch import SampleTask, SequenceSlice, SliceResult
from isthmus.execution.inference.sampler.adjust import adjust
from isthmus.execution.inference.sampler.choose import inverse_cdf, kept, ranked
from isthmus.execution.inference.sampler.draws import uniform
from isthmus.execution.inference.sampler.mask import masked

HEAD = 256
"""Best tokens looked at before a whole row is sorted."""


@dataclass(slots=True)
class SamplerCounters:
    """Since the start: rows sampled, rows that needed a full sort, rows whose logits were not finite."""

    rows: int = 0
    full_sorts: int = 0
    not_finite: int = 0


@dataclass(frozen=True, slots=True)
class _Row:
    """One position to sample: output index `task.index + offset`, after `guessed` drafts."""

    task: SampleTask
    offset: int
    guessed: Sequence[int]

    @property
    def banned(self) -> Sequence[int]:
        """Tokens that may not be chosen here."""
        return self.task.banned if self.task.index + self.offset < self.task.banned_until else ()

    @property
    def mask(self) -> bytes | None:
        """The bitmask of allowed tokens here, None when the output is not constrained."""
        return None if self.task.masks is None else self.task.masks[self.offset]

    @property
    def adjusted(self) -> bool:
        """Whether the logits change before the choice."""
        return bool(self.task.params.logit_bias or self.task.params.penalised or self.banned)


class Sampler:
    """See the module. Keeps nothing between steps but counters."""

    def __init__(self) -> None:
        self.counters = SamplerCounters()

    def sample(
        self, logits: torch.Tensor, slices: Sequence[SequenceSlice], places: Sequence[range]
    ) -> list[SliceResult]:
        """`logits` [picked rows, vocabulary] float32; `places[i]` are slice i's rows. A result for each slice."""
        rows: list[_Row] = []
        sources: list[int] = []
        for part, place in zip(slices, places, strict=True):
            if part.sample is not None:
                drafts = list(part.token_ids[len(part.token_ids) - part.drafts :]) if part.drafts else []
                rows.extend(_Row(part.sample, offset, drafts[:offset]) for offset in range(part.drafts + 1))
                sources.extend(place)
        if not rows:
            return [SliceResult() for _ in slices]
        raw = logits if sources == list(range(logits.shape[0])) else logits[torch.tensor(sources, device=logits.device)]
        tokens = self._choose(masked(_adjusted(raw, rows), [row.mask for row in rows]), rows)
        results: list[SliceResult] = []
        first = 0
        for part in slices:
            if part.sample is None:
                results.append(SliceResult())
                continue
            count = _accepted(part, tokens[first : first + part.drafts + 1])
            chosen = tokens[first : first + count]
            results.append(_result(part.sample, raw[first : first + count], chosen))
            first += part.drafts + 1
        return results

    def _choose(self, logits: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
        """The token of each row."""
        self.counters.rows += len(rows)
        best: list[int] = logits.argmax(-1).tolist()
        drawn = [index for index, row in enumerate(rows) if not row.task.params.greedy]
        if not drawn:
            return best
        picked = logits if len(drawn) == len(rows) else logits[torch.tensor(drawn, device=logits.device)]
        heat = torch.tensor([rows[index].task.params.temperature for index in drawn], device=logits.device)
        # Subtracting the best first keeps tiny temperatures finite; division is exact to the last bit in each row.
        scaled = (picked - picked.amax(-1, keepdim=True)) / heat[:, None].clamp_min(1e-30)
        shares = torch.softmax(scaled, -1)
        cut = [i for i, index in enumerate(drawn) if _ordered(rows[index])]
        heads = _Heads(shares, cut)
        everything = shares.cpu().numpy()
        for place, index in enumerate(drawn):
            best[index] = self._draw(rows[index], everything[place], heads.get(place), best[index])
        return best

    def _draw(self, row: _Row, shares: np.ndarray, head: tuple[np.ndarray, np.ndarray] | None, best: int) -> int:
        """Sample one row of probabilities."""
        if not np.isfinite(shares[0]):
            self.counters.not_finite += 1
            return best
        params = row.task.params
        draw = uniform(params.seed, row.task.index + row.offset)
        if not _ordered(row):
            floor = np.float64(params.min_p) * shares.max()
            return inverse_cdf(np.where(shares >= floor, shares, 0.0) if params.min_p else shares, draw)
        values, ids = head if head is not None else (shares[:0], np.empty(0, np.int64))
        count = kept(values, params.top_k, params.top_p, params.min_p) if values.size else None
        if count is None:
            self.counters.full_sorts += 1
            values, ids = ranked(shares, np.arange(shares.size))
            count = kept(values, params.top_k, params.top_p, params.min_p) or values.size
        return int(ids[inverse_cdf(values[:count], draw)])


class _Heads:
    """The ranked best tokens of the rows that need an order, without the ties that the cut at HEAD may have split."""

    def __init__(self, shares: torch.Tensor, rows: Sequence[int]) -> None:
        self._places = {row: place for place, row in enumerate(rows)}
        if rows:
            size = min(HEAD, shares.shape[1])
            values, ids = shares[torch.tensor(rows, device=shares.device)].topk(size, -1)
            self._values, self._ids = values.cpu().numpy(), ids.cpu().numpy()
            self._whole = size == shares.shape[1]

    def get(self, row: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(values, ids), best first; None for rows without an order."""
        place = self._places.get(row)
        if place is None:
            return None
        values, ids = ranked(self._values[place], self._ids[place])
        if self._whole:
            return values, ids
        whole = int(np.searchsorted(-values, -values[-1], side="left"))
        return values[:whole], ids[:whole]


def _ordered(row: _Row) -> bool:
    """Whether the cuts need tokens ranked."""
    return row.task.params.top_k > 0 or row.task.params.top_p < 1.0


def _adjusted(raw: torch.Tensor, rows: Sequence[_Row]) -> torch.Tensor:
    """Logits after bias, penalties and bans; `raw` itself when no row has any."""
    changed = [index for index, row in enumerate(rows) if row.adjusted]
    if not changed:
        return raw
    index = torch.tensor(changed, device=raw.device)
    values = raw[index].cpu().numpy()
    for place, position in enumerate(changed):
        row = rows[position]
        adjust(values[place], row.task.params, row.task.history, row.guessed, row.banned)
    return raw.index_copy(0, index, torch.from_numpy(values).to(raw.device))


def _accepted(part: SequenceSlice, tokens: Sequence[int]) -> int:
    """How many of `tokens` stand: up to and with the first that differs from its draft."""
    drafts = part.token_ids[len(part.token_ids) - part.drafts :]
    for index in range(part.drafts):
        if tokens[index] != drafts[index]:
            return index + 1
    return part.drafts + 1


def _result(task: SampleTask, raw: torch.Tensor, tokens: list[int]) -> SliceResult:
    """Tokens with what was asked for beside them, from the raw logits."""
    wanted = task.params.logprobs
    logprobs = (
        None if wanted is None else [_logprob(row, token, wanted) for row, token in zip(raw, tokens, strict=True)]
    )
    digests = None
    if task.digest:
        digests = [blake3(row.contiguous().cpu().numpy().astype("<f4").tobytes()).digest() for row in raw]
    return SliceResult(tokens, len(tokens) - 1, logprobs, digests=digests)


def _logprob(row: torch.Tensor, token: int, wanted: int) -> TokenLogprob:
    """Log softmax of one row: of the token, and the best `wanted`, ties by id."""
    values = torch.log_softmax(row, -1).cpu().numpy()
    top: list[tuple[int, float]] = []
    if wanted:
        wanted = min(wanted, values.size)
        edge = np.partition(values, values.size - wanted)[values.size - wanted]
        ids = np.flatnonzero(values >= edge)
        best, order = ranked(values[ids], ids)
        top = [(int(i), float(v)) for i, v in zip(order[:wanted], best[:wanted], strict=True)]
    return TokenLogprob(float(values[token]), top)
