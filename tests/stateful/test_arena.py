"""Hypothesis state machines for the arena: its allocator against a plain list, and its records against a dictionary.

Promises: free + used == total and no two extents overlap, after every call; what is visible reads back as it was
written; the pages of a pinned record are never handed out; a generation is never used twice, and a cell of the table
is zero unless its record is visible.
Release figure (`make chaos`): 1,000 examples of 50 steps; `make test` runs fewer.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from tests.support.scale import examples

from isthmus.contracts.blocks import NO_SESSION, Lifetime, Owner, RecordKind, Shape
from isthmus.contracts.clock import SystemEntropy
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.arena import Arena, Record, State
from isthmus.state.kv.arena.extents import PAGE_BYTES, Extents
from isthmus.state.kv.arena.memory import create_arena

REGIONS = (7, 7, 4)
OWNER = Owner(b"n" * 16, NO_SESSION)


class ExtentsMachine(RuleBasedStateMachine):
    """A list of pages says what is taken; the smallest hole that fits must be used, the lowest among equals."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(REGIONS)
        self.pages: list[int] = [-1] * sum(REGIONS)

    def holes(self) -> list[tuple[int, int]]:
        """(pages, first page) of every hole, cut at the ends of regions."""
        found, start, first = [], None, 0
        for size in REGIONS:
            for page in range(first, first + size):
                if self.pages[page] < 0:
                    start = page if start is None else start
                elif start is not None:
                    found.append((page - start, start))
                    start = None
            if start is not None:
                found.append((first + size - start, start))
                start = None
            first += size
        return sorted(found)

    @rule(pages=st.integers(1, 8))
    def take(self, pages: int) -> None:
        fitting = [hole for hole in self.holes() if hole[0] >= pages]
        assert self.extents.take(pages) == (fitting[0][1] if fitting else None)
        if fitting:
            first = fitting[0][1]
            self.pages[first : first + pages] = [first] * pages

    @rule(choice=st.integers(0, 17))
    def give(self, choice: int) -> None:
        taken = sorted({first for first in self.pages if first >= 0})
        if taken:
            first = taken[choice % len(taken)]
            assert self.extents.give(first) == self.pages.count(first)
            self.pages = [-1 if page == first else page for page in self.pages]

    @rule(choice=st.integers(0, 17), pages=st.integers(1, 8), kept=st.sets(st.integers(0, 17)))
    def window(self, choice: int, pages: int, kept: set[int]) -> None:
        taken = sorted({first for first in self.pages if first >= 0})
        if taken:
            found = self.extents.window(taken[choice % len(taken)], pages, lambda page: page not in kept, 100)
            assert not kept & set(found)
            if found:
                after = [-1 if page in found else page for page in self.pages]
                self.pages, before = after, self.pages
                assert max(self.holes())[0] >= pages, "what the window names makes room"
                self.pages = before

    @invariant()
    def conserved(self) -> None:
        self.extents.check()
        assert self.extents.free + self.extents.used == sum(REGIONS)
        assert self.extents.free == self.pages.count(-1)


class ArenaMachine(RuleBasedStateMachine):
    """Records come, are pinned, read, removed and quarantined in any order."""

    records = Bundle("records")

    def __init__(self) -> None:
        super().__init__()
        memory = create_arena(sum(REGIONS) * PAGE_BYTES, 7 * PAGE_BYTES, check=lambda _: None)
        self.arena = Arena(memory, SystemEntropy())
        self.bytes: dict[int, bytes] = {}
        self.pins: dict[int, int] = {}
        self.live: dict[int, Record] = {}
        self.generations: set[int] = set()
        self.serial = 0

    @rule(target=records, key=st.integers(0, 5), size=st.integers(1, 3 * PAGE_BYTES), chunks=st.integers(1, 3))
    def begin(self, key: int, size: int, chunks: int) -> int:
        payload = bytes([key + 1]) * (size * chunks)
        shape = Shape(RecordKind.BLOCK, chunks, size)
        name = BlockKey(bytes([key]) * 32)
        self.serial += 1
        if not self.arena.holds(name):
            record = self.arena.begin(name, None, OWNER, shape, Lifetime.SESSION)
            if record is not None:
                self.live[self.serial] = record
                self.bytes[self.serial] = payload
                self.pins[self.serial] = 1
        return self.serial

    @rule(serial=records)
    def publish(self, serial: int) -> None:
        record = self.live.get(serial)
        if record is not None and record.state is State.WRITING:
            self.arena.fill(record, memoryview(self.bytes[serial]))
            self.arena.publish(record)
            assert record.generation not in self.generations
            self.generations.add(record.generation)

    @rule(serial=records)
    def pin(self, serial: int) -> None:
        record = self.live.get(serial)
        if record is not None and record.state is not State.GONE:
            self.arena.pin(record)
            self.pins[serial] += 1

    @rule(serial=records)
    def unpin(self, serial: int) -> None:
        record = self.live.get(serial)
        if record is not None and self.pins[serial]:
            if record.state is State.WRITING and self.pins[serial] == 1:
                self.arena.remove(record)  # a writer that gives up
            self.arena.unpin(record)
            self.pins[serial] -= 1

    @rule(serial=records)
    def remove(self, serial: int) -> None:
        if serial in self.live:
            self.arena.remove(self.live[serial])

    @rule(serial=consumes(records))
    def quarantine(self, serial: int) -> None:
        record = self.live.get(serial)
        if record is not None and record.state is State.VISIBLE:
            self.arena.quarantine(record)

    @rule(serial=records, size=st.integers(1, 7))
    def make_room(self, serial: int, size: int) -> None:
        record = self.live.get(serial)
        if record is not None and record.state is State.VISIBLE:
            for found in self.arena.around(record, size * PAGE_BYTES, 100):
                assert found.pins == 0
                self.arena.remove(found)

    @invariant()
    def what_is_pinned_or_visible_is_whole(self) -> None:
        self.arena.check()
        for serial, record in self.live.items():
            if record.state is State.VISIBLE:
                into = bytearray(record.record_bytes)
                assert self.arena.fetch(record, 0, record.shape.chunks, memoryview(into))
                assert into == self.bytes[serial]
                assert self.arena.find(record.key) is record
            elif self.pins[serial] and record.digests:
                assert bytes(self.arena.view(record)) == self.bytes[serial], "pinned pages are not handed out"

    def teardown(self) -> None:
        self.arena.memory.close()


SETTINGS = settings(
    max_examples=examples(60, 1000), stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestExtents = ExtentsMachine.TestCase
TestExtents.settings = SETTINGS
TestArena = ArenaMachine.TestCase
TestArena.settings = SETTINGS
