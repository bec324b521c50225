"""The bytes of the log on disk: encoding and decoding, without I/O. docs/store-format.md says the same in prose.

Everything is little-endian. Every structure ends with a CRC-32 (zlib's) over all its other bytes; all but the
superblock's start from the CRC-32 of the log's uuid (`seed`), so that what another log left on a device is never
taken for ours. A decoder gives None for anything that is not exactly what an encoder made; it never raises but for a
superblock of a newer format.

What says that something else counts (superblock, segment header, trailer, the header of a hole) lies within 512 bytes
at a multiple of 512, which a disk writes entirely or not at all; a hole's header only at a multiple of 64.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from isthmus.contracts.blocks import (
    DIGEST_BYTES,
    ID_BYTES,
    MAX_CHUNKS,
    MAX_RECORD_BYTES,
    Lifetime,
    Owner,
    RecordKind,
    Shape,
)
from isthmus.contracts.errors import StoreFormat
from isthmus.contracts.keys import KEY_BYTES

FORMAT = 1
"""What this build writes. It reads `OLDEST_READ` up to this."""
OLDEST_READ = 1
SECTOR = 4096
SLOT = 64
MAX_SEGMENTS = 65_534
MAX_SEGMENT_BYTES = 1 << 30
SUPERBLOCKS = (0, SECTOR)
ERASURE_OFFSET = 2 * SECTOR
SURVIVORS = len(Lifetime)
"""The class of segments that hold what outlived the segment it was first written to."""
CLASSES = SURVIVORS + 1

ATOM = 512
_CRC = struct.Struct("<I")
_SUPERBLOCK = struct.Struct("<8sIIQ16sQIIQQQd")
_SEGMENT = struct.Struct("<8sIIQ16sQB7xd")
_EXTENT = struct.Struct("<8sQQIIQ")
_RECORD = struct.Struct("<IHBBBBHIQQQII32s16s16s32sQ")
_HOLE = struct.Struct("<IIQQI")
_TRAILER = struct.Struct("<8sIIQQQQQ16s")
_RECORD_CRC = struct.Struct("<II")

_SUPERBLOCK_MAGIC = b"ISTHSTOR"
_SEGMENT_MAGIC = b"ISTHSEGM"
EXTENT_MAGIC = b"ISTHEXTN"
_TRAILER_MAGIC = b"ISTHFOOT"
_RECORD_MAGIC = 0x44524352
_HOLE_MAGIC = 0x454C4F48
EXTENT_HEADER = 64
HOLE_HEADER = 64
RECORD_HEADER = 160
_GENERATION_AT = 16
_CRCS_AT = 152
RAW = 0

Rows = NDArray[Any]

ENTRY = np.dtype(
    [
        ("key", "u1", (KEY_BYTES,)),
        ("namespace", "u1", (ID_BYTES,)),
        ("session", "u1", (ID_BYTES,)),
        ("stamp", "<u8"),
        ("sequence", "<u8"),
        ("slot", "<u4"),
        ("chunks", "<u4"),
        ("chunk_bytes", "<u4"),
        ("kind", "u1"),
        ("codec", "u1"),
        ("lifetime", "u1"),
        ("flags", "u1"),
    ]
)
ENTRY_BYTES = ENTRY.itemsize
ROW = struct.Struct("<32s16s16sQQIIIBBBB")
"""One entry of a directory, as `ENTRY` has it."""


def align(size: int, to: int = SECTOR) -> int:
    """`size` rounded up to a multiple of `to`, a power of two."""
    return (size + to - 1) & -to


def crc(data: bytes | bytearray | memoryview, seed: int = 0) -> int:
    """CRC-32 of `data`, begun from `seed`."""
    return zlib.crc32(data, seed)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where things lie, in bytes: fixed when the log is made."""

    segment_bytes: int
    segments: int
    erasure_bytes: int

    @staticmethod
    def fitting(capacity: int, segment_bytes: int, erasure_bytes: int) -> "Geometry":
        """As many segments as fit into `capacity`."""
        left = capacity - ERASURE_OFFSET - 2 * erasure_bytes
        return Geometry(segment_bytes, max(0, left // segment_bytes), erasure_bytes)

    @property
    def data_offset(self) -> int:
        """Where the first segment begins."""
        return ERASURE_OFFSET + 2 * self.erasure_bytes

    @property
    def end(self) -> int:
        """Where the last segment ends."""
        return self.start(self.segments)

    def start(self, segment: int) -> int:
        """Where a segment begins."""
        return self.data_offset + segment * self.segment_bytes

    def erasure(self, copy: int) -> int:
        """Where copy 0 or 1 of the erasure table begins."""
        return ERASURE_OFFSET + copy * self.erasure_bytes


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the log is. Of two valid copies the one with the higher `seq` counts."""

    seq: int
    uuid: bytes
    geometry: Geometry
    created: float
    format: int = FORMAT
    readable_by: int = OLDEST_READ

    @property
    def seed(self) -> int:
        """What every other CRC starts from."""
        return crc(self.uuid)

    def encode(self) -> bytes:
        """One sector."""
        g = self.geometry
        body = _SUPERBLOCK.pack(
            _SUPERBLOCK_MAGIC,
            self.format,
            self.readable_by,
            self.seq,
            self.uuid,
            g.segment_bytes,
            g.segments,
            0,
            g.data_offset,
            ERASURE_OFFSET,
            g.erasure_bytes,
            self.created,
        )
        return _atom(body, 0)

    @staticmethod
    def decode(data: bytes | memoryview) -> "Superblock | None":
        """None: not a superblock. Raises `StoreFormat` for one that this build is too old (or too new) to read."""
        if bytes(data[:8]) != _SUPERBLOCK_MAGIC or not _atom_good(data, 0):
            return None
        _, made_by, readable_by, seq, uuid, segment_bytes, segments, _, data_at, erasure_at, erasure, created = (
            _SUPERBLOCK.unpack_from(data)
        )
        if readable_by > FORMAT or made_by < OLDEST_READ:
            raise StoreFormat(
                f"the log has format {made_by}, readable from format {readable_by} on; "
                f"this Isthmus reads {OLDEST_READ} to {FORMAT}"
            )
        geometry = Geometry(segment_bytes, segments, erasure)
        good = (
            0 < segment_bytes <= MAX_SEGMENT_BYTES
            and segment_bytes % SECTOR == 0
            and erasure > 0
            and erasure % SECTOR == 0
            and 0 < segments <= MAX_SEGMENTS
            and (data_at, erasure_at) == (geometry.data_offset, ERASURE_OFFSET)
        )
        return Superblock(seq, uuid, geometry, created, made_by, readable_by) if good else None


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """The first sector of a segment: which generation it is in. `first_sequence`: no record in it has a lower one, but
    for survivors and records written again.
    """

    index: int
    generation: int
    lane: int
    opened: float
    first_sequence: int

    def encode(self, uuid: bytes, seed: int) -> bytes:
        """One sector."""
        body = _SEGMENT.pack(
            _SEGMENT_MAGIC, FORMAT, self.index, self.generation, uuid, self.first_sequence, self.lane, self.opened
        )
        return _atom(body, seed)

    @staticmethod
    def decode(data: bytes | memoryview, uuid: bytes, seed: int) -> "SegmentHeader | None":
        """None: not a header of the log with this uuid."""
        if bytes(data[:8]) != _SEGMENT_MAGIC or not _atom_good(data, seed):
            return None
        _, _, index, generation, found, first_sequence, lane, opened = _SEGMENT.unpack_from(data)
        if found != uuid or lane >= CLASSES or generation < 1:
            return None
        return SegmentHeader(index, generation, lane, opened, first_sequence)


@dataclass(frozen=True, slots=True)
class ExtentHeader:
    """The first 64 bytes of an extent: `records` records in `size` bytes. `ordinal` counts a segment's extents."""

    generation: int
    first_sequence: int
    ordinal: int
    records: int
    size: int

    def encode(self, seed: int) -> bytes:
        """64 bytes."""
        body = _EXTENT.pack(
            EXTENT_MAGIC, self.generation, self.first_sequence, self.ordinal, self.records, self.size
        ).ljust(EXTENT_HEADER - _CRC.size, b"\0")
        return body + _CRC.pack(crc(body, seed))

    @staticmethod
    def decode(data: bytes | memoryview, seed: int) -> "ExtentHeader | None":
        """None: not the header of an extent."""
        body = EXTENT_HEADER - _CRC.size
        if bytes(data[:8]) != EXTENT_MAGIC or len(data) < EXTENT_HEADER:
            return None
        if _CRC.unpack_from(data, body)[0] != crc(data[:body], seed):
            return None
        _, generation, first_sequence, ordinal, records, size = _EXTENT.unpack_from(data)
        good = size % SECTOR == 0 and size > 0 and records > 0
        return ExtentHeader(generation, first_sequence, ordinal, records, size) if good else None


def payload_offset(chunks: int) -> int:
    """Where in a record the payload begins."""
    return align(RECORD_HEADER + DIGEST_BYTES * chunks, SLOT)


def record_span(chunks: int, chunk_bytes: int) -> int:
    """Bytes of a whole record, from its header to where the next one begins."""
    return payload_offset(chunks) + align(chunks * chunk_bytes, SLOT)


def spans_of(rows: Rows) -> NDArray[np.int64]:
    """`record_span` of every entry of a directory."""
    chunks = rows["chunks"].astype(np.int64)
    head = (RECORD_HEADER + DIGEST_BYTES * chunks + SLOT - 1) & -SLOT
    return head + ((chunks * rows["chunk_bytes"].astype(np.int64) + SLOT - 1) & -SLOT)


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record says about itself. `stamp` is the erasure epoch at which it was taken in."""

    key: bytes
    parent: bytes | None
    owner: Owner
    shape: Shape
    lifetime: Lifetime
    stamp: int
    sequence: int
    generation: int = 0

    @property
    def span(self) -> int:
        """See `record_span`."""
        return record_span(self.shape.chunks, self.shape.chunk_bytes)


_HAS_PARENT = 1
_NO_PARENT = bytes(KEY_BYTES)


def encode_record(header: RecordHeader, digests: bytes) -> bytes:
    """The 160 bytes of a record's header, unfinished: `finish_record` adds generation and CRC."""
    shape = header.shape
    return _RECORD.pack(
        _RECORD_MAGIC,
        FORMAT,
        shape.kind,
        RAW,
        header.lifetime,
        _HAS_PARENT if header.parent is not None else 0,
        0,
        0,
        0,
        header.sequence,
        header.stamp,
        shape.chunks,
        shape.chunk_bytes,
        header.key,
        header.owner.namespace_id,
        header.owner.session_id,
        header.parent or _NO_PARENT,
        0,
    ) + _RECORD_CRC.pack(crc(digests), 0)


def finish_record(buffer: memoryview, at: int, generation: int, seed: int) -> None:
    """Put the generation of its segment, and with it the CRC, into a header that `encode_record` made."""
    _U64.pack_into(buffer, at + _GENERATION_AT, generation)
    body = at + RECORD_HEADER - _CRC.size
    _CRC.pack_into(buffer, body, crc(buffer[at:body], seed))


_U64 = struct.Struct("<Q")


def decode_record(data: bytes | memoryview, seed: int) -> RecordHeader | None:
    """None: the first 160 bytes of `data` are no record's header."""
    body = RECORD_HEADER - _CRC.size
    if len(data) < RECORD_HEADER or _CRC.unpack_from(data, body)[0] != crc(data[:body], seed):
        return None
    magic, version, kind, codec, lifetime, flags, _, _, generation, sequence, stamp, chunks, chunk_bytes, *ids = (
        _RECORD.unpack_from(data)
    )
    known = magic == _RECORD_MAGIC and OLDEST_READ <= version <= FORMAT and codec == RAW and lifetime < SURVIVORS
    shaped = 1 <= chunks <= MAX_CHUNKS and chunk_bytes >= 1 and chunks * chunk_bytes <= MAX_RECORD_BYTES
    if not known or not shaped or kind not in (RecordKind.BLOCK, RecordKind.STATE):
        return None
    key, namespace, session, parent = ids[:4]
    return RecordHeader(
        key,
        parent if flags & _HAS_PARENT else None,
        Owner(namespace, session),
        Shape(RecordKind(kind), chunks, chunk_bytes),
        Lifetime(lifetime),
        stamp,
        sequence,
        generation,
    )


def digests_good(head: bytes | memoryview, chunks: int) -> bool:
    """Whether the digests behind the header at the start of `head` are those that it was finished with."""
    end = RECORD_HEADER + DIGEST_BYTES * chunks
    return len(head) >= end and bool(_RECORD_CRC.unpack_from(head, _CRCS_AT)[0] == crc(head[RECORD_HEADER:end]))


def encode_hole(size: int, records: int, generation: int, seed: int) -> bytes:
    """The 64 bytes that stand where `records` records, `size` bytes in a row, were erased; zeros follow."""
    body = _HOLE.pack(_HOLE_MAGIC, FORMAT, generation, size, records).ljust(HOLE_HEADER - _CRC.size, b"\0")
    return body + _CRC.pack(crc(body, seed))


def decode_hole(data: bytes | memoryview, generation: int, seed: int) -> tuple[int, int] | None:
    """Bytes and records that a hole stands for, or None when this is none of this generation."""
    body = HOLE_HEADER - _CRC.size
    if len(data) < HOLE_HEADER or _CRC.unpack_from(data, body)[0] != crc(data[:body], seed):
        return None
    magic, _, found, size, records = _HOLE.unpack_from(data)
    if magic != _HOLE_MAGIC or found != generation or size < HOLE_HEADER or size % SLOT or not records:
        return None
    return int(size), int(records)


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last sector of a sealed segment: where its directory is. `data_end`: where its extents end. It also says what
    the segment's header says, in case that is damaged.
    """

    index: int
    generation: int
    count: int
    directory_at: int
    data_end: int
    last_sequence: int
    digest: bytes

    @property
    def directory_bytes(self) -> int:
        """Bytes of the directory, without padding."""
        return self.count * ENTRY_BYTES

    @staticmethod
    def decode(data: bytes | memoryview, segment_bytes: int, seed: int) -> "Trailer | None":
        """None: not a trailer of a segment of this size."""
        if bytes(data[:8]) != _TRAILER_MAGIC or not _atom_good(data, seed):
            return None
        _, _, index, generation, count, at, data_end, last, digest = _TRAILER.unpack_from(data)
        if at != footer_at(segment_bytes, count) or not SECTOR <= data_end <= at or generation < 1:
            return None
        return Trailer(index, generation, count, at, data_end, last, digest)

    def directory(self, data: bytes | memoryview) -> Rows | None:
        """The entries in `data`; None when they are not those that were sealed."""
        raw = data[: self.directory_bytes]
        if len(raw) != self.directory_bytes or xxhash.xxh3_128_digest(raw) != self.digest:
            return None
        return np.frombuffer(raw, ENTRY)


def footer_bytes(records: int) -> int:
    """Bytes of a footer, directory and trailer, for so many records."""
    return align(records * ENTRY_BYTES) + SECTOR


def footer_at(segment_bytes: int, records: int) -> int:
    """Where in a segment its footer begins."""
    return segment_bytes - footer_bytes(records)


def sorted_by_key(rows: Rows) -> Rows:
    """The entries in the order of their keys; of equal keys, in the order of their slots."""
    keys = np.ascontiguousarray(rows["key"]).view(f"S{KEY_BYTES}").ravel()
    return rows[np.lexsort((rows["slot"], keys))]


def encode_footer(
    into: memoryview, rows: Rows, segment: SegmentHeader, *, segment_bytes: int, data_end: int, seed: int
) -> int:
    """Write the footer of a segment with these entries to the start of `into`; how many bytes it has."""
    ordered = sorted_by_key(rows)
    raw = ordered.tobytes()
    size = footer_bytes(len(ordered))
    last = int(rows["sequence"].max()) if len(rows) else 0
    at = footer_at(segment_bytes, len(ordered))
    digest = xxhash.xxh3_128_digest(raw)
    body = _TRAILER.pack(
        _TRAILER_MAGIC, FORMAT, segment.index, segment.generation, len(ordered), at, data_end, last, digest
    )
    into[: len(raw)] = raw
    into[len(raw) : size - SECTOR] = bytes(size - SECTOR - len(raw))
    into[size - SECTOR : size] = _atom(body, seed)
    return size


def _atom(body: bytes, seed: int) -> bytes:
    """A sector whose first 512 bytes are `body`, zeros and a CRC."""
    head = body.ljust(ATOM - _CRC.size, b"\0")
    return (head + _CRC.pack(crc(head, seed))).ljust(SECTOR, b"\0")


def _atom_good(data: bytes | memoryview, seed: int) -> bool:
    at = ATOM - _CRC.size
    return len(data) >= ATOM and bool(_CRC.unpack_from(data, at)[0] == crc(data[:at], seed))
