"""A Hypothesis state machine for the fingerprint table, against a dictionary, with keys made to collide.

Promises: the candidates of a key are exactly the locations of all keys with the same 40 bits of hash, so there is never
a false negative, and no false positive but those; partitions are ordered and their figures right after every call.
Release figure (`make chaos`): 1,000 examples of 25 steps; `make test` runs fewer.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.scale import examples

from isthmus.state.kv.index import probing
from isthmus.state.kv.index.probing import LOCATIONS
from isthmus.state.kv.index.table import FingerprintTable

# A hash is 16 bits that partitions split by, 24 of fingerprint, 24 that are not looked at. Few values of each: keys
# share a partition, a home slot, a fingerprint, or all that is stored.
TAGS = st.sampled_from([0, 1, 0x4000, 0x8000, 0x8001, 0xFFFF])
PRINTS = st.sampled_from([0, 1, 2, 3, 0x2000, 0x7FFFFF, 0x800000, 0x800001, 0xFFFFFE, 0xFFFFFF])
HASHES = st.builds(lambda tag, fingerprint, low: tag << 48 | fingerprint << 24 | low, TAGS, PRINTS, st.integers(0, 1))
PLACES = st.sampled_from([0, 1, 2, 1 << 39, LOCATIONS - 1])
PAIRS = st.tuples(HASHES, PLACES)
# What a bulk of random hashes is cut to: nothing; one fingerprint each; one tag; everything but the tag's last bits.
CUTS = st.sampled_from([2**64 - 1] * 4 + [0xFFFF_000F_F000_0000, 0x0000_FFFF_FFFF_FFFF, 0x0003_FF00_0000_0000])


def key(hashed: int) -> bytes:
    return hashed.to_bytes(8, "little") + bytes(24)


def rows(hashes: Sequence[int]) -> np.ndarray:
    return np.frombuffer(b"".join(map(key, hashes)), np.uint8).reshape(-1, 32)


def places(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, np.uint64)


class TableMachine(RuleBasedStateMachine):
    """`model`: locations by what the table can tell apart, the first 40 bits of a hash and those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, set[int]] = {}
        self.bulks: list[tuple[list[int], list[int]]] = []
        self.seen: dict[int, None] = {}
        self.touched: list[int] = []
        self.turn = 0

    @initialize(expected=st.sampled_from([0, 0, 1500, 20_000]))
    def begin(self, expected: int) -> None:
        self.table = FingerprintTable(expected, partition_slots=2048)
        self.shift = self.table._shift

    def put_model(self, hashed: int, place: int) -> None:
        self.model.setdefault(hashed >> self.shift, set()).add(place)
        self.seen[hashed] = None
        self.touched.append(hashed)

    def remove_model(self, hashed: int, place: int) -> bool:
        self.touched.append(hashed)
        held = self.model.get(hashed >> self.shift, set())
        there = place in held
        held.discard(place)
        if not held:
            self.model.pop(hashed >> self.shift, None)
        return there

    @rule(pairs=st.lists(PAIRS, max_size=40), copies=st.integers(1, 4))
    def put(self, pairs: list[tuple[int, int]], copies: int) -> None:
        """`copies`: the same pairs again in the same batch; with enough of them the batch takes the way of many."""
        pairs = pairs * copies
        self.table.put(rows([h for h, _ in pairs]), places([p for _, p in pairs]))
        for hashed, place in pairs:
            self.put_model(hashed, place)

    @rule(hashed=HASHES, place=PLACES)
    def add(self, hashed: int, place: int) -> None:
        self.table.add(key(hashed), place)
        self.put_model(hashed, place)

    @rule(seed=st.integers(0, 1 << 20), count=st.sampled_from([100, 400, 1700, 1700]), cut=CUTS)
    def put_bulk(self, seed: int, count: int, cut: int) -> None:
        generator = np.random.default_rng(seed)
        hashes = (generator.integers(0, 2**64, count, np.uint64) & np.uint64(cut)).tolist()
        numbers = generator.integers(0, LOCATIONS, count).tolist()
        self.table.put(rows(hashes), places(numbers))
        for hashed, place in zip(hashes, numbers, strict=True):
            self.put_model(hashed, place)
        self.bulks.append((hashes, numbers))

    @rule(part=st.sampled_from([0.3, 0.9, 1.0]), again=st.booleans())
    def remove_bulk(self, part: float, again: bool) -> None:
        """`again`: each pair twice in one batch."""
        if not self.bulks:
            return
        hashes, numbers = self.bulks.pop(0)
        cut = int(len(hashes) * part)
        self.bulks += [(hashes[cut:], numbers[cut:])] if cut < len(hashes) else []
        hashes, numbers = hashes[:cut] * (1 + again), numbers[:cut] * (1 + again)
        gone = self.table.remove(rows(hashes), places(numbers))
        there = [self.remove_model(hashed, place) for hashed, place in zip(hashes, numbers, strict=True)]
        assert gone.sum() == sum(there)

    @rule()
    def remove_all_bulks(self) -> None:
        while self.bulks:
            self.remove_bulk(1.0, again=False)

    @rule(pairs=st.lists(PAIRS, max_size=100, unique=True))
    def remove(self, pairs: list[tuple[int, int]]) -> None:
        gone = self.table.remove(rows([h for h, _ in pairs]), places([p for _, p in pairs]))
        assert gone.sum() == sum(self.remove_model(hashed, place) for hashed, place in pairs)

    @rule(hashed=HASHES, place=PLACES)
    def discard(self, hashed: int, place: int) -> None:
        assert self.table.discard(key(hashed), place) == self.remove_model(hashed, place)

    @rule(moves=st.lists(st.tuples(HASHES, PLACES, PLACES), max_size=40))
    def replace(self, moves: list[tuple[int, int, int]]) -> None:
        hashes, old, new = ([move[column] for move in moves] for column in range(3))
        done = self.table.replace(rows(hashes), places(old), places(new))
        for was, (hashed, before, after) in zip(done.tolist(), moves, strict=True):
            assert was == self.remove_model(hashed, before), "as if one after the other"
            if was:
                self.put_model(hashed, after)

    @rule()
    def replace_bulk(self) -> None:
        if not self.bulks:
            return
        hashes, old = self.bulks.pop(0)
        new = [place ^ 1 if place ^ 1 < LOCATIONS else 0 for place in old]
        done = self.table.replace(rows(hashes), places(old), places(new)).tolist()
        for was, hashed, before, after in zip(done, hashes, old, new, strict=True):
            assert was == self.remove_model(hashed, before)
            if was:
                self.put_model(hashed, after)
        self.bulks.append((hashes, new))

    @invariant()
    def nothing_is_lost_or_made_up(self) -> None:
        assert len(self.table) == sum(map(len, self.model.values()))
        # All that the step touched, some of the others: every pair is looked at in the end.
        asked = [*self.touched, *itertools.islice(self.seen, self.turn % 7, None, 1 + len(self.seen) // 100)]
        self.touched.clear()
        self.turn += 1
        for hashed in asked[:: 1 + len(asked) // 100]:
            candidates = self.table.candidates(key(hashed))
            assert sorted(candidates) == sorted(self.model.get(hashed >> self.shift, ()))
            assert self.table.get(key(hashed)) == (candidates[0] if candidates else -1)
        for hashed, place in zip(asked, self.table.find(rows(asked)).tolist(), strict=True):
            held = self.model.get(hashed >> self.shift)
            assert place == -1 if held is None else place in held

    def teardown(self) -> None:
        self.touched = list(self.seen)
        if self.seen:
            self.nothing_is_lost_or_made_up()

    @invariant()
    def partitions_are_ordered(self) -> None:
        parts = self.table._parts
        directory, slots = parts.directory, parts.slots
        owned = np.unique(directory.table).tolist()
        assert owned == list(range(directory.parts)), "numbered without gaps"
        for part in owned:
            words = slots.words[part << parts.bits : (part + 1) << parts.bits]
            tags = slots.tags[part << parts.bits : (part + 1) << parts.bits]
            filled = np.flatnonzero(words)
            assert len(filled) == directory.keys[part]
            if not len(filled):
                continue
            assert filled[-1] < directory.top[part] <= parts.last + 1
            prints = probing.prints_of(words[filled])
            assert (prints[1:] >= prints[:-1]).all()
            away = filled - probing.home(prints, int(directory.homes[part]))
            assert (away >= 0).all()
            # Each word is at home or next to the one before it.
            assert (np.diff(filled)[away[1:] > 0] == 1).all()
            assert away[0] == 0
            prefix, level = directory.prefix(part)
            assert (tags[filled] >> (16 - (level - directory.base)) == prefix % (1 << (level - directory.base))).all()


TestFingerprintTable = TableMachine.TestCase
TestFingerprintTable.settings = settings(
    max_examples=examples(40, 1000), stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
