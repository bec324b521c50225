"""Bits that flip on the disk and in memory: a record whose bytes were hit is a miss, one whose bytes were not is what
it was, and nothing is ever read wrong.

A small log of a real file with sealed and open segments, erasures carried out and records of every class. Bits flip
while it is closed, in what describes (one at a time) and everywhere (many at a time); and while it is open, under every
record, one after the other; and in the arena.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from tests.support.lives import EXTENT, SEGMENT, Piece, covers, piece, read_pieces, settings_of
from tests.support.scale import seed, tally

from isthmus.contracts.blocks import Hint, HintKind, Reason, Tier
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.state.kv.log.format import (
    ENTRY_BYTES,
    EXTENT_HEADER,
    RECORD_HEADER,
    SECTOR,
    SLOT,
    SUPERBLOCKS,
    payload_offset,
    record_span,
)
from isthmus.state.kv.settings import StoreSettings
from isthmus.state.kv.store import Store, open_store

LIFE = 12
RECORDS = 120
GONE = 3
"""Whose session is forgotten."""


@dataclass(frozen=True)
class Place:
    """Bytes that something takes on the disk. `record`: the number of the one it belongs to, or -1."""

    what: str
    offset: int
    size: int
    record: int = -1


class Rot:
    """A log, its bytes, and what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        usual = settings_of(path, LIFE)
        assert usual.log is not None
        # So many that nothing has to leave.
        roomy = msgspec.structs.replace(usual.log, capacity=16384 + 24 * SEGMENT)
        self.settings: StoreSettings = msgspec.structs.replace(usual, log=roomy, arena_bytes=1 << 20)
        self.pieces: list[Piece] = [piece(LIFE, number) for number in range(RECORDS)]
        self.gone: set[int] = set()
        self.fill()
        self.image = path.read_bytes()
        with self.opened() as store:
            self.alive = {number for number, (reason, _) in enumerate(self.read(store)) if reason is Reason.HIT}
            self.places = self.find(store)
        assert len(self.alive) > RECORDS // 2
        assert not self.alive & self.gone

    def fill(self) -> None:
        forgotten = self.pieces[GONE].owner
        with self.opened(fresh=True) as store:
            for first in range(0, RECORDS, 6):
                store.write([one.put() for one in self.pieces[first : first + 6]], 5.0)
                store.flush(5.0)
            store.admin.forget(forgotten.namespace_id, forgotten.session_id)
            # Scrubbing writes sectors again that dead records share with others: it would mend what flips there.
            log = store._parts.log
            assert log is not None
            with log._changed:
                assert log._changed.wait_for(lambda: not log._ledger.erasures.pending, 20.0)
        scope = forgotten.namespace_id, forgotten.session_id
        self.gone = {number for number, one in enumerate(self.pieces) if covers(*scope, one.owner)}

    @contextmanager
    def opened(self, *, fresh: bool = False) -> Iterator[Store]:
        if fresh:
            self.path.unlink(missing_ok=True)
        store = open_store(self.settings, SystemClock(), SystemEntropy())
        try:
            yield store
        finally:
            store.close()

    @contextmanager
    def flipped(self, bits: list[int]) -> Iterator[Store]:
        """The log as it was made, with these bits flipped before it is opened."""
        data = bytearray(self.image)
        for bit in bits:
            data[bit >> 3] ^= 1 << (bit & 7)
        self.path.write_bytes(data)
        with self.opened() as store:
            yield store

    def read(self, store: Store, numbers: list[int] | None = None) -> list[tuple[Reason, Tier | None]]:
        """Read records; what is a hit is right, and was not forgotten."""
        wanted = list(range(RECORDS)) if numbers is None else numbers
        found = read_pieces(store, [self.pieces[number] for number in wanted])
        for number, (outcome, data) in zip(wanted, found, strict=True):
            if outcome.reason is Reason.HIT:
                assert data == self.pieces[number].payload, f"record {number} reads back wrong"
                assert number not in self.gone, f"record {number} was forgotten"
        return [(outcome.reason, outcome.tier) for outcome, _ in found]

    def hits(self, store: Store) -> set[int]:
        return {number for number, (reason, _) in enumerate(self.read(store)) if reason is Reason.HIT}

    def find(self, store: Store) -> list[Place]:
        """Where everything lies."""
        log = store._parts.log
        assert log is not None
        ledger = log._ledger
        geometry = ledger.geometry
        found = [Place("superblock", offset, 512) for offset in SUPERBLOCKS]
        found += [Place("erasures", geometry.erasure(copy), 64 + 56) for copy in (0, 1)]
        for segment in ledger.segments.all:
            start = geometry.start(segment.index)
            if not segment.records:
                continue
            found.append(Place("segment header", start, 512))
            if segment.footer:
                found.append(Place("directory", start + segment.footer, segment.records * ENTRY_BYTES))
                found.append(Place("trailer", start + segment.size - SECTOR, 512))
            for at in range(SECTOR, segment.end, SECTOR):
                if self.image[start + at : start + at + 8] == b"ISTHEXTN":
                    found.append(Place("extent header", start + at, EXTENT_HEADER))
        for number in self.alive:
            one = self.pieces[number]
            (where,) = log.locate([one.key])
            assert where is not None
            at, chunks = geometry.start(where.segment) + where.slot * SLOT, one.shape.chunks
            found.append(Place("record header", at, RECORD_HEADER + 16 * chunks, number))
            found.append(Place("payload", at + payload_offset(chunks), one.shape.record_bytes, number))
        return found


def most_in_an_extent(rot: Rot) -> int:
    smallest = min(record_span(one.shape.chunks, one.shape.chunk_bytes) for one in rot.pieces)
    return EXTENT // smallest


def one_at_a_time(rot: Rot, chance: random.Random, flips: int) -> Counter[str]:
    """One bit flips while the log is closed, in every kind of place."""
    told: Counter[str] = Counter()
    kinds = sorted({place.what for place in rot.places})
    for nth in range(flips):
        kind = kinds[nth % len(kinds)]
        place = chance.choice([one for one in rot.places if one.what == kind])
        bit = place.offset * 8 + chance.randrange(place.size * 8)
        with rot.flipped([bit]) as store:
            lost = rot.alive - rot.hits(store)
        if place.record >= 0:
            assert place.record in lost, f"{place}, bit {bit}: not detected"
            assert len(lost) <= most_in_an_extent(rot), f"{place}, bit {bit} cost {len(lost)} records"
            told["missed"] += bool(lost)
        elif place.what != "extent header":
            assert not lost, f"{place}, bit {bit} cost {len(lost)} records"
        told[kind] += 1
    return told


def many_at_a_time(rot: Rot, chance: random.Random, rounds: int, flips: int) -> Counter[str]:
    """Many bits flip while the log is closed; then it is used in every way."""
    told: Counter[str] = Counter()
    used = [place for place in rot.places if place.what in ("payload", "record header", "directory", "extent header")]
    for _ in range(rounds):
        places = chance.choices(used, [place.size for place in used], k=flips)
        bits = [place.offset * 8 + chance.randrange(place.size * 8) for place in places]
        with rot.flipped(bits) as store:
            what = chance.randrange(4)
            keys = [one.key for one in rot.pieces]
            if what == 0:
                store.admin.compact(2.0)
            elif what == 1:
                store.hint([Hint(HintKind.PREFETCH, keys)])
                assert store.settle(20.0)
            elif what == 2:
                store.admin.verify(20.0)
            hits = rot.hits(store)
            # Bits may flip back: a record is hit for sure when one place of its payload was hit once.
            for record in {place.record for place in places if place.what == "payload"}:
                own = [bit for bit, place in zip(bits, places, strict=True) if place.record == record]
                if len(set(own)) == len(own):
                    assert record not in hits, f"record {record} was damaged at {own} and is a hit"
            assert hits == rot.hits(store), "what is found stays found"
        told["flips"] += flips
        told["missed"] += len(rot.alive - hits)
    return told


def while_open(rot: Rot, chance: random.Random, flips: int) -> Counter[str]:
    """One bit after the other flips under an open store, each under a record that it could read until then."""
    told: Counter[str] = Counter()
    by_record = {number: [one for one in rot.places if one.record == number] for number in rot.alive}
    while told["flips"] < flips:
        rot.path.write_bytes(rot.image)
        with rot.opened() as store:
            descriptor = os.open(rot.path, os.O_RDWR)
            try:
                for number in chance.sample(sorted(rot.alive), len(rot.alive)):
                    place = chance.choice(by_record[number])
                    bit = place.offset * 8 + chance.randrange(place.size * 8)
                    (byte,) = os.pread(descriptor, 1, bit >> 3)
                    os.pwrite(descriptor, bytes([byte ^ 1 << (bit & 7)]), bit >> 3)
                    ((reason, _),) = rot.read(store, [number])
                    assert reason in (Reason.CORRUPT, Reason.ABSENT), f"record {number}, bit {bit}: {reason}"
                    told[reason.value] += 1
                    told["flips"] += 1
            finally:
                os.close(descriptor)
            assert not rot.hits(store)
    return told


def in_memory(rot: Rot, chance: random.Random, flips: int) -> Counter[str]:
    """One bit after the other flips in the arena: the log's copy is read instead, or none when that is hit as well."""
    told: Counter[str] = Counter()
    while told["flips"] < flips:
        rot.path.write_bytes(rot.image)
        with rot.opened() as store:
            store.hint([Hint(HintKind.PREFETCH, [rot.pieces[number].key for number in rot.alive])])
            assert store.settle(20.0)
            dram = store._parts.dram
            for number in sorted(rot.alive):
                (record,) = dram.where([rot.pieces[number].key])
                if record is None:
                    continue
                view = dram.arena.view(record)
                view[chance.randrange(len(view))] ^= 1 << chance.randrange(8)
                ((reason, tier),) = rot.read(store, [number])
                assert (reason, tier) == (Reason.HIT, Tier.NVME), f"record {number}: {reason} from {tier}"
                told["flips"] += 1
            dram.check()
    return told


@pytest.fixture(scope="module")
def rot(tmp_path_factory: pytest.TempPathFactory) -> Rot:
    return Rot(tmp_path_factory.mktemp("rot") / "log")


def test_one_bit_in_what_describes_costs_little_and_in_a_record_that_record(rot: Rot) -> None:
    told = one_at_a_time(rot, random.Random(1), 24)
    assert len(told) >= 8
    assert told["missed"]


def test_many_bits_anywhere_are_misses(rot: Rot) -> None:
    assert many_at_a_time(rot, random.Random(2), 16, 64)["missed"]


def test_bits_that_flip_under_an_open_store_are_misses(rot: Rot) -> None:
    told = while_open(rot, random.Random(3), 800)
    assert told["corrupt"]


def test_bits_that_flip_in_the_arena_are_read_from_the_log(rot: Rot) -> None:
    assert in_memory(rot, random.Random(4), 200)["flips"] >= 200


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_many_flips(rot: Rot) -> None:
    number = seed(1)
    one_at_a_time(rot, random.Random(number), 300)
    many = many_at_a_time(rot, random.Random(number), 100, 100)
    under = while_open(rot, random.Random(number), 8000)
    memory = in_memory(rot, random.Random(number), 2000)
    flips = 300 + many["flips"] + under["flips"] + memory["flips"]
    tally({"flips": flips, "single_flips_in_structures": 300, "flips_under_an_open_store": under["flips"]})
