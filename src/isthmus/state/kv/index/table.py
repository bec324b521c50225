"""The fingerprint table: from keys to locations in 12 to 16 bytes a key.

Promises

- no false negative: what was put and not removed is among its key's candidates. There are false positives: another key
with the same first 40 bits of hash (more in a table that expected many), one in 2**40 / len(table) finds; who reads
compares the whole key;
- at most 16 bytes a key in all (`memory_bytes`) from 10,000 keys and half of those expected on, also when keys are
removed again;
- a call with one key rebuilds at most two partitions of at most 65,536 slots each;
- a batch of keys is worked on together, whatever partitions they are in;
- without memory to grow, `put` and `add` raise `MemoryError`: of their keys some may be in, of others none is lost.

A slot has 10 bytes: 24 bits of hash and the location in a word, 16 more bits of hash beside it. Partitions grow, split,
shrink and join by themselves (partitions.py, directory.py); their slots are ordered (probing.py) and lie in two flat
arrays (slots.py). Keys that find no room in a partition that cannot split, which only keys made to collide do, are in
a dictionary. The table trusts keys to be spread like BLAKE3's: it takes their first 8 bytes for a hash.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.keys import KEY_BYTES
from isthmus.state.kv.index import probing
from isthmus.state.kv.index.partitions import FEW_KEYS, PRINT_MASK, SPARSE, TAG_MASK, Asked, Partitions
from isthmus.state.kv.index.probing import LOCATION_BITS, LOCATIONS, PRINT_BITS, Ints, Words

MAX_EXPECTED = 1 << 30
PARTITION_SLOTS = 65_536
_MIN_SLOTS = 2048
_HASH_BYTES = 8
_CHUNK = 16_384
_FEW = 32  # up to so many keys are found quicker one by one
_FEW_CHANGES = 64  # ... are put and removed quicker one by one
_LOCATION_MASK = (1 << LOCATION_BITS) - 1
_GREATEST = (1 << 64) - 1
_HASH = np.dtype("<u8")
_NO_LOCATION = np.uint64(LOCATIONS)


class FingerprintTable:
    """See the module. Locations are 0 to `LOCATIONS` - 1. For one thread at a time: its owner holds a lock.

    A key may have several locations. Keys of batches are arrays of (n, 32) bytes. `expected` keys cost fewer false
    positives than as many that come unexpected. `partition_slots` (a power of two, 2,048 to 65,536) is for tests:
    smaller partitions, so more of them.
    """

    __slots__ = ("_bits", "_directory", "_parts", "_shift", "_slots", "_spilled")

    def __init__(self, expected: int = 0, *, partition_slots: int = PARTITION_SLOTS) -> None:
        if not 0 <= expected <= MAX_EXPECTED:
            raise InvalidInput(f"expected is {expected}, accepted: 0 to {MAX_EXPECTED}", "expected")
        if not _MIN_SLOTS <= partition_slots <= PARTITION_SLOTS or partition_slots & (partition_slots - 1):
            raise InvalidInput(f"accepted: a power of two, {_MIN_SLOTS} to {PARTITION_SLOTS}", "partition_slots")
        self._parts = Partitions(partition_slots.bit_length() - 1, expected)
        self._directory = self._parts.directory
        self._slots = self._parts.slots
        self._spilled = self._parts.spilled
        self._shift = self._parts.shift
        self._bits = self._parts.bits

    def __len__(self) -> int:
        """How many pairs of key and location there are."""
        return len(self._parts)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the table takes, whole pages."""
        return self._parts.memory_bytes

    # One key.

    def get(self, key: bytes) -> int:
        """The first candidate's location, or -1."""
        return self._first(_hash(key))

    def candidates(self, key: bytes) -> list[int]:
        """All locations that may be the key's, for when the first one's record has another key."""
        hashed = _hash(key)
        found = []
        _, at, bound, tag = self._seek(hashed)
        words, tags = self._slots.word, self._slots.tag
        while (location := bound - words[at]) < LOCATIONS:
            if tags[at] == tag:
                found.append(location)
            at += 1
        return found + self._spilled.get(hashed >> self._shift, [])

    def add(self, key: bytes, location: int) -> None:
        """As `put` of one key."""
        if not 0 <= location < LOCATIONS:
            raise InvalidInput(f"location is {location}, accepted: 0 to {LOCATIONS - 1}", "location")
        self._add(_hash(key), location)

    def discard(self, key: bytes, location: int) -> bool:
        """As `remove` of one key."""
        return self._drop(_hash(key), location)

    # Batches.

    def find(self, keys: NDArray[np.uint8]) -> Ints:
        """The location of each key's first candidate, or -1."""
        hashes = _hashes(keys)
        if len(hashes) <= _FEW:
            return np.array([self._first(hashed) for hashed in hashes.tolist()], np.int64)
        found = np.empty(len(hashes), np.int64)
        for start in range(0, len(hashes), _CHUNK):
            found[start : start + _CHUNK] = self._find(hashes[start : start + _CHUNK])
        return found

    def put(self, keys: NDArray[np.uint8], locations: NDArray[np.uint64]) -> None:
        """Add a location for each key. A pair that is there already stays as it is; other locations of a key, too."""
        hashes, places = _hashes(keys), _places(locations, len(keys))
        if len(hashes) <= _FEW_CHANGES:
            for hashed, location in zip(hashes.tolist(), places.tolist(), strict=True):
                self._add(hashed, location)
            return
        asked = self._parts.ask(hashes)
        words = probing.bounds(asked.prints) - places
        crowd, rest = self._crowd(asked, coming=True)
        for part, which in crowd:
            self._parts.absorb(part, words.take(which), asked.tags.take(which))
        for which in rest:
            self._insert(asked.take(which), words.take(which))

    def remove(self, keys: NDArray[np.uint8], locations: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Remove pairs of key and location; which of them were there. A pair that is named twice was there once."""
        hashes, places = _hashes(keys), _places(locations, len(keys))
        if len(hashes) <= _FEW_CHANGES:
            pairs = zip(hashes.tolist(), places.tolist(), strict=True)
            return np.array([self._drop(hashed, location) for hashed, location in pairs], np.bool_)
        asked = self._parts.ask(hashes)
        words = probing.bounds(asked.prints) - places
        gone = np.zeros(len(hashes), np.bool_)
        crowd, rest = self._crowd(asked, coming=False)
        for part, which in crowd:
            gone[which] = self._parts.shed(part, words.take(which), asked.tags.take(which))
        for which in rest:
            gone[which] = self._remove(asked.take(which), words.take(which))
        if self._spilled:
            for index in np.flatnonzero(~gone).tolist():
                gone[index] = self._unspill(int(hashes[index]), int(places[index]))
        self._relax(asked)
        return gone

    def replace(self, keys: NDArray[np.uint8], old: NDArray[np.uint64], new: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Put `new` in the place of `old`, pair by pair; where `old` was there, `new` is there once afterwards."""
        hashes = _hashes(keys)
        before, after = _places(old, len(keys)), _places(new, len(keys))
        done = np.zeros(len(hashes), np.bool_)
        for start in range(0, len(hashes), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            done[chunk] = self._replace(hashes[chunk], before[chunk], after[chunk])
        return done

    # One hash.

    def _seek(self, hashed: int) -> tuple[int, int, int, int]:
        """The partition; the slot where words of the fingerprint are or would be; the greatest of those words; the tag.
        As long as that greatest one less the word at a slot is under `LOCATIONS`, it is a location.
        """
        directory, words = self._directory, self._slots.word
        part = directory.slot[hashed >> directory.shift]
        window = hashed >> self._shift
        fingerprint = window & PRINT_MASK
        bound = _GREATEST - (fingerprint << LOCATION_BITS)
        at = (part << self._bits) + (fingerprint * directory.home[part] >> PRINT_BITS)
        while words[at] > bound:
            at += 1
        return part, at, bound, window >> PRINT_BITS & TAG_MASK

    def _first(self, hashed: int) -> int:
        _, at, bound, tag = self._seek(hashed)
        words, tags = self._slots.word, self._slots.tag
        while (location := bound - words[at]) < LOCATIONS:
            if tags[at] == tag:
                return location
            at += 1
        if self._spilled:
            return self._spilled.get(hashed >> self._shift, (-1,))[0]
        return -1

    def _holds(self, hashed: int, location: int) -> bool:
        return self._exact(*self._seek(hashed)[1:], location) >= 0 or self._has_spilled(hashed, location)

    def _exact(self, at: int, bound: int, tag: int, location: int) -> int:
        """The slot of a pair, from where `_seek` ended; -1 when no slot holds it."""
        words, wanted = self._slots.word, bound - location
        while bound - (word := words[at]) < LOCATIONS:
            if word == wanted and self._slots.tag[at] == tag:
                return at
            at += 1
        return -1

    def _add(self, hashed: int, location: int) -> None:
        parts, directory = self._parts, self._directory
        part, at, bound, tag = self._seek(hashed)
        if self._exact(at, bound, tag, location) >= 0 or self._has_spilled(hashed, location):
            return
        if parts.full(part):
            parts.grow(part)
            part, at, bound, tag = self._seek(hashed)
        words, tags, end = self._slots.word, self._slots.tag, at
        while words[end]:
            end += 1
        if end & parts.mask > parts.last:
            self._spilled.setdefault(hashed >> self._shift, []).append(location)
            return
        if end > at:
            words[at + 1 : end + 1] = words[at:end]
            tags[at + 1 : end + 1] = tags[at:end]
        words[at] = bound - location
        tags[at] = tag
        directory.key[part] += 1
        top = (end & parts.mask) + 1
        directory.tip[part] = max(directory.tip[part], top)

    def _discard(self, hashed: int, location: int) -> bool:
        part, at, bound, tag = self._seek(hashed)
        at = self._exact(at, bound, tag, location)
        if at < 0:
            return self._unspill(hashed, location)
        directory, words, tags, end = self._directory, self._slots.word, self._slots.tag, at + 1
        homes, base = directory.home[part], part << self._bits
        while (word := words[end]) and base + ((_GREATEST - word >> LOCATION_BITS) * homes >> PRINT_BITS) < end:
            end += 1
        words[at : end - 1] = words[at + 1 : end]
        tags[at : end - 1] = tags[at + 1 : end]
        words[end - 1] = 0
        directory.key[part] -= 1
        return True

    def _drop(self, hashed: int, location: int) -> bool:
        gone = self._discard(hashed, location)
        directory = self._directory
        part = directory.slot[hashed >> directory.shift]
        if gone and directory.key[part] * 100 < directory.home[part] * SPARSE:
            self._parts.relax(hashed)
        return gone

    def _has_spilled(self, hashed: int, location: int) -> bool:
        return bool(self._spilled) and location in self._spilled.get(hashed >> self._shift, ())

    def _unspill(self, hashed: int, location: int) -> bool:
        name = hashed >> self._shift
        held = self._spilled.get(name, [])
        if location not in held:
            return False
        held.remove(location)
        if not held:
            del self._spilled[name]
        return True

    def _swap(self, hashed: int, old: int, new: int) -> bool:
        if old == new:
            return self._holds(hashed, old)
        if not self._discard(hashed, old):
            return False
        self._add(hashed, new)
        return True

    # Many hashes.

    def _find(self, hashes: Words) -> Ints:
        asked = self._parts.ask(hashes)
        bound = probing.bounds(asked.prints)
        at = self._parts.homes(asked)
        probing.seek(self._slots.words, at, bound)
        location = bound - self._slots.words.take(at)
        same = np.flatnonzero(location < _NO_LOCATION)
        right = self._slots.tags.take(at.take(same)) == asked.tags.take(same)
        found = np.full(len(hashes), -1, np.int64)
        hits = same[right]
        found[hits] = location.take(hits).view(np.int64)
        unsure = np.flatnonzero(found < 0) if self._spilled else same[~right]
        for index in unsure.tolist():
            found[index] = self._first(int(hashes[index]))
        return found

    def _crowd(self, asked: Asked, *, coming: bool) -> tuple[list[tuple[int, Ints]], list[Ints]]:
        """Those of a batch that are many for their partition, partition by partition, by fingerprint; and the others,
        in pieces that fit a cache.
        """
        crowded = self._parts.crowded(asked.parts, coming=coming)
        if not crowded.any():
            few = np.arange(len(asked.parts))
            return [], [few[start : start + _CHUNK] for start in range(0, len(few), _CHUNK)]
        of_many = crowded.take(asked.parts)
        many, few = np.flatnonzero(of_many), np.flatnonzero(~of_many)
        many = many.take(np.argsort(asked.parts.take(many) << PRINT_BITS | asked.prints.take(many)))
        parts = asked.parts.take(many)
        starts = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)]
        crowd = [(int(parts[start]), many[start:end]) for start, end in itertools.pairwise(starts)]
        return crowd, [few[start : start + _CHUNK] for start in range(0, len(few), _CHUNK)]

    def _insert(self, asked: Asked, new: Words) -> None:
        """Add words to partitions that have room for them. In each round those that move no common neighbour."""
        parts, directory, words, tags = self._parts, self._directory, self._slots.words, self._slots.tags
        left, single = np.arange(len(new)), list[int]()
        while left.size > _FEW_CHANGES:
            now = asked.take(left)
            at = parts.homes(now)
            bound = probing.bounds(now.prints)
            probing.seek(words, at, bound)
            ends = at.copy()
            probing.seek_empty(words, ends)
            # Another word with this fingerprint, perhaps the same pair; or a region filled to its end.
            odd = (bound - words.take(at) < _NO_LOCATION) | (ends & parts.mask > parts.last)
            single += left[odd].tolist()
            plain = np.flatnonzero(~odd)
            chosen = plain[np.unique(ends.take(plain), return_index=True)[1]]
            at, ends, which = at.take(chosen), ends.take(chosen), left.take(chosen)
            probing.shift_up(words, tags, at, ends)
            words[at], tags[at] = new.take(which), asked.tags.take(which)
            where = asked.parts.take(which)
            directory.keys[: directory.parts] += np.bincount(where, minlength=directory.parts)
            np.maximum.at(directory.top, where, (ends & parts.mask) + 1)
            odd[chosen] = True
            left = left[~odd]
        del words, tags  # what follows may move them
        for index in [*single, *left.tolist()]:
            self._add(int(asked.hashes[index]), int(~new[index]) & _LOCATION_MASK)

    def _remove(self, asked: Asked, wanted: Words) -> NDArray[np.bool_]:
        """As `_insert`, the other way."""
        parts, directory, words, tags = self._parts, self._directory, self._slots.words, self._slots.tags
        gone = np.zeros(len(wanted), np.bool_)
        left, single = np.arange(len(wanted)), list[int]()
        while left.size > _FEW_CHANGES:
            now = asked.take(left)
            at = parts.homes(now)
            bound = probing.bounds(now.prints)
            probing.seek(words, at, bound)
            found = words.take(at)
            hit = (found == wanted.take(left)) & (tags.take(at) == now.tags)
            single += left[(bound - found < _NO_LOCATION) & ~hit].tolist()
            hits = np.flatnonzero(hit)
            ends = at.take(hits) + 1
            where = now.parts.take(hits)
            probing.seek_run_end(words, ends, where << parts.bits, directory.homes.take(where))
            ends, first = np.unique(ends, return_index=True)
            chosen = hits[first]
            probing.shift_down(words, tags, at.take(chosen), ends)
            gone[left.take(chosen)] = True
            directory.keys[: directory.parts] -= np.bincount(where.take(first), minlength=directory.parts)
            hit[chosen] = False
            left = left[hit]
        for index in [*single, *left.tolist()]:
            gone[index] = self._discard(int(asked.hashes[index]), int(~wanted[index]) & _LOCATION_MASK)
        return gone

    def _relax(self, asked: Asked) -> None:
        directory = self._directory
        parts, first = np.unique(asked.parts, return_index=True)
        keys = directory.keys.take(parts)
        sparse = (keys * 100 < directory.homes.take(parts) * SPARSE) | (keys < FEW_KEYS)
        for hashed in asked.hashes[first[sparse]].tolist():
            self._parts.relax(hashed)

    def _replace(self, hashes: Words, old: Words, new: Words) -> NDArray[np.bool_]:
        words, tags = self._slots.words, self._slots.tags
        asked = self._parts.ask(hashes)
        at = self._parts.homes(asked)
        bound = probing.bounds(asked.prints)
        probing.seek(words, at, bound)
        hit = (words.take(at) == bound - old) & (tags.take(at) == asked.tags)
        # Alone with its fingerprint, and meant once: nothing else is the pair that comes, or what another one means.
        hit &= bound - words.take(at + 1) >= _NO_LOCATION
        _, back, times = np.unique(at, return_inverse=True, return_counts=True)
        hit &= (times.take(back) == 1) & (not self._spilled)
        done: NDArray[np.bool_] = hit.copy()
        words[at[hit]] = (bound - new)[hit]
        del words, tags  # what follows may move them
        for index in np.flatnonzero(~hit).tolist():
            done[index] = self._swap(int(hashes[index]), int(old[index]), int(new[index]))
        return done


def _hash(key: bytes) -> int:
    if len(key) != KEY_BYTES:
        raise InvalidInput(f"a key has {KEY_BYTES} bytes, not {len(key)}", "key")
    return int.from_bytes(key[:_HASH_BYTES], "little")


def _hashes(keys: NDArray[np.uint8]) -> Words:
    if keys.ndim != 2 or keys.shape[1] != KEY_BYTES or keys.dtype != np.uint8:
        raise InvalidInput(f"keys are an array of (n, {KEY_BYTES}) bytes, not {keys.shape} {keys.dtype}", "keys")
    if not keys.flags.c_contiguous:
        keys = np.ascontiguousarray(keys)
    return keys.view(_HASH)[:, 0].astype(np.uint64)


def _places(locations: NDArray[np.uint64], count: int) -> Words:
    places = np.asarray(locations, np.uint64)
    if places.shape != (count,) or (count and int(places.max()) >= LOCATIONS):
        raise InvalidInput(f"locations are {count} numbers of 0 to {LOCATIONS - 1}", "locations")
    return places
