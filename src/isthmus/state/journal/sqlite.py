"""The journal over SQLite: one writer process, one writer thread, group commit.

Promises: an append is on disk (WAL, `synchronous=FULL`) before it returns, all of its batch or nothing; a crash at
any moment loses nothing that was acknowledged; a second writer is refused. Appends that wait together share one
fsync, each in a savepoint of its own, so a conflict in one does not touch the others. After an I/O error or damage
nothing more is acknowledged until the journal is opened again: what the page cache holds is unknown then.
"""

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import InvalidInput, JournalConflict, JournalError, JournalUnavailable
from isthmus.contracts.journal import MAX_BATCH_EVENTS, Append, StoredEvent
from isthmus.state.journal.lock import WriterLock
from isthmus.state.journal.reader import JournalReader
from isthmus.state.journal.schema import PAGE_BYTES, describe, is_damage, open_writer

_VERSION = "SELECT coalesce(max(version), 0) FROM events WHERE stream = ?"
_HAS = "SELECT 1 FROM events WHERE stream = ? AND event_id = ?"
_INSERT = "INSERT INTO events (stream, version, event_id, kind, body, recorded_at) VALUES (?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class JournalSettings:
    """Limits. `max_bytes` is of the database file; `group` is how many waiting appends share a commit."""

    max_waiting: int = 1024
    max_bytes: int = 16 * 1024 * 1024 * 1024
    group: int = 256


@dataclass(slots=True)
class JournalStats:
    """Counters since the opening."""

    appends: int = 0
    commits: int = 0
    conflicts: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Job:
    batch: Sequence[Append]
    done: "Future[list[int]]"


class SqliteJournal:
    """Implements `ports.Journal`. Made by `open_journal`."""

    def __init__(self, path: Path, settings: JournalSettings, clock: Clock) -> None:
        """Blocking: takes the lock, opens the file, brings the schema up to date. Raises `JournalUnavailable`."""
        if settings.max_bytes < 64 * PAGE_BYTES:
            raise InvalidInput(f"max_bytes is {settings.max_bytes}, accepted: from {64 * PAGE_BYTES}", "max_bytes")
        self._path = path
        self._settings = settings
        self._clock = clock
        self._jobs: queue.Queue[_Job | None] = queue.Queue(settings.max_waiting)
        self._failure = ""
        self._closed = False
        self.stats = JournalStats()
        _make_private(path)
        self._lock = WriterLock(path)
        try:
            self._connection = open_writer(path, settings.max_bytes, clock)
            self._reader = JournalReader(path)
        except JournalError:
            self._lock.release()
            raise
        _sync_folder(path.parent)
        self._read_thread = ThreadPoolExecutor(1, thread_name_prefix="journal-read")
        self._reads = asyncio.Semaphore(settings.max_waiting)
        self._thread = threading.Thread(target=self._write, name="journal-write", daemon=True)
        self._thread.start()

    async def append(self, batch: Sequence[Append]) -> list[int]:
        """See `ports.Journal`.

        An append whose events its stream holds already is done, whatever version it expected.
        """
        if not batch or sum(len(part.events) for part in batch) > MAX_BATCH_EVENTS:
            raise InvalidInput(f"a batch has 1 to {MAX_BATCH_EVENTS} events", "batch")
        self._check_open()
        job = _Job(tuple(batch), Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full as error:
            raise JournalUnavailable(f"{self._settings.max_waiting} appends wait for the disk already") from error
        return await asyncio.wrap_future(job.done)

    async def read(self, stream: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """See `ports.Journal`, and `JournalReader.read` for its limits."""
        self._check_open()
        if self._reads.locked():
            raise JournalUnavailable(f"{self._settings.max_waiting} reads of the journal wait already")
        async with self._reads:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._read_thread, self._reader.read, stream, after, limit)

    async def close(self) -> None:
        """See `ports.Journal`."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _check_open(self) -> None:
        if self._closed:
            raise JournalUnavailable("the journal is closed")

    def _close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        self._read_thread.shutdown()
        self._reader.close()
        # Leaves one file behind where it can; a failure costs only the next opening's recovery.
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()
        self._lock.release()

    # The writer thread

    def _write(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs = [first]
            last = False
            while len(jobs) < self._settings.group and not last:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    last = True
                else:
                    jobs.append(job)
            self._commit([job for job in jobs if job.done.set_running_or_notify_cancel()])
            if last:
                return

    def _commit(self, jobs: list[_Job]) -> None:
        """Answer every job: written together by one commit, or refused."""
        if not jobs:
            return
        if self._failure:
            self._refuse(jobs, JournalUnavailable(self._failure))
            return
        written: list[tuple[_Job, list[int]]] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for job in jobs:
                versions = self._try_job(job)
                if versions is not None:
                    written.append((job, versions))
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self.stats.failures += 1
            message = describe(self._path, error)
            if is_damage(error) or getattr(error, "sqlite_errorname", "").startswith("SQLITE_IOERR"):
                self._failure = f"{message}. Nothing is written until the server is started again"
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            self._refuse(jobs, JournalUnavailable(message))
            return
        self.stats.commits += 1
        self.stats.appends += len(written)
        for job, versions in written:
            job.done.set_result(versions)

    def _try_job(self, job: _Job) -> list[int] | None:
        """Write one batch in a savepoint. None when it conflicted (it is answered then)."""
        self._connection.execute("SAVEPOINT job")
        try:
            versions = [self._append_one(part) for part in job.batch]
        except JournalConflict as error:
            self._connection.execute("ROLLBACK TO job")
            self._connection.execute("RELEASE job")
            self.stats.conflicts += 1
            job.done.set_exception(error)
            return None
        self._connection.execute("RELEASE job")
        return versions

    def _append_one(self, part: Append) -> int:
        version: int = self._connection.execute(_VERSION, (part.stream,)).fetchone()[0]
        fresh = [e for e in part.events if not self._connection.execute(_HAS, (part.stream, e.event_id)).fetchone()]
        if not fresh:
            return version
        if part.expected is not None and part.expected != version:
            raise JournalConflict(f"the stream is at version {version}, not at the expected {part.expected}")
        now = self._clock.wall()
        seen: set[str] = set()
        for event in fresh:
            if event.event_id not in seen:
                seen.add(event.event_id)
                version += 1
                values = (part.stream, version, event.event_id, event.kind, event.body, now)
                self._connection.execute(_INSERT, values)
        return version

    def _refuse(self, jobs: list[_Job], error: JournalUnavailable) -> None:
        for job in jobs:
            if not job.done.done():
                job.done.set_exception(error)


async def open_journal(path: Path, settings: JournalSettings, clock: Clock) -> SqliteJournal:
    """Open (or create) the journal in `path` for writing. Raises `JournalUnavailable`."""
    return await asyncio.get_running_loop().run_in_executor(None, SqliteJournal, path, settings, clock)


def _make_private(path: Path) -> None:
    """Create folder and file for the owner only, before SQLite would create them for more."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise JournalUnavailable(f"{path} cannot be created: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    """Make the names of new files durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
