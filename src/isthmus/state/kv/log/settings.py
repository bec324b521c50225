"""Settings of the segment log, and the limits on them."""

import msgspec

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.log.format import MAX_SEGMENT_BYTES, MAX_SEGMENTS, SECTOR, Geometry

MIN_SEGMENTS = 8
_KIB = 1024
_MIB = 1024 * _KIB


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a log is laid out (which counts only when it is made; later the disk says) and how it is driven.

    Sizes in bytes, times in seconds. Raises `InvalidInput`, naming the field, for anything that cannot work.
    """

    capacity: int
    """Of the whole disk; never exceeded."""
    segment_bytes: int = 64 * _MIB
    erasure_bytes: int = _MIB
    """Of each of the two copies of the erasure table: 18 thousand scopes a MiB."""
    extent_bytes: int = 4 * _MIB
    """One write of small records; a larger record is an extent by itself."""
    staging_bytes: int = 96 * _MIB
    """Memory for records that are not durable yet: also the most bytes that a crash can cost."""
    linger_s: float = 0.02
    """How long an extent may wait for more records."""
    commit_s: float = 0.5
    commit_bytes: int = 32 * _MIB
    """A group commit begins when either is over."""
    queue_depth: int = 8
    """Writes in flight."""
    read_bytes: int = 4 * _MIB
    """The longest single read, but for a sixteenth more where that ends a record; of small batches half of that."""
    read_depth: int = 8
    """Buffers for the reads of one batch. Half of them are in flight while others are copied from."""
    readers: int = 2
    """Batches read at the same time; each has `read_depth` buffers of `read_bytes`."""
    wear_bytes_day: int = 0
    """Bytes a day that may be written to the disk on average; 0: no limit."""
    tenant_bytes: int = 0
    """Bytes that one namespace may take; 0: no limit."""

    def __post_init__(self) -> None:
        limits = {
            "segment_bytes": (16 * SECTOR, MAX_SEGMENT_BYTES),
            "erasure_bytes": (SECTOR, 64 * _MIB),
            "extent_bytes": (4 * SECTOR, 64 * _MIB),
            "staging_bytes": (8 * self.extent_bytes, 4096 * _MIB),
            "commit_bytes": (1, 4096 * _MIB),
            "queue_depth": (1, 256),
            "read_bytes": (2 * SECTOR, 64 * _MIB),
            "read_depth": (1, 256),
            "readers": (1, 64),
            "wear_bytes_day": (0, 1 << 62),
            "tenant_bytes": (0, 1 << 62),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidInput(f"{name} is {value}, accepted: {low} to {high}", name)
        for name in ("segment_bytes", "erasure_bytes", "extent_bytes", "read_bytes"):
            if getattr(self, name) % SECTOR:
                raise InvalidInput(f"{name} is a multiple of {SECTOR}", name)
        for name, high_s in (("linger_s", 1.0), ("commit_s", 60.0)):
            if not 0.0 <= getattr(self, name) <= high_s:
                raise InvalidInput(f"{name} is {getattr(self, name)}, accepted: 0 to {high_s}", name)
        if self.segment_bytes < 4 * self.extent_bytes:
            raise InvalidInput("a segment has room for at least 4 extents", "segment_bytes")
        self.geometry()

    def geometry(self) -> Geometry:
        """The layout of a new log with these settings."""
        geometry = Geometry.fitting(self.capacity, self.segment_bytes, self.erasure_bytes)
        if not MIN_SEGMENTS <= geometry.segments <= MAX_SEGMENTS:
            least = geometry.data_offset + MIN_SEGMENTS * self.segment_bytes
            most = geometry.data_offset + MAX_SEGMENTS * self.segment_bytes
            raise InvalidInput(f"capacity is {self.capacity}, accepted: {least} to {most}", "capacity")
        return geometry
