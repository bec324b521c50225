"""The conformance suite of `ports.Journal`: every backend passes it. To add one, add an opener to `BACKENDS`."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.errors import InvalidInput, JournalConflict, JournalUnavailable
from isthmus.contracts.journal import MAX_BATCH_EVENTS, Append, NewEvent
from isthmus.contracts.ports import Journal
from isthmus.state.journal.sqlite import JournalSettings, open_journal

Opener = Callable[[Path], AbstractAsyncContextManager[Journal]]


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Journal]:
    journal = await open_journal(folder / "journal.db", JournalSettings(), ManualClock())
    try:
        yield journal
    finally:
        await journal.close()


BACKENDS: dict[str, Opener] = {"sqlite": sqlite}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Opener:
    return BACKENDS[request.param]


def event(event_id: str, body: bytes = b"x", kind: str = "k") -> NewEvent:
    return NewEvent(event_id, kind, body)


def run(backend: Opener, folder: Path, body: Callable[[Journal], Awaitable[object]]) -> None:
    async def main() -> None:
        async with backend(folder) as journal:
            await body(journal)

    asyncio.run(main())


def test_events_come_back_as_they_were_written(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        assert await journal.append([Append("s", (event("a", b"\x00\xff"), event("b", b"", "other")))]) == [2]
        assert await journal.append([Append("t", (event("a"),))]) == [1]
        stored = await journal.read("s")
        assert [(e.version, e.event_id, e.kind, e.body, e.stream) for e in stored] == [
            (1, "a", "k", b"\x00\xff", "s"),
            (2, "b", "other", b"", "s"),
        ]
        assert all(e.recorded_at == ManualClock().wall() for e in stored)
        (other,) = await journal.read("t")
        assert other.position > stored[1].position > stored[0].position
        assert await journal.read("nothing") == []

    run(backend, tmp_path, body)


def test_reading_goes_on_after_a_version(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        await journal.append([Append("s", tuple(event(str(i)) for i in range(10)))])
        assert [e.version for e in await journal.read("s", after=3, limit=4)] == [4, 5, 6, 7]
        assert await journal.read("s", after=10) == []

    run(backend, tmp_path, body)


def test_a_conflict_writes_nothing_of_the_batch(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        assert await journal.append([Append("s", (event("a"),), expected=0)]) == [1]
        with pytest.raises(JournalConflict, match="version 1"):
            await journal.append([Append("t", (event("b"),)), Append("s", (event("b"),), expected=0)])
        assert await journal.read("t") == []
        assert len(await journal.read("s")) == 1
        assert await journal.append([Append("s", (event("b"),), expected=1), Append("t", (event("b"),))]) == [2, 1]

    run(backend, tmp_path, body)


def test_a_batch_sees_its_own_earlier_parts(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        parts = [Append("s", (event("a"),), expected=0), Append("s", (event("b"),), expected=1)]
        assert await journal.append(parts) == [1, 2]

    run(backend, tmp_path, body)


def test_an_append_is_idempotent_by_event_id(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        first = Append("s", (event("a"), event("b")), expected=0)
        assert await journal.append([first]) == [2]
        assert await journal.append([first]) == [2]  # a retry after a lost answer is no conflict
        assert await journal.append([Append("s", (event("b"), event("c"), event("c")), expected=2)]) == [3]
        assert [e.event_id for e in await journal.read("s")] == ["a", "b", "c"]
        assert await journal.append([Append("t", (event("a"),))]) == [1]  # ids are of their stream

    run(backend, tmp_path, body)


def test_one_of_many_racing_conditional_appends_wins(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        calls = (journal.append([Append("s", (event(str(i)),), expected=0)]) for i in range(32))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results.count([1]) == 1
        assert sum(isinstance(result, JournalConflict) for result in results) == 31
        assert len(await journal.read("s")) == 1

    run(backend, tmp_path, body)


def test_many_concurrent_appends_all_land(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        calls = (journal.append([Append(f"s{i % 7}", (event(str(i)),))]) for i in range(300))
        await asyncio.gather(*calls)
        kept = [e for i in range(7) for e in await journal.read(f"s{i}")]
        assert sorted(int(e.event_id) for e in kept) == list(range(300))
        assert len({e.position for e in kept}) == 300

    run(backend, tmp_path, body)


def test_events_outlive_the_journal_object(backend: Opener, tmp_path: Path) -> None:
    async def write(journal: Journal) -> None:
        await journal.append([Append("s", (event("a"),))])

    async def check(journal: Journal) -> None:
        assert [e.event_id for e in await journal.read("s")] == ["a"]
        assert await journal.append([Append("s", (event("b"),), expected=1)]) == [2]

    run(backend, tmp_path, write)
    run(backend, tmp_path, check)


def test_limits_are_refused(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        with pytest.raises(InvalidInput, match="batch"):
            await journal.append([])
        many = tuple(event(str(i)) for i in range(MAX_BATCH_EVENTS))
        with pytest.raises(InvalidInput, match="batch"):
            await journal.append([Append("s", many), Append("t", (event("a"),))])
        with pytest.raises(InvalidInput, match="limit"):
            await journal.read("s", limit=0)

    run(backend, tmp_path, body)


def test_a_closed_journal_says_so(backend: Opener, tmp_path: Path) -> None:
    async def body(journal: Journal) -> None:
        accepted = asyncio.create_task(journal.append([Append("s", (event("a"),))]))
        await asyncio.sleep(0)
        await journal.close()
        assert await accepted == [1]  # what was accepted is finished
        with pytest.raises(JournalUnavailable):
            await journal.append([Append("s", (event("b"),))])
        with pytest.raises(JournalUnavailable):
            await journal.read("s")

    run(backend, tmp_path, body)


STREAMS = st.sampled_from(["a", "b"])
IDS = st.sampled_from("pqrs")
PARTS = st.lists(
    st.tuples(STREAMS, st.lists(IDS, min_size=1, max_size=3), st.none() | st.integers(0, 5)), min_size=1, max_size=3
)


class JournalMachine(RuleBasedStateMachine):
    """Against a dict of lists: the same answers, the same conflicts, the same content, also after opening again."""

    opener: Opener = staticmethod(sqlite)

    @initialize()
    def open(self) -> None:
        self.runner = asyncio.Runner()
        self.path = Path(tempfile.mkdtemp(dir=self.base))
        self.model: dict[str, list[str]] = {"a": [], "b": []}
        self.context = self.opener(self.path)
        self.journal = self.runner.run(self.context.__aenter__())

    @rule(parts=PARTS)
    def append(self, parts: list[tuple[str, list[str], int | None]]) -> None:
        after = {name: list(ids) for name, ids in self.model.items()}
        versions: list[int] | None = []
        for stream, ids, expected in parts:
            fresh = [i for i in dict.fromkeys(ids) if i not in after[stream]]
            if fresh and expected is not None and expected != len(after[stream]):
                versions = None
                break
            after[stream] += fresh
            versions.append(len(after[stream]))
        batch = [Append(stream, tuple(map(event, ids)), expected) for stream, ids, expected in parts]
        if versions is None:
            with pytest.raises(JournalConflict):
                self.runner.run(self.journal.append(batch))
        else:
            assert self.runner.run(self.journal.append(batch)) == versions
            self.model = after

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.context.__aexit__(None, None, None))
        self.context = self.opener(self.path)
        self.journal = self.runner.run(self.context.__aenter__())

    @invariant()
    def same_content(self) -> None:
        for stream, ids in getattr(self, "model", {}).items():
            stored = self.runner.run(self.journal.read(stream))
            assert [e.event_id for e in stored] == ids
            assert [e.version for e in stored] == list(range(1, len(ids) + 1))

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.runner.run(self.context.__aexit__(None, None, None))
            self.runner.close()


def test_state_machine(backend: Opener, tmp_path: Path) -> None:
    JournalMachine.base = tmp_path
    JournalMachine.opener = staticmethod(backend)
    machine = JournalMachine.TestCase()
    machine.settings = settings(
        max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.runTest()
