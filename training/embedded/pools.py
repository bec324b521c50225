"""Pools of tokenised samples, and the batches that are packed from them.

A batch depends on nothing but the seed and its number, so a run that was
stopped goes on exactly as if it had not been.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from training.embedded.world import MARK_CLOSE, MARK_OPEN

WEIGHT_UNIT = 16
DECISION = 3  # how much more a token weighs that chooses what to copy
_CHOOSES = re.compile(r'[{,] ?"|": "?| is ?')
DOCS = "docs"
Row = tuple[NDArray[np.uint16], NDArray[np.uint8]]
Batch = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


def parse_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks, and the spans of characters that were marked."""
    plain, spans, at = [], [], 0
    for number, part in enumerate(text.replace(MARK_CLOSE, MARK_OPEN).split(MARK_OPEN)):
        if number % 2:
            spans.append((at, at + len(part)))
        plain.append(part)
        at += len(part)
    return "".join(plain), spans


def weigh(
    offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]], inside: int, outside: int
) -> NDArray[np.uint8]:
    """A weight for each token: ``inside`` where its last character lies in a span."""
    weights = np.full(len(offsets), outside, np.uint8)
    ends = np.array([end for _, end in offsets])
    for start, stop in spans:
        weights[(ends > start) & (ends <= stop)] = inside
    return weights


def decisions(text: str, offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """The tokens at which an answer chooses what to copy; those that follow are copied with ease.

    They are the first of an answer, of a name or value in JSON, and of what a sentence says that something is.
    """
    begin = np.array([start for start, _ in offsets])
    found = set()
    for start, stop in spans:
        for at in (start, *(match.end() for match in _CHOOSES.finditer(text, start, stop))):
            token = int(np.searchsorted(begin, at, side="right")) - 1
            # A space may be a token of its own: what follows it is chosen.
            found.add(token + (token + 1 < len(begin) and text[begin[token] : begin[token + 1]] == " "))
    return sorted(at for at in found if begin[at] < len(text))


@dataclass(frozen=True)
class Pool:
    """Samples end to end: their tokens, the weight of each token, and where each sample starts."""

    tokens: NDArray[np.uint16]
    weights: NDArray[np.uint8]
    starts: NDArray[np.int64]

    def sample(self, index: int) -> Row:
        """One whole sample."""
        here, there = self.starts[index], self.starts[index + 1]
        return self.tokens[here:there], self.weights[here:there]

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.starts) - 1


def write_pool(
    folder: Path,
    name: str,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    weighing: tuple[int, int],
    most: int | None = None,
) -> int:
    """Tokenises marked texts into a pool; every sample ends with ``eos``. Returns the number of tokens.

    ``weighing`` is the weight of what is marked and of the rest. A sample of over ``most`` tokens is left out. The tag
    that opens a thought is never learned: the prompt writes it.
    """
    inside, outside = weighing
    eos, think = tokenizer.token_to_id("<|eos|>"), tokenizer.token_to_id("<think>")
    tokens: list[NDArray[np.uint16]] = []
    weights: list[NDArray[np.uint8]] = []
    parsed = [parse_marks(text) for text in texts]
    for at in range(0, len(parsed), 1000):
        chunk = parsed[at : at + 1000]
        for (text, spans), encoding in zip(chunk, tokenizer.encode_batch([t for t, _ in chunk]), strict=True):
            if most is not None and len(encoding.ids) >= most:
                continue
            offsets = [*encoding.offsets, (len(text), len(text))]
            weighed = weigh(offsets, spans, inside, outside)
            weighed[decisions(text, offsets, spans)] = min(255, inside * DECISION)
            weighed[-1] = 0 if text.endswith("<|end|>") else max(inside, outside) // 2
            ids = np.array([*encoding.ids, eos], np.uint16)
            weighed[ids == think] = 0
            tokens.append(ids)
            weights.append(weighed)
    starts = np.cumsum([0, *(len(t) for t in tokens)])
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.tokens.npy", np.concatenate(tokens))
    np.save(folder / f"{name}.weights.npy", np.concatenate(weights))
    np.save(folder / f"{name}.starts.npy", starts)
    return int(starts[-1])


def read_pool(folder: Path, name: str) -> Pool:
    """Maps a pool from disk."""
    parts = [np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "weights", "starts")]
    return Pool(*parts)


class Packer:
    """Packs samples of several pools into rows, keeping each kind's share of the tokens."""

    def __init__(self, pools: dict[str, list[Pool]], shares: dict[str, float], bos: int, seed: int) -> None:
        self._pools, self._shares, self._bos, self._seed = pools, shares, bos, seed

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """The inputs, targets and weights of one step."""
        rng = np.random.default_rng([self._seed, step])
        used = {kind: float(rng.random()) * share * 2 * length for kind, share in self._shares.items()}
        made = [self._row(rng, length + 1, used) for _ in range(rows)]
        tokens = np.stack([row[0] for row in made]).astype(np.int64)
        weights = np.stack([row[1] for row in made]).astype(np.float32) / np.float32(WEIGHT_UNIT)
        return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]

    def _row(self, rng: np.random.Generator, length: int, used: dict[str, float]) -> Row:
        tokens, weights = np.full(length, self._bos, np.uint16), np.zeros(length, np.uint8)
        at = 0
        while length - at > 8:
            room = length - at - 1
            total = sum(used.values())
            wanted = sorted(self._shares, key=lambda k: used[k] - self._shares[k] * total)
            kind, part = self._first_that_fits(rng, wanted, room)
            size = len(part[0])
            tokens[at + 1 : at + 1 + size], weights[at + 1 : at + 1 + size] = part
            used[kind] = used.get(kind, 0.0) + size
            at += size + 1
        return tokens, weights

    def _first_that_fits(self, rng: np.random.Generator, wanted: list[str], room: int) -> tuple[str, Row]:
        """A sample of the kind that is most wanted; of the next one if that has none so short. Documents always fit."""
        for kind in wanted:
            if kind == DOCS:
                break
            part = self._whole(rng, kind, room)
            if part is not None:
                return kind, part
        return DOCS, self._window(rng, room)

    def _whole(self, rng: np.random.Generator, kind: str, room: int) -> Row | None:
        """A sample that fits, or none after a few tries."""
        for _ in range(4):
            pool = self._pools[kind][int(rng.integers(len(self._pools[kind])))]
            part = pool.sample(int(rng.integers(pool.count)))
            if len(part[0]) <= room:
                return part
        return None

    def _window(self, rng: np.random.Generator, room: int) -> Row:
        """A stretch of one document."""
        pool = self._pools[DOCS][0]
        at = int(rng.integers(len(pool.tokens)))
        index = int(np.searchsorted(pool.starts, at, side="right")) - 1
        size = room if room < 96 else int(rng.integers(64, room + 1))
        if rng.random() < 0.15:
            at = int(pool.starts[index])
        stop = min(at + size, int(pool.starts[index + 1]))
        return pool.tokens[at:stop], pool.weights[at:stop]
