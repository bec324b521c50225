"""Finding the records of a segment that has no footer. Pure but for the reading function that it is given.

Extents follow each other; each must have the segment's generation, a valid header, and a higher ordinal than the one
before. Every record in it is verified whole. Where an extent should begin and none does, the next sector that begins
one is looked for, so that a damaged header costs one extent only. What is found beside is told, to be zeroed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from isthmus.contracts.blocks import DIGEST_BYTES
from isthmus.state.kv.hashing import ALL_GOOD, first_bad
from isthmus.state.kv.log.format import (
    ENTRY,
    EXTENT_HEADER,
    EXTENT_MAGIC,
    HOLE_HEADER,
    RAW,
    RECORD_HEADER,
    ROW,
    SECTOR,
    SLOT,
    ExtentHeader,
    RecordHeader,
    Rows,
    decode_hole,
    decode_record,
    digests_good,
    payload_offset,
)

Read = Callable[[int, int], bytearray]
"""Bytes of the segment: offset and length, whole sectors. Raises `DiskFailed`."""
_WINDOW = 4 << 20


@dataclass(frozen=True, slots=True)
class Broken:
    """A part of an extent that should hold `records` records and holds none that is valid."""

    offset: int
    size: int
    records: int


@dataclass(slots=True)
class Scan:
    """What was found: the directory by extent, where the extents end, the next ordinal. `garbage`: bytes beside the
    extents that are not zero, in whole sectors (offset, length).
    """

    rows: list[Rows] = field(default_factory=list)
    end: int = SECTOR
    extents: int = 0
    broken: list[Broken] = field(default_factory=list)
    unclean: list[tuple[int, int]] = field(default_factory=list)
    """Bytes of holes that are not zero: somebody stopped between the hole and the zeros."""
    garbage: list[tuple[int, int]] = field(default_factory=list)


def scan_segment(read: Read, size: int, generation: int, seed: int) -> Scan:
    """Scan a segment of `size` bytes. The result of a second scan is the same unless the disk reads differently."""
    found = Scan()
    window = _Window(read, size)
    at = SECTOR
    while at < size:
        header = window.extent(at, seed)
        if (
            header is None
            or header.generation != generation
            or header.ordinal < found.extents
            or at + header.size > size
        ):
            at = window.next_magic(at + SECTOR)
            continue
        if at > found.end:
            found.garbage += window.dirt(found.end, at)
        rows = _walk(found, memoryview(window.bytes(at, header.size)), at, header, seed)
        if len(rows):
            found.rows.append(rows)
        found.extents = header.ordinal + 1
        found.end = at = at + header.size
    found.garbage += window.dirt(found.end, size)
    return found


def first_generation(read: Read, size: int, seed: int) -> int:
    """The generation of a segment's first extent; 0 when there is none. For a segment whose header is damaged."""
    header = ExtentHeader.decode(bytes(read(SECTOR, SECTOR)[:EXTENT_HEADER]), seed) if size > SECTOR else None
    return header.generation if header is not None else 0


def entry_of(header: RecordHeader, slot: int) -> bytes:
    """The directory's entry of a record."""
    shape, owner = header.shape, header.owner
    return ROW.pack(
        header.key,
        owner.namespace_id,
        owner.session_id,
        header.stamp,
        header.sequence,
        slot,
        shape.chunks,
        shape.chunk_bytes,
        shape.kind,
        RAW,
        header.lifetime,
        0,
    )


def record_good(data: memoryview, header: RecordHeader) -> bool:
    """Whether digests and payload of the record at the start of `data` are right."""
    shape = header.shape
    begin = payload_offset(shape.chunks)
    if len(data) < header.span or not digests_good(data, shape.chunks):
        return False
    digests = data[RECORD_HEADER : RECORD_HEADER + DIGEST_BYTES * shape.chunks]
    return first_bad(data[begin : begin + shape.record_bytes], shape.chunk_bytes, digests) == ALL_GOOD


def _walk(found: Scan, data: memoryview, base: int, extent: ExtentHeader, seed: int) -> Rows:
    """The valid records of one extent."""
    rows = bytearray()
    at, left = EXTENT_HEADER, extent.records
    while left > 0:
        hole = decode_hole(data[at : at + EXTENT_HEADER], extent.generation, seed)
        if hole is not None:
            size, records = hole
            if np.frombuffer(data[at + HOLE_HEADER : at + size], np.uint8).any():
                found.unclean.append((base + at + HOLE_HEADER, size - HOLE_HEADER))
            at, left = at + size, left - records
            continue
        header = decode_record(data[at : at + RECORD_HEADER], seed)
        if header is None or header.generation != extent.generation or at + header.span > extent.size:
            # Without its header nothing says where the next one begins.
            if at < extent.size:
                found.broken.append(Broken(base + at, extent.size - at, left))
            break
        if record_good(data[at : at + header.span], header):
            rows += entry_of(header, (base + at) // SLOT)
        else:
            found.broken.append(Broken(base + at, header.span, 1))
        at, left = at + header.span, left - 1
    return np.frombuffer(bytes(rows), ENTRY)


class _Window:
    """The segment, read ahead in long steps."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._size = size
        self._at = 0
        self._data = bytearray()

    def bytes(self, at: int, length: int) -> bytearray:
        """Bytes of the segment."""
        if not self._at <= at or at + length > self._at + len(self._data):
            self._at = at
            self._data = self._read(at, min(max(length, _WINDOW), self._size - at))
        return self._data[at - self._at : at - self._at + length]

    def extent(self, at: int, seed: int) -> ExtentHeader | None:
        """The header of an extent at `at`."""
        return ExtentHeader.decode(bytes(self.bytes(at, SECTOR)[:EXTENT_HEADER]), seed)

    def next_magic(self, at: int) -> int:
        """The first sector from `at` on that begins like an extent, or the end."""
        while at < self._size:
            data = np.frombuffer(self.bytes(at, min(_WINDOW, self._size - at)), np.uint8).reshape(-1, SECTOR)
            hits = np.flatnonzero((data[:, : len(EXTENT_MAGIC)] == np.frombuffer(EXTENT_MAGIC, np.uint8)).all(axis=1))
            if len(hits):
                return at + int(hits[0]) * SECTOR
            at += data.size
        return self._size

    def dirt(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The sectors between that are not all zeros, as ranges (offset, length)."""
        found: list[tuple[int, int]] = []
        for at in range(begin, end, _WINDOW):
            data = np.frombuffer(self.bytes(at, min(_WINDOW, end - at)), np.uint8)
            if data.any():
                found.append((at, data.size))
        return found
