"""Memory of the fingerprint table: two flat arrays, cut into regions of equal size, one region a partition.

Flat, so that a batch of keys of all partitions is one gather; anonymous memory, so that a region costs only the pages
that were written to, and gives back those that it no longer needs. A region never moves within the arrays; the arrays
may move when more regions are reserved (mremap: page tables move, not bytes), so nobody keeps a view of them.
"""

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

from isthmus.contracts.errors import InvalidInput

PAGE = mmap.PAGESIZE
WORD_BYTES = 8
TAG_BYTES = 2
_NO_WORDS: NDArray[np.uint64] = np.empty(0, np.uint64)
_NO_TAGS: NDArray[np.uint16] = np.empty(0, np.uint16)
_GROWTH = 4  # a quarter more regions are reserved than are needed: address space, not memory


class Slots:
    """`words` (uint64) and `tags` (uint16) of `regions` regions, `1 << bits` slots each, zero at first.

    `word` and `tag` are the same memory as memoryviews: single elements of those are read several times as fast.
    """

    __slots__ = ("_maps", "bits", "regions", "tag", "tags", "word", "words")

    def __init__(self, bits: int) -> None:
        if (TAG_BYTES << bits) % PAGE:
            raise InvalidInput(f"a region of {1 << bits} slots is not made of whole pages", "partition_slots")
        self.bits = bits
        self.regions = 1
        self._maps = [_area(size << bits) for size in (WORD_BYTES, TAG_BYTES)]
        self.words: NDArray[np.uint64] = np.frombuffer(self._maps[0], np.uint64)
        self.tags: NDArray[np.uint16] = np.frombuffer(self._maps[1], np.uint16)
        self.word = memoryview(self._maps[0]).cast("Q")
        self.tag = memoryview(self._maps[1]).cast("H")

    def reserve(self, regions: int) -> None:
        """Have at least `regions` regions. Raises `MemoryError`, and then nothing has changed."""
        if regions <= self.regions:
            return
        regions = max(regions, self.regions + self.regions // _GROWTH)
        self.word.release()
        self.tag.release()
        self.words, self.tags = _NO_WORDS, _NO_TAGS
        try:
            self._resize(regions)
            self.regions = regions
        except OSError as error:
            raise MemoryError(f"no memory for {regions} partitions") from error
        finally:
            slots = self.regions << self.bits
            self.words = np.frombuffer(self._maps[0], np.uint64, slots)
            self.tags = np.frombuffer(self._maps[1], np.uint16, slots)
            self.word = memoryview(self._maps[0]).cast("Q")
            self.tag = memoryview(self._maps[1]).cast("H")

    def _resize(self, regions: int) -> None:
        for area, size in zip(self._maps, (WORD_BYTES, TAG_BYTES), strict=True):
            area.resize((regions << self.bits) * size)

    def release(self, region: int, start: int, end: int) -> None:
        """Make slots `start` to `end` of a region zero and give their pages back, also the rest of the last one: what
        lies behind `end` in the region is not in use.
        """
        base = region << self.bits
        for area, size in zip(self._maps, (WORD_BYTES, TAG_BYTES), strict=True):
            low = -(-(base + start) * size // PAGE) * PAGE
            high = -(-(base + end) * size // PAGE) * PAGE
            rest = slice(base + start, min(base + end, low // size))
            if size == WORD_BYTES:
                self.words[rest] = 0  # a tag means nothing without a word
            if high > low:
                area.madvise(mmap.MADV_DONTNEED, low, high - low)

    def copy(self, source: int, target: int, top: int) -> None:
        """Copy the first `top` slots of one region over those of another."""
        start, to = source << self.bits, target << self.bits
        self.words[to : to + top] = self.words[start : start + top]
        self.tags[to : to + top] = self.tags[start : start + top]


def _area(size: int) -> mmap.mmap:
    # Private: what is shared cannot grow by mremap.
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages knows no such advice
        area.madvise(mmap.MADV_NOHUGEPAGE)  # they would fill what regions leave unused
    return area


def touched_bytes(slots: NDArray[np.int64]) -> int:
    """Bytes of the pages of regions whose first `slots` slots are in use."""
    pages = -(-slots * WORD_BYTES // PAGE) + -(-slots * TAG_BYTES // PAGE)
    return int(pages.sum()) * PAGE
