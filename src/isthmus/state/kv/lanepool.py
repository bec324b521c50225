"""A client's connections to the daemon: lent to one call each, connected when needed, found again after a restart.

Promises: whoever borrows waits no longer than it says; an answer is the daemon's, or the reason why there is none,
never an exception; between attempts to connect there is a pause that grows up to a limit, and meanwhile calls are
answered at once.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from isthmus.contracts.blocks import MAX_BATCH, Reason
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import DeadlineExceeded, InvalidInput, StoreUnavailable
from isthmus.state.kv import wire
from isthmus.state.kv.address import read_secret
from isthmus.state.kv.arena.extents import PAGE_BYTES
from isthmus.state.kv.counting import Counts
from isthmus.state.kv.lanes import Greeting, Lane, Mapping

_POST_S = 0.05
_ANSWER_S = 0.1
_NO_MEMORY = memoryview(bytearray())

A = TypeVar("A", bound=wire.Answer)


class ClientSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a client speaks to a daemon. Raises `InvalidInput`, naming the field and its limits."""

    role: str = wire.ENGINE
    token: bytes = b""
    """Empty: derived from the daemon's secret, which only its user can read."""
    lanes: int = 2
    """Calls at the same time."""
    window_bytes: int = 32 << 20
    """Of each lane: the largest record that can be written."""
    area_bytes: int = 32 << 20
    """Of each lane: the largest chunk that can be read from the log."""
    call_s: float = 2.0
    """For calls that have no limit of their own."""
    connect_s: float = 1.0
    backoff_s: tuple[float, float] = (0.02, 2.0)
    """Between attempts to connect, doubled from the first to the second."""

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "lanes": (1, 64),
            "window_bytes": (PAGE_BYTES, wire.MAX_WINDOW_BYTES),
            "area_bytes": (PAGE_BYTES, wire.MAX_WINDOW_BYTES),
            "call_s": (0.001, 3600.0),
            "connect_s": (0.001, 60.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidInput(f"{name} is {value}, accepted: {low:.15g} to {high:.15g}", name)
        if not 0.0 < self.backoff_s[0] <= self.backoff_s[1] <= 3600.0:
            raise InvalidInput("backoff_s is two pauses, the first not longer than the second", "backoff_s")
        if self.role not in wire.ROLES:
            raise InvalidInput(f"role is {self.role!r}, accepted: {', '.join(wire.ROLES)}", "role")


def inside(timeout_s: float) -> float:
    """What the daemon may take of a call's limit, so that its answer still comes in time."""
    limit = wire.seconds(timeout_s)
    return max(0.0, limit - min(_ANSWER_S, limit / 10))


class Borrowed:
    """A lane for the length of one call; or none (`connected` false), whose answers are all `UNAVAILABLE`."""

    def __init__(self, pool: "LanePool", lane: Lane | None, deadline: float) -> None:
        self._pool = pool
        self._lane = lane
        self._deadline = deadline

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._lane is not None and self._lane.connected

    @property
    def mapping(self) -> Mapping | None:
        """What the daemon that this lane is connected to shares."""
        return self._lane.mapping if self._lane is not None else None

    @property
    def window(self) -> memoryview:
        """Where what is to be written goes."""
        return self._lane.window if self._lane is not None else _NO_MEMORY

    @property
    def area(self) -> memoryview:
        """Where the daemon puts what it read."""
        return self._lane.area if self._lane is not None else _NO_MEMORY

    def ask(self, make: Callable[[int], wire.Asked], kind: type[A]) -> A | Reason:
        """The daemon's answer; when the connection turns out to be gone, asked once more on a new one."""
        return Reason.UNAVAILABLE if self._lane is None else self._pool.ask_on(self._lane, make, kind, self._deadline)


class LanePool:
    """The lanes of one client. Safe to use from several threads."""

    def __init__(self, path: Path, clock: Clock, settings: ClientSettings) -> None:
        """Raises `ConfigInvalid` when the memory for the lanes is not to be had."""
        self._clock = clock
        self._settings = settings
        token = settings.token

        def prove() -> bytes:
            return token or wire.derive_token(read_secret(path), settings.role)

        greeting = Greeting(path, settings.role, prove)
        self._free = [Lane(greeting, clock, settings.window_bytes, settings.area_bytes) for _ in range(settings.lanes)]
        self._changed = threading.Condition()
        self._session = b""
        self._unsent: list[wire.Release] = []
        self._not_before = 0.0
        self._backoff = settings.backoff_s[0]
        self._closed = False
        self.mapping: Mapping | None = None
        """What the newest daemon known shares."""
        self.counts = Counts()
        self.refusal = ""
        """Why the store last refused, for people."""

    def ask(self, make: Callable[[int], wire.Asked], kind: type[A], timeout_s: float) -> A | Reason:
        """The answer to one request, on any lane."""
        with self.borrowed(self._clock.monotonic() + wire.seconds(timeout_s)) as lane:
            return lane.ask(make, kind)

    @contextmanager
    def borrowed(self, deadline: float) -> Iterator[Borrowed]:
        """A lane for one call that ends at `deadline`."""
        lane = self._borrow(deadline)
        if lane is None:
            self.counts.add("client", None, Reason.UNAVAILABLE)
        try:
            yield Borrowed(self, lane, deadline)
        finally:
            if lane is not None:
                self._give_back(lane)

    def ask_on(self, lane: Lane, make: Callable[[int], wire.Asked], kind: type[A], deadline: float) -> A | Reason:
        """See `Borrowed.ask`."""
        for attempt in (1, 2):
            try:
                answer = lane.ask(make, kind, max(0.0, deadline - self._clock.monotonic()))
            except DeadlineExceeded:
                self.counts.add("client", None, Reason.LATE)
                return Reason.LATE
            except StoreUnavailable:
                if attempt == 1 and self._connect(lane, deadline):
                    continue
                break
            if not isinstance(answer, wire.Refused):
                return answer
            self.refusal = answer.message
            self.counts.add("client", None, answer.code)
            return Reason.UNAVAILABLE
        self.counts.add("client", None, Reason.UNAVAILABLE)
        return Reason.UNAVAILABLE

    def post(self, message: wire.Release | wire.HintAsk) -> None:
        """Send what has no answer, if that takes no waiting. A release that cannot go now goes before the next call."""
        lane = self._take()
        sent = False
        if lane is not None:
            try:
                sent = lane.post(message, _POST_S)
            finally:
                self._give_back(lane)
        if not sent and isinstance(message, wire.Release):
            with self._changed:
                if len(self._unsent) < MAX_BATCH:
                    self._unsent.append(message)

    def close(self) -> None:
        """Close what is free now, and the rest when it is given back."""
        with self._changed:
            self._closed = True
            free, self._free = self._free, []
            self._changed.notify_all()
        for lane in free:
            lane.close()

    def _take(self) -> Lane | None:
        """A free lane that is connected, without waiting."""
        with self._changed:
            lane = next((one for one in reversed(self._free) if one.connected), None)
            if lane is not None:
                self._free.remove(lane)
            return lane

    def _borrow(self, deadline: float) -> Lane | None:
        """A connected lane that nobody else uses, until it is given back; None: none until then."""
        with self._changed:
            left = max(0.0, deadline - self._clock.monotonic())
            if not self._changed.wait_for(lambda: bool(self._free) or self._closed, left) or self._closed:
                return None
            lane = next((one for one in reversed(self._free) if one.connected), self._free[-1])
            self._free.remove(lane)
        if not lane.connected and not self._connect(lane, deadline):
            self._give_back(lane)
            return None
        with self._changed:
            unsent, self._unsent = self._unsent, []
        for message in unsent:
            lane.post(message, _POST_S)
        return lane

    def _give_back(self, lane: Lane) -> None:
        with self._changed:
            if not self._closed:
                self._free.append(lane)
                self._changed.notify()
                return
        lane.close()

    def _connect(self, lane: Lane, deadline: float) -> bool:
        """Connect a lane, unless an attempt failed a moment ago."""
        now = self._clock.monotonic()
        with self._changed:
            if now < self._not_before or self._closed:
                return False
            session, mapping = self._session, self.mapping
        try:
            welcome = lane.open(session, mapping, min(self._settings.connect_s, max(0.0, deadline - now)))
        except StoreUnavailable as error:
            with self._changed:
                self._not_before = self._clock.monotonic() + self._backoff
                self._backoff = min(2 * self._backoff, self._settings.backoff_s[1])
                self.refusal = str(error)
            self.counts.add("client", None, "not_connected")
            return False
        with self._changed:
            self._backoff, self._not_before = self._settings.backoff_s[0], 0.0
            self._session = welcome.session
            if self.mapping is not None and lane.mapping is not None and self.mapping.epoch == lane.mapping.epoch:
                lane.mapping = self.mapping
            else:
                self.mapping = lane.mapping
                self._unsent = []  # leases of a daemon that is gone
        self.counts.add("client", None, "connected")
        return True
