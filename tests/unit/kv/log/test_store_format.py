"""A second reader of the format, written from docs/store-format.md alone: struct, zlib and xxhash, nothing of ours.

It must read what the log wrote: sealed, unsealed, with erasures, after crashes.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import xxhash
from tests.support.logs import World, record, workload

from isthmus.contracts.blocks import Lifetime, Owner, Reason
from isthmus.state.kv.log.erasure import Scope

SECTOR = 4096


@dataclass
class Found:
    """A record that the second reader found."""

    key: bytes
    namespace: bytes
    session: bytes
    parent: bytes | None
    sequence: int
    lifetime: int
    chunks: list[bytes]


class SecondReader:
    """Reads a disk image."""

    def __init__(self, disk: bytes) -> None:
        self.disk = disk
        blocks = [self.superblock(disk[at : at + 512]) for at in (0, SECTOR)]
        uuid, self.segment_bytes, self.segments, self.data, self.erasure_bytes = max(b for b in blocks if b)[1:]
        self.uuid = uuid
        self.seed = zlib.crc32(uuid)
        tables = [self.erasures(8192), self.erasures(8192 + self.erasure_bytes)]
        self.dead_scopes = max((table for table in tables if table), key=lambda table: table[0])[1]

    def crc_good(self, data: bytes, at: int, seed: int) -> bool:
        return struct.unpack_from("<I", data, at)[0] == zlib.crc32(data[:at], seed)

    def superblock(self, data: bytes) -> tuple[int, bytes, int, int, int, int] | None:
        if data[:8] != b"ISTHSTOR" or not self.crc_good(data, 508, 0):
            return None
        lowest, seq = struct.unpack_from("<IQ", data, 12)
        assert lowest <= 1
        uuid = data[24:40]
        segment_bytes, segments, _, data_at, _, erasure_bytes = struct.unpack_from("<QIIQQQ", data, 40)
        return seq, uuid, segment_bytes, segments, data_at, erasure_bytes

    def erasures(self, at: int) -> tuple[int, list[tuple[int, bytes, int]]] | None:
        table = self.disk[at : at + self.erasure_bytes]
        version, count, seq = struct.unpack_from("<IIQ", table, 8)
        entries = table[64 : 64 + 56 * count]
        crc = zlib.crc32(entries, zlib.crc32(table[:60], self.seed))
        if table[:8] != b"ISTHERAS" or version != 1 or struct.unpack_from("<I", table, 60)[0] != crc:
            return None
        found = []
        for number in range(count):
            entry = entries[number * 56 : (number + 1) * 56]
            found.append((entry[0], entry[8:40], struct.unpack_from("<Q", entry, 40)[0]))
        return seq, found

    def is_dead(self, key: bytes, namespace: bytes, session: bytes, stamp: int) -> bool:
        names = {1: namespace + bytes(16), 2: namespace + session, 3: key}
        return any(names[kind] == scope and stamp < epoch for kind, scope, epoch in self.dead_scopes)

    def records(self) -> Iterator[Found]:
        for number in range(self.segments):
            start = self.data + number * self.segment_bytes
            segment = self.disk[start : start + self.segment_bytes]
            header = segment[:512]
            generation = 0
            if header[:8] == b"ISTHSEGM" and self.crc_good(header, 508, self.seed) and header[24:40] == self.uuid:
                index, generation = struct.unpack_from("<IQ", header, 12)
                assert index == number
            slots = self.sealed(segment, number, generation)
            if slots is None and generation:
                slots = list(self.scan(segment, generation))
            for slot in slots or []:
                found = self.record(segment, slot * 64, generation)
                if found is not None:
                    yield found

    def sealed(self, segment: bytes, number: int, generation: int) -> list[int] | None:
        trailer = segment[-SECTOR:][:512]
        if trailer[:8] != b"ISTHFOOT" or not self.crc_good(trailer, 508, self.seed):
            return None
        index, made, count, at, _, _ = struct.unpack_from("<IQQQQQ", trailer, 12)
        directory = segment[at : at + 96 * count]
        if index != number or made != generation or xxhash.xxh3_128_digest(directory) != trailer[56:72]:
            return None
        entries = [directory[one * 96 : (one + 1) * 96] for one in range(count)]
        assert [entry[:32] for entry in entries] == sorted(entry[:32] for entry in entries)
        return [struct.unpack_from("<I", entry, 80)[0] for entry in entries]

    def scan(self, segment: bytes, generation: int) -> Iterator[int]:
        at = expected = 4096
        expected = 0
        while at < len(segment):
            head = segment[at : at + 64]
            made, _, ordinal, records, size = struct.unpack_from("<QQIIQ", head, 8)
            fits = head[:8] == b"ISTHEXTN" and self.crc_good(head, 60, self.seed) and made == generation
            if not fits or ordinal < expected or at + size > len(segment):
                at += SECTOR
                continue
            inside, left = at + 64, records
            while left > 0:
                hole = segment[inside : inside + 64]
                if struct.unpack_from("<I", hole)[0] == 0x454C4F48 and self.crc_good(hole, 60, self.seed):
                    moved, stands_for = struct.unpack_from("<QI", hole, 16)
                    inside, left = inside + moved, left - stands_for
                    continue
                span = self.span(segment, inside, generation)
                if not span:
                    break
                yield inside // 64
                inside, left = inside + span, left - 1
            expected = ordinal + 1
            at += size

    def span(self, segment: bytes, at: int, generation: int) -> int:
        head = segment[at : at + 160]
        if len(head) < 160 or not self.crc_good(head, 156, self.seed):
            return 0
        if struct.unpack_from("<I", head)[0] != 0x44524352 or struct.unpack_from("<Q", head, 16)[0] != generation:
            return 0
        chunks, chunk_bytes = struct.unpack_from("<II", head, 40)
        return up(160 + 16 * chunks) + up(chunks * chunk_bytes)

    def record(self, segment: bytes, at: int, generation: int) -> Found | None:
        if not self.span(segment, at, generation):
            return None
        head = segment[at : at + 160]
        lifetime, flags = head[8], head[9]
        sequence, stamp, chunks, chunk_bytes = struct.unpack_from("<QQII", head, 24)
        key, namespace, session, parent = head[48:80], head[80:96], head[96:112], head[112:144]
        digests = segment[at + 160 : at + 160 + 16 * chunks]
        if zlib.crc32(digests) != struct.unpack_from("<I", head, 152)[0]:
            return None
        begin = at + up(160 + 16 * chunks)
        payload = [segment[begin + one * chunk_bytes : begin + (one + 1) * chunk_bytes] for one in range(chunks)]
        if b"".join(xxhash.xxh3_128_digest(chunk) for chunk in payload) != digests:
            return None
        if self.is_dead(key, namespace, session, stamp):
            return None
        return Found(key, namespace, session, parent if flags & 1 else None, sequence, lifetime, payload)


def up(size: int) -> int:
    return (size + 63) // 64 * 64


def test_a_second_reader_finds_a_record_in_every_detail() -> None:
    world = World()
    owner = Owner(b"N" * 16, b"S" * 16)
    one = record(b"k" * 32, 1000, chunks=3, owner=owner, parent=b"p" * 32, lifetime=Lifetime.SHARED)
    two = record(b"l" * 32, 77, owner=owner, lifetime=Lifetime.SHORT)
    world.put(one, two)
    world.settle()
    found = {each.key: each for each in SecondReader(bytes(world.disk.durable)).records()}
    first = found[b"k" * 32]
    data = bytes(one.payload)
    assert first.chunks == [data[:1000], data[1000:2000], data[2000:]]
    assert (first.namespace, first.session, first.parent) == (b"N" * 16, b"S" * 16, b"p" * 32)
    assert (first.sequence, first.lifetime) == (1, 2)
    assert found[b"l" * 32].parent is None
    assert found[b"l" * 32].chunks == [bytes(two.payload)]


@pytest.mark.parametrize("seed", range(4))
def test_a_second_reader_finds_what_the_log_finds(seed: int) -> None:
    """Sealed and unsealed segments, several generations, holes: the same records either way."""
    world = World(seed, segments=9)
    workload(world, seed, 80)
    world.forget(Scope.of(b"A" * 16, b"a" * 16))
    world.settle()
    for image in (bytes(world.disk.durable), world.disk.image(seed)):
        log = world.reopened(image)
        expected = {entry.key: entry for entry in log.scan()}
        found = {each.key: each for each in SecondReader(image).records()}
        assert found.keys() == expected.keys()
        assert len(found) > 10
        for key, each in found.items():
            assert b"".join(each.chunks) == bytes(world.kept[key].record.payload)
            assert each.namespace == expected[key].owner.namespace_id
        outcome = world.put(record(b"z" * 32))[0]
        assert outcome.reason is Reason.STORED
