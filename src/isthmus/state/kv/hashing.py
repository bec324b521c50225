"""Digests of layer chunks: xxh3-128 of each, 16 bytes in canonical (big-endian) order.

They tell bytes that were damaged from bytes that were not; they are no defence against somebody who chooses the bytes
(the keys are that: contracts/keys.py). Hashing of more than 64 KiB lets other threads run meanwhile.
"""

import xxhash

from isthmus.contracts.blocks import DIGEST_BYTES

ALL_GOOD = -1


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest of one chunk."""
    return xxhash.xxh3_128_digest(data)


def digests_of(data: memoryview, chunk_bytes: int) -> bytes:
    """The digests of all chunks of `data` (whole chunks), one after the other."""
    one = xxhash.xxh3_128_digest
    return b"".join([one(data[at : at + chunk_bytes]) for at in range(0, data.nbytes, chunk_bytes)])


def first_bad(data: memoryview, chunk_bytes: int, digests: bytes | memoryview) -> int:
    """The first chunk of `data` that does not have its digest, or `ALL_GOOD`."""
    one = xxhash.xxh3_128_digest
    for index in range(data.nbytes // chunk_bytes):
        at = index * chunk_bytes
        if one(data[at : at + chunk_bytes]) != digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]:
            return index
    return ALL_GOOD
