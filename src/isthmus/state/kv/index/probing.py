"""Ordered linear probing on flat arrays, for many keys at once. Pure functions over arrays.

Amble, Knuth: "Ordered hash tables", The Computer Journal 17(2), 1974. A word is the complement of
fingerprint << 40 | location, and 0 an empty slot. Within a region words descend (fingerprints ascend), with empty slots
between them; no word lies before its home slot, which grows with its fingerprint, and between a word and its home there
is no empty slot. So a search ends at the first word that is not over the greatest one of its fingerprint, found or not,
and empty slots need no question of their own; laying out a sorted array is one running maximum; and nothing but a shift
of neighbours is needed to insert and to remove: there are no tombstones.

Callers keep the last `WINDOW` slots of every region empty: a search looks at that many at once.
"""

import numpy as np
from numpy.typing import NDArray

LOCATION_BITS = 40
LOCATIONS = (1 << LOCATION_BITS) - 2
"""Locations are less than this, so that no word is 0."""
PRINT_BITS = 24
WINDOW = 8
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Tags = NDArray[np.uint16]
_LOCATION_BITS = np.uint64(LOCATION_BITS)
_FIRST = np.arange(4, dtype=np.int64)[:, None]  # enough for most; more cost more than a second look
_NEXT = np.arange(WINDOW, dtype=np.int64)[:, None]


def home(prints: Ints, homes: Ints | int) -> Ints:
    """The home slots of fingerprints among `homes` of them: order is kept."""
    return (prints * homes) >> PRINT_BITS


def bounds(prints: Ints) -> Words:
    """The greatest word of each fingerprint: less a location, it is the word for that."""
    return ~(prints.view(np.uint64) << _LOCATION_BITS)


def prints_of(words: Words) -> Ints:
    """The fingerprints of words; of an empty slot the greatest one there is."""
    return (~words >> _LOCATION_BITS).view(np.int64)


def seek(words: Words, at: Ints, greatest: Words) -> None:
    """Move each of `at`, in place, to the first slot from it on that is empty or whose word is not over its greatest
    one: from a home on, where words of its fingerprint are, or would be.
    """
    steps = (words.take(at + _FIRST) > greatest).sum(axis=0)
    at += steps
    left = np.flatnonzero(steps == len(_FIRST))
    while left.size:
        steps = (words.take(at.take(left) + _NEXT) > greatest.take(left)).sum(axis=0)
        at[left] += steps
        left = left[steps == WINDOW]


def seek_empty(words: Words, at: Ints) -> None:
    """Move each of `at`, in place, to the first empty slot from it on."""
    left = np.arange(len(at))
    while left.size:
        empty = words.take(at.take(left) + _NEXT) == 0
        found = empty.any(axis=0)
        at[left] += np.where(found, empty.argmax(axis=0), WINDOW)
        left = left[~found]


def seek_run_end(words: Words, at: Ints, bases: Ints, homes: Ints) -> None:
    """Move each of `at`, in place, to the first slot from it on that is empty or whose word is at home; `bases` and
    `homes`: first slot and homes of the region it is in.
    """
    left = np.arange(len(at))
    while left.size:
        slots = at.take(left) + _NEXT
        found = words.take(slots)
        end = (found == 0) | (home(prints_of(found), homes.take(left)) + bases.take(left) == slots)
        ended = end.any(axis=0)
        at[left] += np.where(ended, end.argmax(axis=0), WINDOW)
        left = left[~ended]


def lay_out(prints: Ints, homes: int) -> Ints:
    """The slots of ascending fingerprints in an empty region: each at home, or right after the one before it."""
    order = np.arange(len(prints), dtype=np.int64)
    return order + np.maximum.accumulate(home(prints, homes) - order)


def shift_up(words: Words, tags: Tags, at: Ints, ends: Ints) -> None:
    """Move what lies in each [at, end) one slot on, over the empty slot `end`. The ranges do not meet."""
    slots = _ranges(at, ends)
    words[slots + 1], tags[slots + 1] = words.take(slots), tags.take(slots)


def shift_down(words: Words, tags: Tags, at: Ints, ends: Ints) -> None:
    """Move what lies in each [at + 1, end) one slot back, over `at`; end - 1 becomes empty. The ranges do not meet."""
    slots = _ranges(at + 1, ends)
    words[slots - 1], tags[slots - 1] = words.take(slots), tags.take(slots)
    words[ends - 1] = 0


def _ranges(starts: Ints, ends: Ints) -> Ints:
    """All numbers of [start, end), range after range."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def merge(old: Words, old_tags: Tags, new: Words, new_tags: Tags) -> tuple[Words, Tags]:
    """Two arrays of words, fingerprints ascending, as one, equal (word, tag) pairs once."""
    at = np.searchsorted(prints_of(old), prints_of(new)) + np.arange(len(new))
    kept = np.ones(len(old) + len(new), np.bool_)
    kept[at] = False
    words, tags = np.empty(len(kept), np.uint64), np.empty(len(kept), np.uint16)
    words[at], tags[at] = new, new_tags
    words[kept], tags[kept] = old, old_tags
    prints = prints_of(words)
    beside = np.flatnonzero(prints[1:] == prints[:-1])
    if not beside.size:
        return words, tags
    # Few words have a neighbour of the same fingerprint: only among those can there be equal pairs.
    few = np.union1d(beside, beside + 1)
    few = few[np.lexsort((tags[few], words[few]))]
    equal = (words[few[1:]] == words[few[:-1]]) & (tags[few[1:]] == tags[few[:-1]])
    stay = np.ones(len(words), np.bool_)
    stay[few[1:][equal]] = False
    return words[stay], tags[stay]


def locate(held: Words, held_tags: Tags, words: Words, tags: Tags) -> Ints:
    """Where in `held`, fingerprints ascending, each pair of `words` and `tags` is, or -1. No place twice."""
    if not len(held):
        return np.full(len(words), -1)
    order = np.argsort(~held, kind="stable")  # nearly ordered already
    ranked = ~held.take(order)
    first = np.minimum(np.searchsorted(ranked, ~words), len(held) - 1)
    places = order.take(first)
    same = held.take(places) == words
    right = same & (held_tags.take(places) == tags)
    found = np.where(right, places, -1)
    for index in np.flatnonzero(same & ~right).tolist():
        # The same word under several tags: two keys at one location.
        others = order[first[index] : np.searchsorted(ranked, ~words[index], "right")]
        mine = others[held_tags[others] == tags[index]]
        found[index] = mine[0] if mine.size else -1
    repeated = np.ones(len(found), np.bool_)
    repeated[np.unique(found, return_index=True)[1]] = False
    found[repeated] = -1
    return found
