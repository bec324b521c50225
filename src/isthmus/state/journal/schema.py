"""The SQLite form of the journal: tables, versions, and how a file is opened.

One table holds every event; a stream's version is the highest of its events, found in an index. `application_id`
marks the file as ours, so that no other database is ever written to. Migrations only go forward; a newer file is
refused.
"""

import sqlite3
from pathlib import Path

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import JournalUnavailable

APPLICATION_ID = 0x49535448  # "ISTH"
SCHEMA_VERSION = 1
PAGE_BYTES = 4096
BUSY_MS = 5000
WAL_LIMIT_BYTES = 64 * 1024 * 1024
MIN_SQLITE = (3, 37, 0)

_TABLES = (
    "CREATE TABLE schema_version (version INTEGER PRIMARY KEY, applied_at REAL NOT NULL) STRICT",
    """CREATE TABLE events (
        position INTEGER PRIMARY KEY,
        stream TEXT NOT NULL,
        version INTEGER NOT NULL,
        event_id TEXT NOT NULL,
        kind TEXT NOT NULL,
        body BLOB NOT NULL,
        recorded_at REAL NOT NULL,
        UNIQUE (stream, version),
        UNIQUE (stream, event_id)
    ) STRICT""",
)


def open_writer(path: Path, max_bytes: int, clock: Clock) -> sqlite3.Connection:
    """A connection that may write, its schema current. Raises `JournalUnavailable`.

    WAL with `synchronous=FULL`: a commit returns when its frames have been fsynced to the log (sqlite.org/wal.html).
    """
    _check_library()
    with translated(path):
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000)
        try:
            _check_identity(path, connection, may_be_new=True)
            connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                raise JournalUnavailable(f"{path}: this file system cannot hold a write-ahead log (mode {mode})")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}")
            connection.execute(f"PRAGMA max_page_count={max_bytes // PAGE_BYTES}")
            _migrate(connection, clock)
        except (sqlite3.Error, JournalUnavailable):
            connection.close()
            raise
    return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, also while another process does. Raises `JournalUnavailable`."""
    _check_library()
    if not path.exists():
        raise JournalUnavailable(f"{path} does not exist: nothing has been recorded here")
    with translated(path):
        address = f"{path.resolve().as_uri()}?mode=ro"
        connection = sqlite3.connect(
            address, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000
        )
        try:
            _check_identity(path, connection, may_be_new=False)
        except (sqlite3.Error, JournalUnavailable):
            connection.close()
            raise
    return connection


class translated:  # noqa: N801 - reads as a statement
    """A context in which errors of SQLite leave as `JournalUnavailable` that says what to do."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            raise JournalUnavailable(describe(self._path, error)) from error


def describe(path: Path, error: sqlite3.Error) -> str:
    """What went wrong with the file, and what a person can do."""
    name = getattr(error, "sqlite_errorname", "")
    if is_damage(error):
        return (
            f"{path} is damaged or is no journal ({error}). Stop every process that uses it, then restore a copy, or "
            f"move it away together with {path.name}-wal and {path.name}-shm to start an empty one"
        )
    if name == "SQLITE_FULL":
        return f"{path} is full: the disk, or the journal's limit in bytes"
    if name.startswith("SQLITE_BUSY"):
        return f"{path} is locked by another process"
    return f"{path} cannot be used: {error}"


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file's content is wrong (not only out of reach)."""
    name = getattr(error, "sqlite_errorname", "")
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def _check_library() -> None:
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        wanted = ".".join(map(str, MIN_SQLITE))
        raise JournalUnavailable(f"SQLite {sqlite3.sqlite_version} is too old: the journal needs {wanted}")


def _check_identity(path: Path, connection: sqlite3.Connection, *, may_be_new: bool) -> None:
    """Refuse a database of another program, and one that a newer Isthmus wrote."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application == 0 and tables == 0:
        if may_be_new:
            return
        raise JournalUnavailable(f"{path} is empty: nothing has been recorded here")
    if application != APPLICATION_ID:
        raise JournalUnavailable(f"{path} is a database of another program; give the journal a file of its own")
    version = connection.execute("SELECT max(version) FROM schema_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise JournalUnavailable(f"{path} has schema version {version}, this Isthmus knows {SCHEMA_VERSION}")


def _migrate(connection: sqlite3.Connection, clock: Clock) -> None:
    """Bring an empty file to the current schema, in one transaction."""
    if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
        return
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO schema_version VALUES (?, ?)", (SCHEMA_VERSION, clock.wall()))
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.execute("COMMIT")
