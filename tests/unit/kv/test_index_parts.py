"""What the fingerprint table is made of: ordered probing, the directory of partitions, memory in regions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.index import probing
from isthmus.state.kv.index.directory import Directory
from isthmus.state.kv.index.slots import Slots, touched_bytes

HOMES, REGION = 64, 512
PRINTS = st.lists(st.integers(0, (1 << 24) - 1), max_size=150)
NARROW = st.lists(st.integers(0, 255).map(lambda number: number << 16), max_size=150)


def region(prints: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A region with words of these fingerprints, and their slots."""
    ordered = np.array(sorted(prints), np.int64)
    slots = probing.lay_out(ordered, HOMES)
    words = np.zeros(REGION, np.uint64)
    words[slots] = probing.bounds(ordered) - np.arange(len(ordered), dtype=np.uint64)
    return words, slots


@settings(max_examples=60, deadline=None)
@given(PRINTS | NARROW, PRINTS | NARROW)
def test_a_search_ends_where_the_fingerprint_is_or_would_be(prints: list[int], asked: list[int]) -> None:
    words, slots = region(prints)
    held = dict(zip(slots.tolist(), sorted(prints), strict=True))
    wanted = np.array(asked, np.int64)
    at = probing.home(wanted, HOMES)
    probing.seek(words, at, probing.bounds(wanted))
    for fingerprint, found in zip(asked, at.tolist(), strict=True):
        slot = fingerprint * HOMES >> 24
        while slot in held and held[slot] < fingerprint:
            slot += 1
        assert found == slot


@settings(max_examples=60, deadline=None)
@given(PRINTS | NARROW)
def test_ends_of_runs(prints: list[int]) -> None:
    words, slots = region(prints)
    held = dict(zip(slots.tolist(), sorted(prints), strict=True))
    starts = np.arange(HOMES, dtype=np.int64)
    empty, ends = starts.copy(), starts.copy()
    probing.seek_empty(words, empty)
    probing.seek_run_end(words, ends, np.zeros(HOMES, np.int64), np.full(HOMES, HOMES))
    for start in range(HOMES):
        slot = start
        while slot in held:
            slot += 1
        assert empty[start] == slot
        slot = start
        while slot in held and held[slot] * HOMES >> 24 != slot:
            slot += 1
        assert ends[start] == slot


def test_shifts_move_every_range_by_one() -> None:
    words = np.array([0, 9, 8, 7, 0, 0, 5, 4, 0, 3, 0, 0], np.uint64)
    tags = words.astype(np.uint16)
    probing.shift_up(words, tags, np.array([2, 6, 9]), np.array([4, 8, 9]))
    words[[2, 6]] = tags[[2, 6]] = 1
    assert words.tolist() == [0, 9, 1, 8, 7, 0, 1, 5, 4, 3, 0, 0]
    assert (tags[words > 0] == words[words > 0]).all()
    probing.shift_down(words, tags, np.array([2, 6]), np.array([5, 9]))
    assert words.tolist() == [0, 9, 8, 7, 0, 0, 5, 4, 0, 3, 0, 0]
    assert (tags[words > 0] == words[words > 0]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_merge_keeps_each_pair_once_and_locate_finds_them(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))
    old = sorted(data.draw(st.lists(pair, unique=True, max_size=30)), key=lambda item: item[0])
    new = sorted(data.draw(st.lists(pair, max_size=30)), key=lambda item: item[0])

    def arrays(pairs: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        prints = np.array([item[0] for item in pairs], np.int64)
        places = np.array([item[1] for item in pairs], np.uint64)
        return probing.bounds(prints) - places, np.array([item[2] for item in pairs], np.uint16)

    words, tags = probing.merge(*arrays(old), *arrays(new))
    prints = probing.prints_of(words)
    assert (np.diff(prints) >= 0).all()
    found = list(zip(prints.tolist(), (~words & np.uint64((1 << 40) - 1)).tolist(), tags.tolist(), strict=True))
    assert sorted(found) == sorted({*old, *new})
    asked = data.draw(st.lists(pair, max_size=30))
    where = probing.locate(words, tags, *arrays(asked)).tolist()
    assert len({at for at in where if at >= 0}) == len([at for at in where if at >= 0])
    for at, item in zip(where, asked, strict=True):
        assert found[at] == item if at >= 0 else (item not in found or asked.count(item) > 1)
    assert {found[at] for at in where if at >= 0} == set(asked) & set(found)


def test_partitions_split_to_their_limit_and_join_again() -> None:
    directory = Directory(1, 4)
    rng = np.random.default_rng(3)
    for _ in range(14):
        part = next(part for part in rng.permutation(directory.parts).tolist() if directory.splits(part))
        new = directory.split(part)
        directory.key[new] = 7
    assert directory.parts == 16
    assert not any(directory.splits(part) for part in range(16))
    owners = {hashed: directory.slot[hashed << 60 >> directory.shift] for hashed in range(16)}
    assert sorted(owners.values()) == list(range(16))
    while directory.parts > 2:
        part = next(p for p in rng.permutation(directory.parts).tolist() if directory.sibling(p) is not None)
        sibling = directory.sibling(part)
        assert sibling is not None
        directory.join(*sorted((part, sibling)))
        assert np.unique(directory.table).tolist() == list(range(directory.parts))
        for part in range(directory.parts):
            prefix, level = directory.prefix(part)
            spread = directory.depth - level
            assert (directory.table[prefix << spread : prefix + 1 << spread] == part).all()
    assert directory.depth == 1
    assert all(directory.sibling(part) is None for part in range(2))


def test_memory_is_zero_again_once_it_is_given_back() -> None:
    slots = Slots(11)
    slots.reserve(3)
    slots.words[:] = np.arange(len(slots.words))
    slots.tags[:] = 7
    slots.release(1, 10, 2000)
    assert not slots.words[2048 + 10 : 2048 + 2000].any()
    assert (slots.words[: 2048 + 10] == np.arange(2048 + 10)).all()
    assert slots.words[4096] == 4096
    slots.reserve(40)
    assert slots.regions >= 40
    assert slots.words[2048 + 9] == slots.word[2048 + 9] == 2048 + 9
    assert slots.tag[4096] == 7
    slots.copy(0, 20, 2048)
    assert (slots.words[20 * 2048 : 21 * 2048] == np.arange(2048)).all()
    assert touched_bytes(np.array([0, 1, 512, 513])) == 4096 * (0 + 2 + 2 + 3)
    with pytest.raises(InvalidInput, match="pages"):
        Slots(9)
