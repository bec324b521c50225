"""What is encoded is decoded; whatever is not exactly that is refused, and nothing raises but for a newer format."""

import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.contracts.blocks import Lifetime, Owner, RecordKind, Shape
from isthmus.contracts.errors import StoreFormat
from isthmus.state.kv.log.format import (
    ENTRY,
    ENTRY_BYTES,
    FORMAT,
    RECORD_HEADER,
    ROW,
    SECTOR,
    ExtentHeader,
    Geometry,
    RecordHeader,
    SegmentHeader,
    Superblock,
    Trailer,
    align,
    crc,
    decode_hole,
    decode_record,
    digests_good,
    encode_footer,
    encode_hole,
    encode_record,
    finish_record,
    footer_at,
    footer_bytes,
    payload_offset,
    record_span,
    sorted_by_key,
    spans_of,
)

UUID = bytes(range(16))
SEED = crc(UUID)
GEOMETRY = Geometry(1 << 20, 10, 8192)
SUPERBLOCK = Superblock(7, UUID, GEOMETRY, 1.7e9)
SEGMENT = SegmentHeader(3, 9, 1, 1.7e9, 77)
EXTENT = ExtentHeader(9, 77, 4, 12, 8192)
HEADER = RecordHeader(
    b"k" * 32, b"p" * 32, Owner(b"n" * 16, b"s" * 16), Shape(RecordKind.STATE, 3, 1000), Lifetime.SHARED, 5, 78, 9
)
DIGESTS = bytes(range(48))


def finished(header: RecordHeader = HEADER) -> bytes:
    data = bytearray(encode_record(header, DIGESTS) + DIGESTS)
    finish_record(memoryview(data), 0, header.generation, SEED)
    return bytes(data)


def entries(count: int, seed: int = 0) -> np.ndarray:
    chance = random.Random(seed)
    rows = [
        ROW.pack(chance.randbytes(32), b"n" * 16, b"s" * 16, 1, number, 64 + number, 2, 100, 1, 0, 1, 0)
        for number in range(count)
    ]
    return np.frombuffer(b"".join(rows), ENTRY)


def test_sizes_are_those_of_the_document() -> None:
    assert ENTRY_BYTES == ROW.size == 96
    assert len(encode_record(HEADER, DIGESTS)) == RECORD_HEADER == 160
    assert len(SUPERBLOCK.encode()) == len(SEGMENT.encode(UUID, SEED)) == SECTOR
    assert len(EXTENT.encode(SEED)) == len(encode_hole(640, 2, 9, SEED)) == 64
    assert GEOMETRY.data_offset == 8192 + 2 * 8192
    assert Geometry.fitting(GEOMETRY.end, 1 << 20, 8192) == GEOMETRY
    assert Geometry.fitting(GEOMETRY.end - 1, 1 << 20, 8192).segments == 9


def test_everything_comes_back() -> None:
    assert Superblock.decode(SUPERBLOCK.encode()) == SUPERBLOCK
    assert SegmentHeader.decode(SEGMENT.encode(UUID, SEED), UUID, SEED) == SEGMENT
    assert ExtentHeader.decode(EXTENT.encode(SEED), SEED) == EXTENT
    assert decode_record(finished(), SEED) == HEADER
    assert digests_good(finished(), 3)
    assert decode_hole(encode_hole(640, 2, 9, SEED), 9, SEED) == (640, 2)
    orphan = RecordHeader(HEADER.key, None, HEADER.owner, HEADER.shape, Lifetime.SHORT, 0, 1, 9)
    assert decode_record(finished(orphan), SEED) == orphan


def test_every_flipped_bit_is_noticed() -> None:
    def flips(data: bytes, length: int) -> list[bytes]:
        found = []
        for bit in range(length * 8):
            copy = bytearray(data)
            copy[bit >> 3] ^= 1 << (bit & 7)
            found.append(bytes(copy))
        return found

    assert all(Superblock.decode(one) is None for one in flips(SUPERBLOCK.encode(), 512))
    assert all(SegmentHeader.decode(one, UUID, SEED) is None for one in flips(SEGMENT.encode(UUID, SEED), 512))
    assert all(ExtentHeader.decode(one, SEED) is None for one in flips(EXTENT.encode(SEED), 64))
    assert all(decode_record(one, SEED) is None for one in flips(finished(), RECORD_HEADER))
    assert all(decode_hole(one, 9, SEED) is None for one in flips(encode_hole(640, 2, 9, SEED), 64))
    for one in flips(DIGESTS, len(DIGESTS)):
        assert not digests_good(finished()[:RECORD_HEADER] + one, 3)


def test_what_another_log_left_is_nothing() -> None:
    other = crc(bytes(16))
    assert SegmentHeader.decode(SEGMENT.encode(bytes(16), other), UUID, SEED) is None
    assert SegmentHeader.decode(SEGMENT.encode(bytes(16), SEED), UUID, SEED) is None
    assert ExtentHeader.decode(EXTENT.encode(other), SEED) is None
    assert decode_hole(encode_hole(640, 2, 9, other), 9, SEED) is None
    assert decode_hole(encode_hole(640, 2, 8, SEED), 9, SEED) is None
    data = bytearray(encode_record(HEADER, DIGESTS) + DIGESTS)
    finish_record(memoryview(data), 0, 9, other)
    assert decode_record(data, SEED) is None


@given(st.binary(max_size=700))
def test_noise_is_nothing(data: bytes) -> None:
    assert Superblock.decode(data) is None
    assert SegmentHeader.decode(data, UUID, SEED) is None
    assert ExtentHeader.decode(data, SEED) is None
    assert decode_record(data, SEED) is None
    assert decode_hole(data, 9, SEED) is None
    assert Trailer.decode(data, 1 << 20, SEED) is None


@pytest.mark.parametrize(("made_by", "readable_by", "refused"), [(FORMAT + 1, FORMAT, False), (9, FORMAT + 1, True)])
def test_a_newer_format_is_refused_unless_it_says_that_it_can_be_read(
    made_by: int, readable_by: int, refused: bool
) -> None:
    data = Superblock(1, UUID, GEOMETRY, 0.0, made_by, readable_by).encode()
    if refused:
        with pytest.raises(StoreFormat, match="format 9, readable from format 2 on"):
            Superblock.decode(data)
    else:
        assert Superblock.decode(data) is not None


@pytest.mark.parametrize(
    "geometry", [Geometry(0, 1, 4096), Geometry(4097, 1, 4096), Geometry(4096, 0, 4096), Geometry(4096, 65_535, 4096)]
)
def test_a_superblock_that_contradicts_itself_is_none(geometry: Geometry) -> None:
    assert Superblock.decode(Superblock(1, UUID, geometry, 0.0).encode()) is None


@pytest.mark.parametrize("count", [0, 1, 42, 43, 500])
def test_a_footer_is_sorted_and_comes_back(count: int) -> None:
    size = 1 << 20
    rows = entries(count)
    into = memoryview(bytearray(b"\xff" * (footer_bytes(count) + 64)))
    length = encode_footer(into, rows, SEGMENT, segment_bytes=size, data_end=8192, seed=SEED)
    assert length == footer_bytes(count) == size - footer_at(size, count)
    trailer = Trailer.decode(into[length - SECTOR : length], size, SEED)
    assert trailer is not None
    assert (trailer.index, trailer.generation, trailer.count) == (3, 9, count)
    assert (trailer.directory_at, trailer.data_end, trailer.last_sequence) == (size - length, 8192, max(0, count - 1))
    found = trailer.directory(into[: length - SECTOR])
    assert found is not None
    assert found.tobytes() == sorted_by_key(rows).tobytes()
    keys = [key.tobytes() for key in found["key"]]
    assert keys == sorted(keys)
    if count:
        into[5] ^= 1
        assert trailer.directory(into[: length - SECTOR]) is None
    assert trailer.directory(into[: length - SECTOR - 4096]) is None or not count
    assert Trailer.decode(into[length - SECTOR : length], size * 2, SEED) is None


def test_records_are_aligned() -> None:
    for chunks, chunk_bytes in ((1, 1), (3, 1000), (12, 4096), (65_536, 1)):
        assert payload_offset(chunks) % 64 == record_span(chunks, chunk_bytes) % 64 == 0
        assert payload_offset(chunks) - 64 < RECORD_HEADER + 16 * chunks <= payload_offset(chunks)
        assert record_span(chunks, chunk_bytes) - payload_offset(chunks) >= chunks * chunk_bytes
    rows = entries(3)
    assert spans_of(rows).tolist() == [record_span(2, 100)] * 3
    assert (align(1), align(4096), align(65, 64)) == (4096, 4096, 128)


def test_a_record_of_a_kind_nobody_knows_is_none() -> None:
    for offset, value in ((6, 9), (7, 1), (8, 3), (4, 200)):
        data = bytearray(finished())
        data[offset] = value
        struct.pack_into("<I", data, RECORD_HEADER - 4, crc(data[: RECORD_HEADER - 4], SEED))
        assert decode_record(data, SEED) is None
