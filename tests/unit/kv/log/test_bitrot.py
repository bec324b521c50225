"""One flipped bit anywhere on the disk: a miss at most, never a wrong byte, and never more lost than what it hit."""

import random

import pytest
from tests.support.logs import EXTENT, SEGMENT, World, key_of, opened, read, read_all, record
from tests.support.scale import examples
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Owner, Reason
from isthmus.contracts.errors import StoreError
from isthmus.state.kv.log.erasure import Scope
from isthmus.state.kv.log.format import RECORD_HEADER, SECTOR, SLOT, payload_offset
from isthmus.state.kv.log.ledger import location_of, segment_and_slot


def filled(seed: int = 0) -> World:
    """Sealed and unsealed segments, an erasure carried out, everything durable."""
    world = World(seed, segments=9)
    chance = random.Random(seed)
    gone = Owner(b"G" * 16)
    for number in range(60):
        owner = gone if number % 7 == 3 else None
        world.put(record(key_of(number), chance.choice((300, 2000, 5000)), chunks=chance.randint(1, 3), owner=owner))
    world.forget(Scope.of(b"G" * 16))
    world.run(2.0)
    world.settle()
    return world


def flipped(image: bytes, bit: int) -> bytes:
    data = bytearray(image)
    data[bit >> 3] ^= 1 << (bit & 7)
    return bytes(data)


def alive(world: World) -> list[bytes]:
    found = read_all(world.log, [kept.record for kept in world.kept.values()])
    return [key for key, (outcome, _) in found.items() if outcome.reason is Reason.HIT]


def test_every_bit_of_a_record_s_header_and_digests_counts() -> None:
    world = World()
    target = record(key_of(1), 500, chunks=2)
    world.put(record(key_of(0)), target, record(key_of(2)))
    world.settle()
    where = world.log.locate([target.key])[0]
    assert where is not None
    start = world.log._ledger.geometry.start(where.segment) + where.slot * SLOT
    for bit in range(payload_offset(2) * 8):
        used = bit < (RECORD_HEADER + 32) * 8
        world.disk.view[start + (bit >> 3)] ^= 1 << (bit & 7)
        outcome, _data = read(world.log, target)
        assert (outcome.reason is Reason.HIT) == (not used), f"bit {bit}: {outcome.reason}"
        world.disk.view[start + (bit >> 3)] ^= 1 << (bit & 7)
        # What was found damaged is not found again; put it back for the next bit.
        if used:
            assert world.log.locate([target.key]) == [None] or outcome.reason is Reason.ABSENT
            world.log._ledger.index.add(target.key, (where.segment << 24) | where.slot)
    assert read(world.log, target)[0].reason is Reason.HIT
    assert read(world.log, record(key_of(2)))[0].reason is Reason.HIT


def test_a_damaged_record_is_quarantined_and_counted() -> None:
    world = World()
    target = record(key_of(1))
    world.put(target, record(key_of(2)))
    world.settle()
    where = world.log.locate([target.key])[0]
    assert where is not None
    payload = world.log._ledger.geometry.start(where.segment) + where.slot * SLOT + payload_offset(1)
    world.disk.view[payload + 99] ^= 1
    assert read(world.log, target)[0].reason is Reason.CORRUPT
    assert world.log.locate([target.key]) == [None]
    stats = world.log.stats()
    assert (stats.counts["quarantined"], stats.counts["read_corrupt"], stats.records) == (1, 1, 1)
    assert read(world.log, record(key_of(2)))[0].reason is Reason.HIT


def copies(world: World, *times: int) -> list[int]:
    """Put a record, once for each of `times`, in which other records are put before it; where its copies lie."""
    for count in times:
        world.put(*(record(key_of(1000 * count + number)) for number in range(count)))
        world.put(record(key_of(1)))
        world.settle()
    return world.log._ledger.index.candidates(key_of(1))


def damage(world: World, at: int) -> None:
    """Change a byte of the payload of the record of one chunk at a location of the index."""
    index, slot = segment_and_slot(at)
    world.disk.view[world.log._ledger.geometry.start(index) + slot * SLOT + payload_offset(1) + 99] ^= 1


@pytest.mark.parametrize("damaged", [{0}, {1}, {0, 2}, {1, 2}])
def test_one_good_copy_is_enough(damaged: set[int]) -> None:
    world = World()
    places = copies(world, 1, 2, 3)
    assert len(places) == 3
    for number in damaged:
        damage(world, places[number])
    target = record(key_of(1))
    for _ in range(3):
        outcome, data = read(world.log, target)
        assert outcome.reason is Reason.HIT
        assert data == bytes(target.payload)
    # Those before the good one were met, and are not met again.
    met = len([number for number in damaged if number < min({0, 1, 2} - damaged)])
    stats = world.log.stats()
    assert stats.counts.get("quarantined", 0) == met
    assert stats.counts["read_hit"] == 3
    assert world.log._ledger.index.candidates(key_of(1)) == places[met:]
    world.log.check()


def test_with_no_good_copy_it_is_corrupt_once_and_then_a_miss() -> None:
    world = World()
    for at in copies(world, 1, 2):
        damage(world, at)
    assert read(world.log, record(key_of(1)))[0].reason is Reason.CORRUPT
    assert world.log.stats().counts["quarantined"] == 2
    assert world.log.locate([key_of(1)]) == [None]


def test_a_copy_that_cannot_be_read_costs_nothing_beside_one_that_can() -> None:
    world = World()
    places = copies(world, 1, 2)
    world.disk.fail("read", 1)
    assert read(world.log, record(key_of(1)))[0].reason is Reason.HIT
    assert world.disk.failed == [("read", world.disk.failed[0][1])]
    assert world.log._ledger.index.candidates(key_of(1)) == places
    world.disk.fail_always("read")
    assert read(world.log, record(key_of(1)))[0].reason is Reason.IO_ERROR
    world.disk.heal()
    assert read(world.log, record(key_of(1)))[0].reason is Reason.HIT


def test_a_forgotten_copy_that_is_still_found_does_not_hide_what_was_written_since() -> None:
    world = World()
    (old,) = copies(world, 1)
    world.forget(Scope.of_key(key_of(1)))
    (new,) = copies(world, 2)
    world.log._ledger.index.add(key_of(1), old)  # as where a directory could not be read
    assert world.log._ledger.index.candidates(key_of(1)) == [old, new]
    assert read(world.log, record(key_of(1)))[0].reason is Reason.HIT


def test_another_key_with_the_same_fingerprint_makes_no_damage_good() -> None:
    world = World()
    (at,) = copies(world, 1)
    other = world.log.locate([key_of(1000)])[0]
    assert other is not None
    world.log._ledger.index.add(key_of(1), location_of(other.segment, other.slot))
    damage(world, at)
    assert read(world.log, record(key_of(1)))[0].reason is Reason.CORRUPT
    assert read(world.log, record(key_of(1)))[0].reason is Reason.ABSENT


def test_a_record_of_another_shape_makes_no_damage_good() -> None:
    world = World()
    world.put(record(key_of(1), 500))
    damage(world, copies(world, 1)[0])  # the one that is looked at first
    assert read(world.log, record(key_of(1)))[0].reason is Reason.CORRUPT


@pytest.mark.parametrize("chunk", range(4))
def test_only_the_chunks_wanted_are_verified(chunk: int) -> None:
    world = World()
    target = record(key_of(1), 700, chunks=4)
    world.put(target)
    world.settle()
    where = world.log.locate([target.key])[0]
    assert where is not None
    payload = world.log._ledger.geometry.start(where.segment) + where.slot * SLOT + payload_offset(4)
    world.disk.view[payload + 700 * chunk + 350] ^= 4
    for first in range(4):
        for count in range(1, 5 - first):
            outcome, data = read(world.log, target, first, count)
            if first <= chunk < first + count:
                assert outcome.reason is Reason.CORRUPT
                world.log._ledger.index.add(target.key, (where.segment << 24) | where.slot)
            else:
                assert outcome.reason is Reason.HIT
                assert data == bytes(target.payload[700 * first : 700 * (first + count)])


def structures(world: World) -> list[tuple[str, int, int]]:
    """Where everything lies that is no record: name, offset, length."""
    ledger = world.log._ledger
    geometry = ledger.geometry
    found = [("superblock", 0, 512), ("superblock", SECTOR, 512)]
    found += [("erasures", geometry.erasure(copy), 200) for copy in (0, 1)]
    for segment in ledger.segments.all:
        start = geometry.start(segment.index)
        found.append(("header", start, 512))
        if segment.footer:
            found.append(("footer", start + segment.footer, SEGMENT - segment.footer - SECTOR + 512))
    return found


def test_one_flipped_bit_in_what_is_no_record_loses_nothing() -> None:
    world = filled()
    keys = alive(world)
    image = bytes(world.disk.view)
    chance = random.Random(5)
    names = set()
    for name, offset, length in structures(world):
        names.add(name)
        for _ in range(examples(3, 60)):
            bit = offset * 8 + chance.randrange(length * 8)
            log = opened(SimDisk(image=flipped(image, bit)), world.settings)
            found = read_all(log, [world.kept[key].record for key in keys])
            missing = [key.hex()[:8] for key, (outcome, _) in found.items() if outcome.reason is not Reason.HIT]
            assert not missing, f"{name}, bit {bit}: {missing}"
            gone = [kept.record for kept in world.kept.values() if kept.forgotten]
            assert all(outcome.reason is not Reason.HIT for outcome, _ in read_all(log, gone).values())
            log.close()
            # And again: what the first opening mended or sealed is right.
            again = opened(SimDisk(image=flipped(image, bit)), world.settings)
            assert {entry.key for entry in again.scan()} == set(keys)
            again.close()
    assert names == {"superblock", "erasures", "header", "footer"}


def test_a_random_bit_anywhere_is_a_miss_at_most() -> None:
    world = filled(1)
    keys = alive(world)
    image = bytes(world.disk.view)
    chance = random.Random(6)
    for _ in range(examples(60, 3000)):
        bit = chance.randrange(len(image) * 8)
        try:
            log = opened(SimDisk(image=flipped(image, bit)), world.settings)
        except StoreError:
            pytest.fail(f"bit {bit}: one bit keeps the log from opening")
        found = read_all(log, [kept.record for kept in world.kept.values()])
        hits = 0
        for key, (outcome, data) in found.items():
            if outcome.reason is Reason.HIT:
                hits += 1
                assert data == bytes(world.kept[key].record.payload)
                assert not world.kept[key].forgotten
        # At most the records of one extent.
        assert hits >= len(keys) - EXTENT // 576, f"bit {bit} cost {len(keys) - hits} records"
        log.close()
