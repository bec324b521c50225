"""Who holds leases: clients of the daemon, each by one or more connections.

A client's first connection gives it a session; others that name it join, and share its leases. They end when the last
connection is gone. Safe from several threads.
"""

import threading
from dataclasses import dataclass, field
from typing import Protocol

from isthmus.contracts.clock import Entropy
from isthmus.state.kv.reading import Reader, StoreLease

SESSION_BYTES = 16


class Droppable(Protocol):
    """A connection that can be ended."""

    def drop(self) -> None:
        """End it now."""
        ...


@dataclass(slots=True, eq=False)
class Holder:
    """A client. `heard_at`: when it last sent a whole frame, on the monotonic clock."""

    number: int
    session: bytes
    heard_at: float
    connections: list[Droppable] = field(default_factory=list)


class Holders:
    """The clients of a daemon, by session."""

    def __init__(self, reader: Reader, entropy: Entropy) -> None:
        self._reader = reader
        self._entropy = entropy
        self._lock = threading.Lock()
        self._by_session: dict[bytes, Holder] = {}
        self._by_number: dict[int, Holder] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._by_number)

    def join(self, session: bytes, connection: Droppable, now: float) -> Holder:
        """The client of this session, with one connection more; a new one when there is none."""
        with self._lock:
            holder = self._by_session.get(session)
            if holder is None:
                self._last += 1
                holder = Holder(self._last, self._entropy.token_bytes(SESSION_BYTES), now)
                self._by_session[holder.session] = self._by_number[holder.number] = holder
            holder.connections.append(connection)
            return holder

    def leave(self, holder: Holder, connection: Droppable) -> None:
        """One connection less; with the last one its leases end."""
        with self._lock:
            holder.connections.remove(connection)
            last = not holder.connections
            if last:
                del self._by_session[holder.session], self._by_number[holder.number]
        if last:
            self._reader.release_all(holder.number)

    def expired(self, lease: StoreLease) -> bool:
        """A lease ended by itself. Who has sent nothing since it was granted has stalled and is dropped: true then."""
        with self._lock:
            holder = self._by_number.get(lease.holder)
            stalled = list(holder.connections) if holder and holder.heard_at <= lease.granted_at else []
        for connection in stalled:
            connection.drop()
        return bool(stalled)
