"""Which pages of the arena are free: an allocator of extents in 4 KiB pages. Pure: no memory is touched.

Promises: extents never overlap and never cross the end of a region; neighbours that are free are one extent; used +
free == total after every call (`check` counts anew). The smallest free extent that is long enough is taken, the lowest
one among equals: a store holds few sizes of records, so what one record leaves the next one fits exactly. Both ends of
every extent carry its length (boundary tags, Knuth, TAOCP 1, 2.5), eight bytes a page.
"""

import bisect
import heapq
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from isthmus.contracts.errors import EngineFailed, InvalidInput

PAGE_BYTES = 4096
MAX_PAGES = 1 << 31
_STALE = 1024


class ArenaCorrupt(EngineFailed):
    """The conservation law does not hold: a bug in Isthmus, never caused by input."""


class Extents:
    """The pages of regions of `regions[i]` pages each, numbered through; all free at first."""

    def __init__(self, regions: Sequence[int]) -> None:
        if not regions or min(regions) < 1 or sum(regions) >= MAX_PAGES:
            raise InvalidInput(f"an arena has regions of at least 1 page, under {MAX_PAGES} pages in all", "regions")
        self.total = sum(regions)
        self.used = 0
        self._ends = set(accumulate(regions))
        # At an extent's first page its length (negative: free), at its last page where it starts.
        self._length = array("i", bytes(4 * self.total))
        self._start = array("i", bytes(4 * self.total))
        self._bins: dict[int, list[int]] = {}
        self._lengths: list[int] = []
        self._entries = 0
        self._extents = 0
        start = 0
        for pages in regions:
            self._set_free(start, pages)
            start += pages

    @property
    def free(self) -> int:
        """Pages that are not taken."""
        return self.total - self.used

    def take(self, pages: int) -> int | None:
        """The first page of a new extent; None when no free extent is long enough."""
        if pages < 1:
            raise InvalidInput(f"an extent has at least 1 page, not {pages}", "pages")
        found = self._fit(pages)
        if found is None:
            return None
        start, length = found
        self._use(start, length, pages)
        return start

    def take_next(self, page: int, most: int) -> tuple[int, int] | None:
        """Take at most `most` pages of the first free extent from `page` on: (first page, pages); or None."""
        while page < self.total and self._length[page] >= 0:
            page += max(1, self._length[page])
        if page >= self.total:
            return None
        length = -self._length[page]
        pages = min(length, most)
        self._use(page, length, pages)
        return page, pages

    def give(self, start: int) -> int:
        """Free the extent that starts at page `start`; how many pages it had. Raises `ArenaCorrupt` if none does."""
        pages = self._length[start] if 0 <= start < self.total else 0
        if pages < 1:
            raise ArenaCorrupt(f"no extent in use starts at page {start}")
        first, length = start, pages
        if start and start not in self._ends:
            before = self._start[start - 1]
            if self._length[before] < 0:
                first, length = before, length + start - before
                self._extents -= 1
        after = start + pages
        if after < self.total and after not in self._ends and self._length[after] < 0:
            length -= self._length[after]
            self._length[after] = 0
            self._extents -= 1
        self._length[start] = 0
        self._set_free(first, length)
        self.used -= pages
        return pages

    def window(self, anchor: int, pages: int, movable: Callable[[int], bool], most: int) -> list[int]:
        """The extents in use whose freeing makes `pages` free pages in a row, near the one that starts at `anchor`.

        Only those for whose first page `movable` is true; at most `most` extents are looked at. Empty: none such.
        """
        for direction in (1, -1):
            run: list[int] = []
            length = 0
            for start, size, used in self._walk(anchor, direction, most):
                if used and not movable(start):
                    run, length = [], 0
                    continue
                length += size
                if used:
                    run.append(start)
                if length >= pages:
                    return run
        return []

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """(first page, pages, whether in use) of every extent, by address."""
        start = 0
        while start < self.total:
            length = self._length[start]
            if length == 0:
                raise ArenaCorrupt(f"page {start} belongs to no extent")
            yield start, abs(length), length > 0
            start += abs(length)

    def check(self) -> None:
        """Raise `ArenaCorrupt` unless the promises hold, counted anew."""
        used = free = extents = 0
        for start, pages, taken in self.extents():
            used += pages if taken else 0
            free += 0 if taken else pages
            extents += not taken
            if self._start[start + pages - 1] != start:
                raise ArenaCorrupt(f"the extent at page {start} has no end")
            if any(start < end < start + pages for end in self._ends):
                raise ArenaCorrupt(f"the extent at page {start} crosses the end of a region")
            if not taken and start not in self._bins.get(pages, ()):
                raise ArenaCorrupt(f"the free extent at page {start} cannot be found")
        if (used, free, extents) != (self.used, self.free, self._extents):
            raise ArenaCorrupt(f"{used} pages in use and {free} free, counted {self.used} and {self.free}")

    def _use(self, start: int, length: int, pages: int) -> None:
        """Of the free extent of `length` pages at `start` the first `pages` are taken."""
        self._extents -= 1
        self._length[start] = pages
        self._start[start + pages - 1] = start
        if length > pages:
            self._set_free(start + pages, length - pages)
        self.used += pages

    def _walk(self, anchor: int, direction: int, most: int) -> Iterator[tuple[int, int, bool]]:
        """At most `most` extents of the anchor's region from it on, upwards or downwards."""
        start = anchor
        for _ in range(most):
            length = self._length[start]
            yield start, abs(length), length > 0
            if direction > 0:
                start += abs(length)
                if start >= self.total or start in self._ends:
                    return
            elif start == 0 or start in self._ends:
                return
            else:
                start = self._start[start - 1]

    def _set_free(self, start: int, pages: int) -> None:
        self._length[start] = -pages
        self._start[start + pages - 1] = start
        found = self._bins.get(pages)
        if found is None:
            found = self._bins[pages] = []
            bisect.insort(self._lengths, pages)
        heapq.heappush(found, start)
        self._entries += 1
        self._extents += 1
        if self._entries > 2 * self._extents + _STALE:
            self._rebuild()

    def _fit(self, pages: int) -> tuple[int, int] | None:
        """Take the best free extent out of the bins. What merged into another since is dropped on the way."""
        at = bisect.bisect_left(self._lengths, pages)
        while at < len(self._lengths):
            length = self._lengths[at]
            heap = self._bins[length]
            while heap:
                start = heapq.heappop(heap)
                self._entries -= 1
                if self._length[start] == -length:
                    return start, length
            del self._bins[length], self._lengths[at]
        return None

    def _rebuild(self) -> None:
        """Bins without what is stale."""
        self._bins = {}
        for start, pages, taken in self.extents():
            if not taken:
                self._bins.setdefault(pages, []).append(start)  # by address, so a heap already
        self._lengths = sorted(self._bins)
        self._entries = self._extents
