"""What the default attention does in a step, prepared once for all layers of one window.

- Sequences with few queries (decode, drafts) are grouped by number of queries and padded: one gather of K and V and one
SDPA a group. Padding reads the zero row of the memory and is masked. Spans with many queries that begin with their
first own key are grouped when they have one length; the others go one by one.
- With a sliding window only the keys that some query of a span sees are read.
- With `merging`, where SDPA gives the log-sum-exp, keys that sequences share are read once for all of them (shared.py).
- With a `mirror`, sequences that decode are read from its copies rather than gathered (mirror.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from isthmus.execution.inference.attention.base import Span, packed_rows
from isthmus.execution.inference.attention.mirror import Mirror, Mirrored
from isthmus.execution.inference.attention.shared import Shared, find_shared
from isthmus.execution.inference.kv_memory import KvMemory

SHORT_QUERY = 8
GROUP_TOKENS = 1 << 17
"""Keys gathered at a time, a limit on scratch memory."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with the same number of queries, padded to the same number of keys."""

    sequences: int
    queries: int  # of each sequence
    rows: torch.Tensor | None  # [sequences * queries] packed rows; None for all rows of the step in order
    keys: Sequence[torch.Tensor]  # for each layer [2 * sequences * length]: rows of K, then of V
    mask: torch.Tensor | None = None  # [sequences, 1, queries, length], additive


@dataclass(frozen=True, slots=True)
class Prefill:
    """Sequences with the same number of queries, many, each behind equally many keys: `before` its first query."""

    sequences: int
    queries: int  # of each sequence
    before: int
    rows: torch.Tensor | None  # as in Group
    keys: Sequence[torch.Tensor]  # as in Group


@dataclass(frozen=True, slots=True)
class Plan:
    """Every row is in one of `mirrored`, `groups` and `prefills`. What `common` gives is merged with that."""

    mirrored: Sequence[Mirrored]
    groups: Sequence[Group]
    prefills: Sequence[Prefill]
    common: Sequence[Group]


@dataclass(frozen=True, slots=True)
class _Part:
    """A span, and the position of the first key that is to be read for it alone."""

    span: Span
    low: int

    @property
    def length(self) -> int:
        """Keys up to the last query's."""
        return self.span.end - self.low

    @property
    def before(self) -> int:
        """Keys ahead of the first query."""
        return self.span.start - self.low

    @property
    def few(self) -> bool:
        """Few queries: decode, drafts."""
        return self.span.count <= SHORT_QUERY


def make_plan(
    spans: Sequence[Span], memory: KvMemory, window: int, *, merging: bool, mirror: Mirror | None = None
) -> Plan:
    """The plan of a step for the layers of one window, 0 for none."""
    common: list[Group] = []
    total = sum(span.count for span in spans)
    low = [span.first_key(window) for span in spans]
    if merging and not window:
        shared, low = find_shared(spans)
        common = [_common(spans, part, total, memory) for part in shared]
    mirrored: list[Mirrored] = []
    taken: set[int] = set()
    if mirror is not None and not window:
        mirrored, taken = mirror.place(spans, low, total)
    parts = [_Part(spans[place], low[place]) for place in range(len(spans)) if place not in taken]
    groups = [_few(group, memory, window, total) for group in _split([part for part in parts if part.few])]
    many = [part for part in parts if not part.few]
    whole = [part for part in many if not part.before]
    prefills = [_prefill(group, memory, total) for group in _split(whole)]
    prefills += [_prefill([part], memory, total) for part in many if part.before]
    return Plan(mirrored, groups, prefills, common)


def _split(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Groups of equally many queries in which padding at most doubles the keys, and which fit the scratch limit."""
    groups: list[list[_Part]] = []
    length = 0
    for part in sorted(parts, key=lambda part: (part.span.count, -part.length)):
        fits = groups and part.span.count == groups[-1][0].span.count and 2 * part.length >= length
        if not fits or (len(groups[-1]) + 1) * length > GROUP_TOKENS:
            groups.append([])
            length = part.length
        groups[-1].append(part)
    return groups


def _both(rows: np.ndarray, memory: KvMemory) -> Sequence[torch.Tensor]:
    """For each layer rows of K, then of V, as an index on the device."""
    flat = rows.reshape(-1)
    both = torch.from_numpy(np.stack((flat, flat + memory.value_offset)))
    return memory.in_layers(both.to(memory.rows.device))


def _common(spans: Sequence[Span], part: Shared, total: int, memory: KvMemory) -> Group:
    those = [spans[member] for member in part.members]
    count = sum(span.count for span in those)
    keys = _both(those[0].rows[part.low : part.high], memory)
    return Group(1, count, packed_rows(those, total, memory.rows.device), keys)


def _rows(parts: Sequence[_Part], total: int, memory: KvMemory) -> torch.Tensor | None:
    return packed_rows([part.span for part in parts], total, memory.rows.device)


def _few(parts: Sequence[_Part], memory: KvMemory, window: int, total: int) -> Group:
    length, queries = max(part.length for part in parts), parts[0].span.count
    keys = np.full((len(parts), length), memory.zero_row, np.int64)
    for place, part in enumerate(parts):
        keys[place, : part.length] = part.span.rows[part.low :]
    # How far each key lies behind each query; padding lies ahead of all of them.
    at = np.array([part.span.start - part.low for part in parts])[:, None] + np.arange(queries)
    behind = at[:, :, None] - np.arange(length)
    hidden = (behind < 0) | (behind >= window) if window else behind < 0
    mask = None
    if hidden.any():
        bias = np.zeros(hidden.shape, np.float32)
        bias[hidden] = -np.inf
        mask = torch.from_numpy(bias).to(memory.rows.device, memory.rows.dtype)[:, None]
    return Group(len(parts), queries, _rows(parts, total, memory), _both(keys, memory), mask)


def _prefill(parts: Sequence[_Part], memory: KvMemory, total: int) -> Prefill:
    keys = np.stack([part.span.rows[part.low :] for part in parts])
    rows = _rows(parts, total, memory)
    return Prefill(len(parts), parts[0].span.count, parts[0].before, rows, _both(keys, memory))
