"""The partitions of the fingerprint table: what lies in each, and how they grow, split, shrink and join.

Promise: after every call every partition is ordered as probing.py says, within its load limits, and its figures in the
directory are right. One call rebuilds one partition, or the two that it becomes or comes from.
"""

import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.state.kv.index import probing
from isthmus.state.kv.index.directory import HASH_BITS, Directory
from isthmus.state.kv.index.probing import PRINT_BITS, WINDOW, Ints, Tags, Words
from isthmus.state.kv.index.slots import Slots, touched_bytes

TAG_BITS = 16
PRINT_MASK = (1 << PRINT_BITS) - 1
TAG_MASK = (1 << TAG_BITS) - 1
FULL, GROWN, SHRUNK, SPARSE = 85, 72, 78, 69
"""Load in percent: when to grow, to what; to what to shrink, when. 16 bytes a key are a load of 62.5."""
_MIN_HOMES = 512
_OVERFLOW = 256  # slots behind the last home: at a load of .85 a run over them is less likely than 2**-100
_JOINED = 50  # percent of a region that two partitions may fill when they become one
_CROWD = 12
FEW_KEYS = 8192  # fewer in a partition, and half-filled pages are more than a byte a key
_MAX_BASE = 16
_LOCATION_MASK = (1 << probing.LOCATION_BITS) - 1
_SPILLED_BYTES = 200
_FIXED_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Asked:
    """Keys of a batch: their hashes, and what follows from those."""

    hashes: Words
    parts: Ints
    prints: Ints
    tags: Tags

    def take(self, which: Ints) -> "Asked":
        """Some of them."""
        return Asked(self.hashes.take(which), self.parts.take(which), self.prints.take(which), self.tags.take(which))


class Partitions:
    """Partitions of `1 << bits` slots. `base` bits of a hash are not stored, the next 16 are the tag, by whose bits a
    partition splits, the next 24 the fingerprint. `spilled`: locations by the first 40 + `base` bits of the hash.
    """

    __slots__ = ("_most_homes", "_most_keys", "bits", "directory", "last", "mask", "shift", "slots", "spilled")

    def __init__(self, bits: int, expected: int) -> None:
        self.bits = bits
        self.mask = (1 << bits) - 1
        self.last = self.mask - WINDOW
        """The last slot of a region that may hold a word."""
        self._most_homes = (1 << bits) - _OVERFLOW
        self._most_keys = self._most_homes * FULL // 100
        base = min(_MAX_BASE, (expected * 100 // (self._most_homes * SHRUNK)).bit_length())
        self.shift = HASH_BITS - TAG_BITS - PRINT_BITS - base
        self.directory = Directory(base, base + TAG_BITS)
        self.directory.homes[:] = _MIN_HOMES
        self.slots = Slots(bits)
        self.slots.reserve(self.directory.parts)
        self.spilled: dict[int, list[int]] = {}

    def __len__(self) -> int:
        kept = int(self.directory.keys[: self.directory.parts].sum())
        return kept + sum(map(len, self.spilled.values())) if self.spilled else kept

    @property
    def memory_bytes(self) -> int:
        """Bytes of all memory that is in use: whole pages of slots, directory, dictionary."""
        spilled = sys.getsizeof(self.spilled) + _SPILLED_BYTES * len(self.spilled)
        slots = touched_bytes(self.directory.top[: self.directory.parts])
        return slots + self.directory.nbytes + spilled + _FIXED_BYTES

    def ask(self, hashes: Words) -> Asked:
        """What the hashes of keys say."""
        directory = self.directory
        parts = directory.table.take((hashes >> np.uint64(directory.shift)).view(np.int64))
        window = (hashes >> np.uint64(self.shift)).view(np.int64)
        return Asked(hashes, parts, window & PRINT_MASK, (window >> PRINT_BITS).astype(np.uint16))

    def homes(self, asked: Asked) -> Ints:
        """The slots at which the search for each begins."""
        return (asked.parts << self.bits) + probing.home(asked.prints, self.directory.homes.take(asked.parts))

    def crowded(self, parts: Ints, *, coming: bool) -> NDArray[np.bool_]:
        """For which of the partitions named, each as often as it has keys to add or to remove, a rebuild is the best
        way: because the keys that come would fill it, or because they are many for what it holds.
        """
        directory = self.directory
        change = np.bincount(parts, minlength=directory.parts)
        keys, homes = directory.keys[: directory.parts], directory.homes[: directory.parts]
        crowded: NDArray[np.bool_] = change * _CROWD > keys
        if coming:
            crowded |= (keys + change) * 100 > homes * FULL
        return np.logical_and(crowded, change > 0)

    def full(self, part: int) -> bool:
        """Whether one more key is too many, and something can be done about it."""
        directory = self.directory
        if (directory.key[part] + 1) * 100 <= directory.home[part] * FULL:
            return False
        return directory.home[part] < self._most_homes or directory.splits(part)

    def content(self, part: int) -> tuple[Words, Tags]:
        """Copies of the words of a partition, fingerprints ascending, and of their tags."""
        base = part << self.bits
        top = int(self.directory.top[part])
        words, tags = self.slots.words[base : base + top], self.slots.tags[base : base + top]
        filled = np.flatnonzero(words)
        return words.take(filled), tags.take(filled)

    def absorb(self, part: int, words: Words, tags: Tags) -> None:
        """Add words, fingerprints ascending, with their tags; those that are there already stay as they are.

        Raises `MemoryError`, and then nothing has changed.
        """
        if self.spilled:
            pairs = zip(self._names(part, words, tags), _locations(words), strict=True)
            new = [at for at, (name, place) in enumerate(pairs) if place not in self.spilled.get(name, ())]
            words, tags = words[new], tags[new]
        self._reserve(part, self.directory.key[part] + len(words))
        self._store(part, *probing.merge(*self.content(part), words, tags))

    def shed(self, part: int, words: Words, tags: Tags) -> NDArray[np.bool_]:
        """Remove words with their tags; which of them were there. Those in the dictionary stay."""
        held, held_tags = self.content(part)
        found = probing.locate(held, held_tags, words, tags)
        gone: NDArray[np.bool_] = found >= 0
        stay = np.ones(len(held), np.bool_)
        stay[found[gone]] = False
        self._store(part, held[stay], held_tags[stay])
        return gone

    def grow(self, part: int) -> None:
        """Make room for one more. Raises as `absorb`."""
        self._reserve(part, self.directory.key[part] + 1)
        self._store(part, *self.content(part), more=1)

    def relax(self, hashed: int) -> None:
        """Make the partition of a hash smaller, or one with its sibling, when it has become sparse."""
        directory = self.directory
        while True:
            part = directory.slot[hashed >> directory.shift]
            keys, homes = directory.key[part], directory.home[part]
            sparse = keys * 100 < homes * SPARSE
            if not sparse and keys >= FEW_KEYS:
                return
            sibling = directory.sibling(part)
            if sibling is not None and (keys + directory.key[sibling]) * 100 <= self._most_homes * _JOINED:
                self._join(*sorted((part, sibling)))
                continue
            if sparse and homes > _MIN_HOMES:
                self._store(part, *self.content(part))
            return

    def _join(self, part: int, sibling: int) -> None:
        """Two siblings, the one with the lower number first, become one."""
        directory, slots = self.directory, self.slots
        words, tags = probing.merge(*self.content(part), *self.content(sibling))
        slots.release(sibling, 0, int(directory.top[sibling]))
        last = directory.join(part, sibling)
        if last != sibling:
            top = int(directory.top[sibling])
            slots.copy(last, sibling, top)
            slots.release(last, 0, top)
        self._store(part, words, tags)

    def _reserve(self, part: int, count: int) -> None:
        """Memory for all splits that `count` keys could need: once a split has begun, nothing may stop it.

        At each level at most `count // _most_keys` partitions have more than `_most_keys`.
        """
        levels = self.directory.deepest - self.directory.prefix(part)[1]
        self.slots.reserve(self.directory.parts + levels * (count // self._most_keys))

    def _store(self, part: int, words: Words, tags: Tags, more: int = 0) -> None:
        """Let the partition hold exactly these, with room for `more`; split it when they are too many for one."""
        directory = self.directory
        count = len(words) + more
        if count > self._most_keys and directory.splits(part):
            upper = (tags >> (TAG_BITS - 1 - (directory.prefix(part)[1] - directory.base))) & 1 == 1
            new = directory.split(part)
            directory.home[new] = _MIN_HOMES
            self._store(new, words[upper], tags[upper], more)
            self._store(part, words[~upper], tags[~upper], more)
            return
        homes = directory.home[part]
        if count * 100 > homes * FULL:
            homes = min(self._most_homes, -(-count * 100 // GROWN))
        elif count * 100 < homes * SPARSE:
            homes = min(self._most_homes, max(_MIN_HOMES, -(-count * 100 // SHRUNK)))
        at = probing.lay_out(probing.prints_of(words), homes)
        fit = int(np.searchsorted(at, self.last, "right"))
        if fit < len(words):
            self._spill(part, words[fit:], tags[fit:])
            words, tags, at = words[:fit], tags[:fit], at[:fit]
        base, top = part << self.bits, directory.tip[part]
        extent = int(at[-1]) + 1 if fit else 0
        self.slots.words[base : base + min(top, extent)] = 0
        if top > extent:
            self.slots.release(part, extent, top)
        at += base
        self.slots.words[at] = words
        self.slots.tags[at] = tags
        directory.home[part], directory.key[part], directory.tip[part] = homes, len(words), extent

    def _spill(self, part: int, words: Words, tags: Tags) -> None:
        for name, place in zip(self._names(part, words, tags), _locations(words), strict=True):
            self.spilled.setdefault(name, []).append(place)

    def _names(self, part: int, words: Words, tags: Tags) -> list[int]:
        """The first 40 + base bits of the hashes of words of a partition."""
        prefix, level = self.directory.prefix(part)
        outer = prefix >> (level - self.directory.base) << (TAG_BITS + PRINT_BITS)
        inner = tags.astype(np.int64) << PRINT_BITS | probing.prints_of(words)
        return [outer | name for name in inner.tolist()]


def _locations(words: Words) -> list[int]:
    return [~word & _LOCATION_MASK for word in words.tolist()]
