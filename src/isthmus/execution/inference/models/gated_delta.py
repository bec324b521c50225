"""The gated delta rule (Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks") over a step of many sequences.

With k and q of length one, decay a = exp(g) and rate b, each head's state S [key_dim, value_dim] changes as

    d_t = b_t (v_t - a_t S_(t-1)' k_t)      S_t = a_t S_(t-1) + k_t d_t'      o_t = S_t' q_t

Runs (delta_plan.py) do this one position after the other, all sequences of the step in lockstep. In a cell, with G the
running sum of g and S the state before it, all d at once solve a unit triangular system:

    (I + L) D = b (V - exp(G) K S),   L_ts = b_t exp(G_t - G_s) k_t.k_s  for s < t
    O = exp(G) Q S + tril(exp(G_t - G_s) q_t.k_s) D,   S' = exp(G_last) S + (exp(G_last - G) K)' D

State and all of this are float32 in every mode.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from isthmus.execution.inference.models.delta_plan import GRID_TOKENS, Cells, DeltaPlan, Runs, Window, Writes
from isthmus.execution.inference.state_memory import StateMemory

Pointwise = Callable[[torch.Tensor], torch.Tensor]
Advance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""One position of some sequences: (state, keys and queries [n, heads, 2, key_dim], decay, b * decay [n, heads, 1],
b * v [n, heads, value_dim]). Changes the state; gives [n, heads, 2, value_dim]: d, and S_(t-1)' q."""


@dataclass(frozen=True, slots=True)
class DeltaKernels:
    """How the parts are computed. `cells`: whole cells by the chunked form. `transposed`: what `advance` is given are
    states [value_dim, key_dim]. `pointwise` applies an elementwise function; `unit` scales vectors to length one.
    """

    cells: bool
    transposed: bool
    advance: Advance
    pointwise: Callable[[Pointwise, torch.Tensor], torch.Tensor]
    unit: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """Of the real rows of a step: `query` (scaled) and `key` [rows, key_heads, key_dim], of length one; `value`
    [rows, heads, value_dim]; `decay` (g, a logarithm) and `rate` [rows, heads]. All float32.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    rate: torch.Tensor

    def at(self, rows: torch.Tensor) -> "DeltaInputs":
        """Those of some rows."""
        fields = (self.query, self.key, self.value, self.decay, self.rate)
        return DeltaInputs(*(field.index_select(0, rows) for field in fields))


def convolve(
    rows: torch.Tensor, weight: torch.Tensor, plan: DeltaPlan, memory: StateMemory, layer: int
) -> torch.Tensor:
    """The causal convolution of each channel: `rows` [real rows, channels] float32, `weight` [history + 1, channels].

    Keeps the inputs that the plan wants kept. Products and sums in a fixed order, each rounded once.
    """
    channels = rows.shape[1]
    before = memory.conv(layer).index_select(0, plan.sources).transpose(1, 2).reshape(-1, channels)
    joined = torch.cat((before, rows))
    out = joined.index_select(0, plan.taps[0]).mul_(weight[0])
    for tap in range(1, weight.shape[0]):
        out.add_(joined.index_select(0, plan.taps[tap]).mul_(weight[tap]))
    if plan.kept_slots.numel():
        kept = joined.index_select(0, plan.kept.view(-1)).view(*plan.kept.shape, channels)
        memory.conv(layer).index_copy_(0, plan.kept_slots, kept.transpose(1, 2))
    return out


def scan(inputs: DeltaInputs, kernels: DeltaKernels, plan: DeltaPlan, memory: StateMemory, layer: int) -> torch.Tensor:
    """The rule over a step: [rows, heads, value_dim]. All sources are read before any state is kept."""
    work = _Scan(inputs, kernels, memory.recurrent(layer), plan.sources)
    for window in plan.windows:
        cells = _Cells(inputs, window) if window.cell_rows.numel() else None
        for ready, runs in window.rounds:
            if ready is not None and cells is not None:
                work.apply(ready, cells)
            if runs is not None:
                work.run(runs)
        if cells is not None:
            work.out.index_copy_(0, window.cell_rows, cells.result)
    return work.out


class _Scan:
    """The states of all sequences while a step goes on, and its output."""

    def __init__(self, inputs: DeltaInputs, kernels: DeltaKernels, place: torch.Tensor, sources: torch.Tensor) -> None:
        self._inputs, self._kernels, self._place = inputs, kernels, place
        state = place.index_select(0, sources)
        self._state = state.transpose(-1, -2).contiguous() if kernels.transposed else state
        self.out = torch.empty_like(inputs.value)

    def apply(self, now: Cells, cells: "_Cells") -> None:
        """The cells of a round."""
        after = cells.apply(now.window, self._state.index_select(0, now.sequences))
        self._state.index_copy_(0, now.sequences, after)
        self._keep(after, now.writes)

    def run(self, runs: Runs) -> None:
        """The runs of a round, one position after the other."""
        kernels, part = self._kernels, self._inputs if runs.every else self._inputs.at(runs.rows)
        shared = part.value.shape[1] // part.key.shape[1]
        pair = torch.stack((part.key, part.query), -2).repeat_interleave(shared, 1)
        match = (part.key * part.query).sum(-1, keepdim=True).repeat_interleave(shared, 1)
        decay = kernels.pointwise(torch.exp, part.decay)[..., None]
        rate = part.rate[..., None]
        scaled, value = rate * decay, rate * part.value
        state = self._state if runs.whole else self._state.index_select(0, runs.sequences)
        found = []
        low = 0
        for step, count in enumerate(runs.active):
            now = slice(low, low + count)
            found.append(kernels.advance(state[:count], pair[now], decay[now], scaled[now], value[now]))
            self._keep(state, runs.writes.get(step))
            low += count
        change, read = (torch.cat(found) if len(found) > 1 else found[0]).unbind(-2)
        # o = S_t' q = a S_(t-1)' q + (k.q) d
        mixed = (read * decay).add_(match * change)
        if runs.every:
            self.out.copy_(mixed)
        else:
            self.out.index_copy_(0, runs.rows, mixed)
        if not runs.whole:
            self._state.index_copy_(0, runs.sequences, state)

    def _keep(self, batch: torch.Tensor, writes: Writes | None) -> None:
        if writes is not None:
            kept = batch.index_select(0, writes.places)
            self._place.index_copy_(0, writes.slots, kept.transpose(-1, -2) if self._kernels.transposed else kept)


def advance(
    state: torch.Tensor, pair: torch.Tensor, decay: torch.Tensor, scaled: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """See `Advance`; states [n, heads, key_dim, value_dim]. Reads the state once and writes it once."""
    found = torch.matmul(pair, state)
    change = found[..., 0, :]
    torch.addcmul(value, scaled, change, value=-1, out=change)
    state.mul_(decay[..., None]).addcmul_(pair[..., 0, :, None], change[..., None, :])
    return found


class _Cells:
    """All cells of a window: what needs no state at once, then `apply` in the order of the rounds."""

    def __init__(self, inputs: DeltaInputs, window: Window) -> None:
        part = inputs.at(window.cell_rows)
        heads, key_heads = part.value.shape[1], part.key.shape[1]
        groups = (key_heads, heads // key_heads)

        def split(values: torch.Tensor) -> torch.Tensor:
            """By cell and head: [cells, heads or key_heads, GRID_TOKENS, ...]."""
            return values.view(-1, GRID_TOKENS, *values.shape[1:]).transpose(1, 2)

        key, query = split(part.key).contiguous(), split(part.query).contiguous()
        total = split(part.decay).cumsum(-1)  # [cells, heads, GRID_TOKENS]
        rate, value = split(part.rate)[..., None], split(part.value)
        gap = total[..., :, None] - total[..., None, :]
        ahead = torch.ones(GRID_TOKENS, GRID_TOKENS, dtype=torch.bool, device=total.device).triu(1)
        fade = gap.masked_fill_(ahead, -torch.inf).exp_()
        self._attend = self._grouped(query @ key.transpose(-1, -2), groups) * fade
        system = (self._grouped(key @ key.transpose(-1, -2), groups) * fade).mul_(rate)
        since = total.exp()[..., None]
        wide = self._grouped(key, groups)
        right = torch.cat((value * rate, wide * (rate * since)), -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        self._fresh, self._known = solved.split((value.shape[-1], key.shape[-1]), -1)
        self._query = self._grouped(query, groups) * since
        self._rest = (wide * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2)
        self._decay = since[..., -1:, :]
        self._out = torch.empty_like(value)

    @staticmethod
    def _grouped(values: torch.Tensor, groups: tuple[int, int]) -> torch.Tensor:
        """From key heads to heads."""
        return values if groups[1] == 1 else values.repeat_interleave(groups[1], 1)

    @property
    def result(self) -> torch.Tensor:
        """[cells * GRID_TOKENS, heads, value_dim], when all were applied."""
        return self._out.transpose(1, 2).flatten(0, 1)

    def apply(self, cells: slice, state: torch.Tensor) -> torch.Tensor:
        """The states [n, heads, key_dim, value_dim] after these cells of n sequences."""
        change = self._fresh[cells] - self._known[cells] @ state
        self._out[cells] = self._query[cells] @ state + self._attend[cells] @ change
        after: torch.Tensor = state * self._decay[cells] + self._rest[cells] @ change
        return after


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors over the last dimension divided by their length, with 1e-6 beneath the root."""
    return vectors * (vectors.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


DEFAULT_DELTA = DeltaKernels(True, False, advance, lambda function, values: function(values), unit)
"""The fastest kernels in plain PyTorch."""
