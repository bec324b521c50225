"""Copies whose copy is what gets hashed: xxh3-128 of each layer chunk, read back from where the bytes were put.

A piece is hashed right after it was copied, while it is in the processor's cache, so that the digests cost little
beside the copy. Large copies and digests let other threads run meanwhile; what is larger still is shared with one.
"""

from collections.abc import Iterable

import numpy as np
import xxhash

from isthmus.contracts.blocks import DIGEST_BYTES
from isthmus.state.kv.arena.crew import Crew

PART_BYTES = 1 << 20
"""Of a copy from twice this on; a part has whole chunks."""
PIECE_BYTES = 256 << 10
_QUICK_BYTES = 64 << 10
"""Up to here a slice assignment is quicker than giving up the interpreter for the time of a copy."""


def flat(buffer: memoryview) -> memoryview:
    """A contiguous buffer as one row of bytes, without a copy."""
    return buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")


def copy_digests(source: memoryview, target: memoryview, chunk_bytes: int, crew: Crew | None = None) -> bytes:
    """Copy whole chunks of `chunk_bytes`, with the help of `crew`; the digests of what lies in `target` afterwards, one
    after the other.
    """
    size = len(source)
    if crew is None or size < 2 * PART_BYTES:
        return _copy_digests(source, target, chunk_bytes)
    part = max(1, PART_BYTES // chunk_bytes) * chunk_bytes
    spans = [slice(at, at + part) for at in range(0, size, part)]
    return b"".join(crew.together(lambda span: _copy_digests(source[span], target[span], chunk_bytes), spans, size))


def copy(source: memoryview, target: memoryview) -> None:
    """Copy bytes, as many in both; long copies let other threads run."""
    if len(source) <= _QUICK_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def copy_digest(pieces: Iterable[tuple[memoryview, memoryview]]) -> bytes:
    """Copy the pieces of one chunk, each to where it goes; the digest of what lies there afterwards."""
    hasher = xxhash.xxh3_128()
    for source, target in pieces:
        copy(source, target)
        hasher.update(target)
    return hasher.digest()


def _copy_digests(source: memoryview, target: memoryview, chunk_bytes: int) -> bytes:
    size = len(source)
    digest = xxhash.xxh3_128_digest
    if size <= _QUICK_BYTES:
        target[:] = source
        return b"".join([digest(target[at : at + chunk_bytes]) for at in range(0, size, chunk_bytes)])
    here, there = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    found: list[bytes] = []
    if chunk_bytes <= PIECE_BYTES:
        group = PIECE_BYTES // chunk_bytes * chunk_bytes
        for start in range(0, size, group):
            end = min(start + group, size)
            np.copyto(here[start:end], there[start:end])
            found += [digest(target[at : at + chunk_bytes]) for at in range(start, end, chunk_bytes)]
        return b"".join(found)
    for first in range(0, size, chunk_bytes):
        last = first + chunk_bytes
        spans = [slice(start, min(start + PIECE_BYTES, last)) for start in range(first, last, PIECE_BYTES)]
        found.append(copy_digest((source[span], target[span]) for span in spans))
    return b"".join(found)


def copy_verified(
    source: memoryview, target: memoryview, chunk_bytes: int, digests: bytes, crew: Crew | None = None
) -> bool:
    """Copy whole chunks; whether the copy has these digests. If not, what lies in `target` means nothing."""
    return copy_digests(source, target, chunk_bytes, crew) == digests


def digests_slice(digests: bytes, first: int, count: int) -> bytes:
    """Those of `count` chunks from `first` on."""
    return digests[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
