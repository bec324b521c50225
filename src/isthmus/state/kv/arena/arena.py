"""Records in the arena: which there are, where they lie, and copies in and out of them.

A record is in one of these states, and the conservation law holds after every call:

    begin -> WRITING -publish-> VISIBLE -remove-> LEAVING (while pinned) -last unpin-> pages free
                └─abandon─────────┴──────────remove, not pinned─────────────────────> pages free
                                  └─quarantine-> pages never used again        free + used == total

A pinned record's pages are never free. Promises to readers in other processes, who hold no lock: the cell of a
record's first page in the generation table is its generation, which no other record of this epoch ever has, from the
moment its bytes are complete; it is zero again before any of its pages may be written to. So bytes copied out are the
record's if the cell still has its generation after the copy, and if they have its digests.

Safe under the lock of its owner; `fill`, `fetch`, `intact` and `erase_bytes` are called without it, on a pinned record.
"""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from isthmus.contracts.blocks import Lifetime, Owner, Shape
from isthmus.contracts.clock import Entropy
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.copying import copy_digests, copy_verified, digests_slice
from isthmus.state.kv.arena.crew import Crew
from isthmus.state.kv.arena.extents import PAGE_BYTES, ArenaCorrupt, Extents
from isthmus.state.kv.arena.memory import ArenaMemory

EPOCH_BYTES = 16
WIPE_PAGES = 4096


class State(enum.IntEnum):
    """What a record in the arena is good for."""

    WRITING = 0
    VISIBLE = 1
    LEAVING = 2
    """Nobody finds it any more; somebody still reads or fills its pages."""
    GONE = 3


def pages_of(size: int) -> int:
    """How many pages `size` bytes take."""
    return -(-size // PAGE_BYTES)


@dataclass(slots=True, eq=False)
class Record:
    """One record in the arena. `sequence` is its number in the log (0: not there), `page` its first page."""

    key: BlockKey
    parent: BlockKey | None
    owner: Owner
    shape: Shape
    lifetime: Lifetime
    page: int
    generation: int = 0
    digests: bytes = b""
    state: State = State.WRITING
    pins: int = 1
    sequence: int = 0
    hits: int = 0

    @property
    def record_bytes(self) -> int:
        """Bytes of the record, without what its last page has left over."""
        return self.shape.record_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of its pages."""
        return pages_of(self.shape.record_bytes) * PAGE_BYTES


class Arena:
    """The records in `memory`. A new arena is empty, and its epoch is new: what readers knew of another is void. `crew`
    helps with large copies.
    """

    def __init__(self, memory: ArenaMemory, entropy: Entropy, crew: Crew | None = None) -> None:
        self.memory = memory
        self._crew = crew
        self.epoch = entropy.token_bytes(EPOCH_BYTES)
        self.quarantined_pages = 0
        self._extents = Extents([region.size // PAGE_BYTES for region in memory.regions])
        self._region_pages = memory.regions[0].size // PAGE_BYTES
        self._records: dict[BlockKey, Record] = {}
        self._by_page: dict[int, Record] = {}
        self._generation = 0

    # Under the owner's lock

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        """The records that are visible."""
        return (record for record in self._records.values() if record.state is State.VISIBLE)

    @property
    def capacity(self) -> int:
        """Bytes of all pages."""
        return self._extents.total * PAGE_BYTES

    @property
    def used(self) -> int:
        """Bytes of the pages in use, quarantined ones among them."""
        return self._extents.used * PAGE_BYTES

    @property
    def quarantined_bytes(self) -> int:
        """Bytes that are not used again."""
        return self.quarantined_pages * PAGE_BYTES

    @property
    def largest(self) -> int:
        """Bytes of the largest record that an empty arena could hold."""
        return self._region_pages * PAGE_BYTES

    def holds(self, key: BlockKey) -> bool:
        """Whether a record of this key is visible or being written."""
        return key in self._records

    def find(self, key: BlockKey) -> Record | None:
        """The visible record of this key."""
        record = self._records.get(key)
        return record if record is not None and record.state is State.VISIBLE else None

    def begin(
        self, key: BlockKey, parent: BlockKey | None, owner: Owner, shape: Shape, lifetime: Lifetime
    ) -> Record | None:
        """Pages for a record whose key is not here, pinned once and not visible; None when there is no room."""
        if key in self._records:
            raise ArenaCorrupt("a record with this key is in the arena")
        page = self._extents.take(pages_of(shape.record_bytes))
        if page is None:
            return None
        record = Record(key, parent, owner, shape, lifetime, page)
        self._records[key] = self._by_page[page] = record
        return record

    def publish(self, record: Record) -> None:
        """The record is complete: visible from now on. Its pin stays."""
        if record.state is not State.WRITING:
            raise ArenaCorrupt(f"a record is published that is {record.state.name}")
        self._generation += 1
        record.generation = self._generation
        record.state = State.VISIBLE
        self.memory.generations[record.page] = record.generation

    def pin(self, record: Record) -> None:
        """Its pages stay until as many `unpin`."""
        if record.state is State.GONE:
            raise ArenaCorrupt("a record that is gone is pinned")
        record.pins += 1

    def unpin(self, record: Record) -> None:
        """One pin less. With the last one the pages of a record that left are free."""
        if record.pins < 1:
            raise ArenaCorrupt("a record is unpinned that is not pinned")
        record.pins -= 1
        if record.state is State.LEAVING and record.pins == 0:
            self._free(record)

    def remove(self, record: Record) -> None:
        """Nobody finds it from now on; its pages are free when it is not pinned (any more)."""
        if record.state in (State.LEAVING, State.GONE):
            return
        self.memory.generations[record.page] = 0
        del self._records[record.key]
        record.state = State.LEAVING
        if record.pins == 0:
            self._free(record)

    def quarantine(self, record: Record) -> None:
        """As `remove`, but its pages are not used again: the memory under them may be bad."""
        if record.state in (State.LEAVING, State.GONE):
            return
        self.memory.generations[record.page] = 0
        del self._records[record.key], self._by_page[record.page]
        record.state = State.GONE
        self.quarantined_pages += pages_of(record.record_bytes)

    def around(
        self, record: Record, size: int, most: int, spare: Callable[[Record], bool] = lambda _: False
    ) -> list[Record]:
        """Records, none pinned and none to `spare`, whose removal makes room in one piece for `size` bytes near
        `record`; at most `most` are looked at. Empty: none such.
        """

        def movable(page: int) -> bool:
            found = self._by_page.get(page)
            return found is not None and found.pins == 0 and not spare(found)

        pages = self._extents.window(record.page, pages_of(size), movable, most)
        return [self._by_page[page] for page in pages]

    def take_free(self, page: int) -> tuple[int, int] | None:
        """Take some free pages from `page` on, to be wiped and given back: (first page, pages). None: none is free."""
        return self._extents.take_next(page, WIPE_PAGES)

    def give_free(self, page: int) -> None:
        """Undo `take_free`."""
        self._extents.give(page)

    def place(self, record: Record) -> tuple[int, int]:
        """(region, offset in it) of the record's first byte."""
        region, page = divmod(record.page, self._region_pages)
        return region, page * PAGE_BYTES

    def check(self) -> None:
        """Raise `ArenaCorrupt` unless the conservation law holds, counted anew."""
        self._extents.check()
        in_use = {start: pages for start, pages, taken in self._extents.extents() if taken}
        known = {page: pages_of(record.record_bytes) for page, record in self._by_page.items()}
        if any(in_use.get(page) != pages for page, pages in known.items()):
            raise ArenaCorrupt("a record lies where the allocator knows nothing of it")
        if sum(in_use.values()) - sum(known.values()) != self.quarantined_pages:
            raise ArenaCorrupt("pages are in use that no record has")
        cells = {page: record.generation for page, record in self._by_page.items() if record.state is State.VISIBLE}
        for page in np.flatnonzero(self.memory.generations):
            if cells.pop(int(page), 0) != self.memory.generations[page]:
                raise ArenaCorrupt(f"page {page} has a generation that no record has")
        if cells:
            raise ArenaCorrupt("visible records have no generation in the table")

    # Without the lock, on a pinned record

    def view(self, record: Record, first_chunk: int = 0, chunks: int | None = None) -> memoryview:
        """The bytes of its chunks, writable."""
        count = record.shape.chunks - first_chunk if chunks is None else chunks
        region, offset = self.place(record)
        start = offset + first_chunk * record.shape.chunk_bytes
        return self.memory.regions[region].view[start : start + count * record.shape.chunk_bytes]

    def fill(self, record: Record, payload: memoryview) -> bytes:
        """Copy the payload in; the digests of what lies in the arena then (they become the record's)."""
        record.digests = copy_digests(payload, self.view(record), record.shape.chunk_bytes, self._crew)
        return record.digests

    def fetch(self, record: Record, first_chunk: int, chunks: int, into: memoryview) -> bool:
        """Copy chunks out; whether the copy has the record's digests."""
        expected = digests_slice(record.digests, first_chunk, chunks)
        source = self.view(record, first_chunk, chunks)
        return copy_verified(source, into, record.shape.chunk_bytes, expected, self._crew)

    def erase_bytes(self, record: Record) -> None:
        """Zero its bytes. It must have been removed: readers are told by the generation."""
        np.frombuffer(self.view(record), np.uint8)[:] = 0

    def wipe(self, page: int, pages: int) -> None:
        """Zero pages that `take_free` took."""
        region, first = divmod(page, self._region_pages)
        view = self.memory.regions[region].view[first * PAGE_BYTES : (first + pages) * PAGE_BYTES]
        np.frombuffer(view, np.uint8)[:] = 0

    def _free(self, record: Record) -> None:
        record.state = State.GONE
        del self._by_page[record.page]
        self._extents.give(record.page)
