"""What is particular to the journal over SQLite: crashes, locks, damage, limits, reading beside a writer."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.errors import InvalidInput, JournalUnavailable
from isthmus.contracts.journal import Append, NewEvent
from isthmus.state.journal.reader import JournalReader
from isthmus.state.journal.sqlite import JournalSettings, SqliteJournal, open_journal

CHILD = """
import asyncio, itertools, sys
from pathlib import Path
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.journal import Append, NewEvent
from isthmus.state.journal.sqlite import JournalSettings, open_journal

async def writer(journal, name, start):
    for i in itertools.count(start):
        version = await journal.append([Append(name, (NewEvent(str(i), "k", b"x" * (i % 5000)),))])
        print(name, i, version[0], flush=True)

async def main():
    journal = await open_journal(Path(sys.argv[1]), JournalSettings(), SystemClock())
    await asyncio.gather(*(writer(journal, f"s{n}", int(sys.argv[2])) for n in range(4)))

asyncio.run(main())
"""


def opened(path: Path, **limits: int) -> SqliteJournal:
    return SqliteJournal(path, JournalSettings(**limits), ManualClock())


def event(name: str, body: bytes = b"x") -> NewEvent:
    return NewEvent(name, "k", body)


def child(path: Path, start: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(path), str(start)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "src"})


def kill_rounds(path: Path, rounds: int) -> None:
    """Kill a writer at a different point each time; after each, every acknowledged event is there, in order."""
    acknowledged: dict[str, int] = {}
    for round_ in range(rounds):
        with child(path, round_ * 1_000_000) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(1 + round_ * 17 % 90)]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        for line in lines:
            words = line.split()
            if line.endswith("\n") and len(words) == 3:
                acknowledged[f"{words[0]} {words[1]}"] = int(words[2])
        reader = JournalReader(path)
        stored = [e for n in range(4) for e in reader.read(f"s{n}", limit=10_000)]
        reader.close()
        found = {f"{e.stream} {e.event_id}": e.version for e in stored}
        assert acknowledged.items() <= found.items()
        assert all(e.body == b"x" * (int(e.event_id) % 5000) for e in stored)
    assert acknowledged


def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    kill_rounds(tmp_path / "journal.db", 4)


@pytest.mark.chaos
def test_kill_9_loses_nothing_acknowledged_many_times(tmp_path: Path) -> None:
    kill_rounds(tmp_path / "journal.db", 100)


def test_a_second_writer_is_refused_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with child(path, 0) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(JournalUnavailable, match=f"already has a writer .process {process.pid}"):
            opened(path)
        process.kill()
    asyncio.run(opened(path).close())


def test_readers_see_what_a_living_writer_committed(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"

    async def main() -> None:
        journal = opened(path)
        await journal.append([Append(f"request/a{suffix}", (event("1"),)) for suffix in ("", ".1", ".2", "b")])
        reader = JournalReader(path)
        assert reader.streams("request/a.") == ["request/a.1", "request/a.2"]
        assert reader.streams("request/a.", limit=1) == ["request/a.1"]
        await journal.append([Append("request/a", (event("2"),))])
        assert [e.event_id for e in reader.read("request/a")] == ["1", "2"]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._connection.execute("DELETE FROM events")
        reader.close()
        await journal.close()

    asyncio.run(main())
    reader = JournalReader(path)  # and after the writer has gone
    assert len(reader.read("request/a")) == 2
    reader.close()


def test_files_are_private_and_nothing_is_left_over(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.db"
    asyncio.run(opened(path).close())
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert sorted(p.name for p in path.parent.iterdir()) == ["journal.db", "journal.db.lock"]


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_damaged_file_is_refused_untouched_with_advice(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(content)
    with pytest.raises(JournalUnavailable, match="move it away"):
        opened(path)
    assert path.read_bytes() == content
    with pytest.raises(JournalUnavailable, match="move it away"):
        JournalReader(path)


def test_damage_within_a_file_is_reported_and_stops_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"

    async def fill() -> None:
        journal = opened(path)
        for n in range(40):
            await journal.append([Append("s", (event(str(n), b"y" * 3000),))])
        await journal.close()

    async def use() -> None:
        journal = opened(path)
        with pytest.raises(JournalUnavailable, match="move it away"):
            await journal.read("s")
        with pytest.raises(JournalUnavailable, match="move it away"):
            await journal.append([Append("s", (event("new"),))])
        with pytest.raises(JournalUnavailable, match="until the server is started again"):
            await journal.append([Append("other", (event("new"),))])
        await journal.close()

    asyncio.run(fill())
    data = bytearray(path.read_bytes())
    for page in range(3, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(data)
    asyncio.run(use())


def test_other_databases_and_newer_schemas_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(JournalUnavailable, match="another program"):
        opened(other)
    newer = tmp_path / "newer.db"
    asyncio.run(opened(newer).close())
    with sqlite3.connect(newer) as connection:
        connection.execute("INSERT INTO schema_version VALUES (99, 0)")
    connection.close()
    with pytest.raises(JournalUnavailable, match="schema version 99"):
        opened(newer)
    with pytest.raises(JournalUnavailable, match="schema version 99"):
        JournalReader(newer)
    with pytest.raises(JournalUnavailable, match="does not exist"):
        JournalReader(tmp_path / "none.db")


def test_a_full_journal_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    async def main() -> None:
        journal = opened(tmp_path / "journal.db", max_bytes=64 * 4096)
        kept = 0
        while journal.stats.failures == 0 and kept < 64:
            with suppress(JournalUnavailable):
                await journal.append([Append("s", (event(str(kept), b"z" * 4000),))])
                kept += 1
        assert 10 < kept < 64
        with pytest.raises(JournalUnavailable, match="full"):
            await journal.append([Append("s", (event("more", b"z" * 4000),))])
        assert len(await journal.read("s")) == kept
        await journal.close()
        with pytest.raises(InvalidInput, match="max_bytes"):
            opened(tmp_path / "other.db", max_bytes=4096)

    asyncio.run(main())


def test_waiting_appends_are_bounded_and_share_commits(tmp_path: Path) -> None:
    async def main() -> None:
        journal = await open_journal(tmp_path / "journal.db", JournalSettings(max_waiting=8), ManualClock())
        calls = [journal.append([Append("s", (event(str(n)),))]) for n in range(200)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [r for r in results if isinstance(r, JournalUnavailable)]
        assert refused
        assert "wait for the disk" in str(refused[0])
        assert len(await journal.read("s")) == 200 - len(refused) == journal.stats.appends
        assert journal.stats.commits < journal.stats.appends
        await journal.close()

    asyncio.run(main())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalUnavailable, match=r"journal\.db"):
        opened(tmp_path / "file" / "journal.db")
