"""A client's end of one connection to the daemon, with the window and the area that belong to it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import ConfigInvalid, DeadlineExceeded, StoreUnavailable, WireViolation
from isthmus.state.kv import wire
from isthmus.state.kv.arena.memory import create_shared, map_read_only
from isthmus.state.kv.connection import Closed, Connection, Frames, close_all

A = TypeVar("A", bound=wire.Answer)


@dataclass(frozen=True, slots=True)
class Mapping:
    """What a daemon shares, in one of its epochs: readable until nobody refers to it, also when the daemon is gone."""

    epoch: bytes
    regions: tuple[memoryview, ...]
    generations: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a client says when it connects, besides its memory."""

    path: Path
    role: str
    token: Callable[[], bytes]


class Lane:
    """A connection. For one thread at a time. After any failure it is closed, and `open` makes a new one.

    Promise: what the daemon still writes for a request that was given up never lies among the answers of a later one:
    after a read without an answer the area is another one.
    """

    def __init__(self, greeting: Greeting, clock: Clock, window_bytes: int, area_bytes: int) -> None:
        self._greeting = greeting
        self._clock = clock
        self._window = create_shared("isthmus-window", window_bytes)
        self._area = create_shared("isthmus-area", area_bytes)
        self._connection: Connection | None = None
        self._answers: Frames[wire.Answer] = Frames(wire.Answer, wire.ANSWER_BYTES)
        self._number = 0
        self._owed = False
        """A read was not answered: the area may still be written to."""
        self.mapping: Mapping | None = None
        """What the daemon that it is, or was last, connected to shares."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def window(self) -> memoryview:
        """Where what is to be written goes."""
        return self._window.view

    @property
    def area(self) -> memoryview:
        """Where the daemon puts what it read."""
        return self._area.view

    def open(self, session: bytes, known: Mapping | None, timeout_s: float) -> wire.Welcome:
        """Connect. `known` is kept when the daemon's epoch is still the same. Raises `StoreUnavailable`."""
        self.shut()
        self._renew()
        sock = socket(AF_UNIX, SOCK_STREAM)
        try:
            sock.settimeout(max(timeout_s, 0.001))
            sock.connect(str(self._greeting.path))
        except OSError as error:
            sock.close()
            raise StoreUnavailable(f"no store answers at {self._greeting.path}: {error}") from error
        connection = Connection(sock, self._clock)
        try:
            if connection.peer_uid != os.geteuid():
                raise StoreUnavailable("the store belongs to another user")
            welcome, self.mapping = self._shake_hands(connection, session, known, timeout_s)
        except (Closed, DeadlineExceeded, WireViolation) as error:
            connection.close()
            raise StoreUnavailable(f"the store does not greet: {error}") from error
        except StoreUnavailable:
            connection.close()
            raise
        self._connection = connection
        return welcome

    def _renew(self) -> None:
        if not self._owed:
            return
        try:
            area = create_shared("isthmus-area", self._area.size)
        except (ConfigInvalid, OSError) as error:
            raise StoreUnavailable(f"there is no memory for a new connection: {error}") from error
        self._area.close()
        self._area, self._owed = area, False

    def _shake_hands(
        self, connection: Connection, session: bytes, known: Mapping | None, timeout_s: float
    ) -> tuple[wire.Welcome, Mapping]:
        greeting = self._greeting
        hello = wire.Hello(wire.VERSION, greeting.role, greeting.token(), session)
        connection.send(hello, wire.HELLO_BYTES, timeout_s)
        welcome = connection.receive(self._answers, timeout_s)
        if isinstance(welcome, wire.Refused):
            raise StoreUnavailable(f"the store refuses: {welcome.message}")
        if not isinstance(welcome, wire.Welcome) or welcome.version != wire.VERSION:
            raise WireViolation("the first answer is no greeting")
        connection.send(wire.Attach(self._window.size, self._area.size), wire.HELLO_BYTES, timeout_s)
        connection.send_descriptors([self._window.descriptor, self._area.descriptor], timeout_s)
        descriptors = connection.receive_descriptors(len(welcome.regions) + 1, timeout_s)
        try:
            if known is not None and known.epoch == welcome.epoch:
                return welcome, known
            *regions, table = descriptors
            views = tuple(map_read_only(one, size) for one, size in zip(regions, welcome.regions, strict=True))
            generations = np.frombuffer(map_read_only(table, welcome.table_bytes), np.uint64)
            return welcome, Mapping(welcome.epoch, views, generations)
        finally:
            close_all(descriptors)

    def ask(self, make: Callable[[int], wire.Asked], kind: type[A], timeout_s: float) -> A | wire.Refused:
        """Send the request that `make` makes of a number; its answer.

        Raises `DeadlineExceeded`, or `StoreUnavailable` when the connection is gone; it is closed then.
        """
        connection = self._connection
        if connection is None:
            raise StoreUnavailable("the store is not connected")
        self._number += 1
        deadline = self._clock.monotonic() + timeout_s
        request = make(self._number)
        self._owed = isinstance(request, wire.ReadAsk)
        try:
            connection.send(request, wire.REQUEST_BYTES, timeout_s)
            answer = connection.receive(self._answers, max(0.0, deadline - self._clock.monotonic()))
            if isinstance(answer, wire.Refused) and answer.number == self._number:
                self._owed = False
                return answer
            if not isinstance(answer, kind) or answer.number != self._number:  # type: ignore[union-attr]
                raise WireViolation("the answer is to something else")
        except DeadlineExceeded:
            self.shut()
            raise
        except (Closed, WireViolation) as error:
            self.shut()
            raise StoreUnavailable(f"the connection to the store is gone: {error}") from error
        self._owed = False
        return answer

    def post(self, message: wire.Release | wire.HintAsk, timeout_s: float) -> bool:
        """Send what has no answer; whether it was sent."""
        if self._connection is None:
            return False
        try:
            self._connection.send(message, wire.REQUEST_BYTES, timeout_s)
        except (Closed, DeadlineExceeded, WireViolation):
            self.shut()
            return False
        return True

    def shut(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close it for good."""
        self.shut()
        self._window.close()
        self._area.close()
