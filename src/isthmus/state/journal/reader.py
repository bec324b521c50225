"""Reading a journal: used by the writer's process on a connection of its own, and by tools while a server runs."""

import sqlite3
from pathlib import Path

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.journal import MAX_STREAM_CHARS, StoredEvent
from isthmus.state.journal.schema import open_reader, translated

MAX_READ_EVENTS = 10_000
MAX_READ_BYTES = 64 * 1024 * 1024
MAX_STREAMS = 1000

_READ = """SELECT position, stream, version, event_id, kind, body, recorded_at FROM events
    WHERE stream = ? AND version > ? ORDER BY version LIMIT ?"""
_STREAMS = "SELECT DISTINCT stream FROM events WHERE stream >= ? AND stream < ? ORDER BY stream LIMIT ?"


class JournalReader:
    """A read-only view of the journal in a file. Blocking; use it from one thread. Raises `JournalUnavailable`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection = open_reader(path)

    def read(self, stream: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """As `ports.Journal.read`.

        Gives fewer than `limit` also when the bodies pass 64 MiB: then read on, after the last.
        """
        if not 1 <= limit <= MAX_READ_EVENTS:
            raise InvalidInput(f"limit is {limit}, accepted: 1 to {MAX_READ_EVENTS}", "limit")
        events: list[StoredEvent] = []
        size = 0
        with translated(self._path):
            for row in self._connection.execute(_READ, (stream, after, limit)):
                events.append(StoredEvent(*row))
                size += len(events[-1].body)
                if size > MAX_READ_BYTES:
                    break
        return events

    def streams(self, prefix: str, limit: int = MAX_STREAMS) -> list[str]:
        """Names of streams that begin with `prefix`, in order, at most `limit`."""
        if not 1 <= len(prefix) <= MAX_STREAM_CHARS or not 1 <= limit <= MAX_STREAMS:
            raise InvalidInput(f"a prefix has 1 to {MAX_STREAM_CHARS} characters, a limit 1 to {MAX_STREAMS}", "prefix")
        # The least string over every string with this prefix: the last character's successor.
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        with translated(self._path):
            return [row[0] for row in self._connection.execute(_STREAMS, (prefix, end, limit))]

    def close(self) -> None:
        """Release the file."""
        self._connection.close()
