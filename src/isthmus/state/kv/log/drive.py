"""What makes the log's objects move: three threads, or the caller step by step (simulations).

Promises: nobody waits longer than told; a thread that ends with an error leaves a log that takes nothing more in and
says why, never one that waits for it.
"""

import threading
from collections.abc import Callable
from typing import Protocol

from isthmus.contracts.clock import Clock
from isthmus.state.kv.log.commit import Committer
from isthmus.state.kv.log.housekeeping import Housekeeper
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.writer import Writer

_WRITE_PATIENCE_S = 0.002
_IDLE_S = 0.25
_BLOCKED_S = 0.01
_JOIN_S = 15.0
_MOST_STEPS = 100_000


class Driver(Protocol):
    """Moves a log on while callers wait for something."""

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Whether `ready` became true within `timeout_s`. The caller holds the ledger's lock once."""
        ...

    def step(self) -> bool:
        """One step of everything, where that is not done by threads; whether there was something to do."""
        ...

    def stop(self) -> None:
        """Move nothing any more. May be called twice."""
        ...


class Threads:
    """One thread writes, one commits, one keeps house."""

    def __init__(
        self,
        ledger: Ledger,
        writer: Writer,
        committer: Committer,
        housekeeper: Housekeeper,
        *,
        clock: Clock,
    ) -> None:
        self._ledger = ledger
        self._changed = ledger.changed
        self._writer = writer
        self._committer = committer
        self._housekeeper = housekeeper
        self._clock = clock
        self._stopping = False
        loops = {"write": self._write, "commit": self._commit, "house": self._keep_house}
        self._threads = [
            threading.Thread(target=self._run, args=(name, loop), name=f"kv-log-{name}", daemon=True)
            for name, loop in loops.items()
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """See `Driver`."""
        self._changed.notify_all()
        return self._changed.wait_for(ready, max(0.0, timeout_s))

    def step(self) -> bool:
        """See `Driver`."""
        return False

    def stop(self) -> None:
        """See `Driver`. Waits for the threads, within a bound."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _run(self, name: str, loop: Callable[[], None]) -> None:
        try:
            loop()
        finally:
            if not self._stopping:
                with self._changed:
                    self._ledger.refuse(f"the thread that has to {name} ended with an error")
                    self._changed.notify_all()

    def _write(self) -> None:
        while not self._stopping or self._writer.in_flight:
            patience = _WRITE_PATIENCE_S if self._writer.in_flight else 0.0
            if self._writer.step(self._clock.monotonic(), patience):
                continue
            with self._changed:
                if self._writer.in_flight or self._stopping:
                    continue
                blocked = self._writer.wanted(self._clock.monotonic())
                self._changed.wait(_BLOCKED_S if blocked or self._filling() else _IDLE_S)

    def _filling(self) -> bool:
        return any(extent is not None for extent in self._ledger.staging.filling)

    def _commit(self) -> None:
        while not self._stopping:
            with self._changed:
                due = self._committer.due(self._clock.monotonic())
                if not due:
                    self._changed.wait(_BLOCKED_S if self._ledger.unsynced_bytes else _IDLE_S)
                    continue
            self._committer.commit()

    def _keep_house(self) -> None:
        while not self._stopping:
            if self._housekeeper.step(self._clock.monotonic()):
                continue
            with self._changed:
                self._changed.wait(_BLOCKED_S if self._housekeeper.waiting() else _IDLE_S)


class Stepped:
    """No threads: whoever waits makes the steps. `pass_time` moves the clock when a step found nothing to do."""

    def __init__(
        self,
        writer: Writer,
        committer: Committer,
        housekeeper: Housekeeper,
        *,
        clock: Clock,
        pass_time: Callable[[], None],
    ) -> None:
        self._writer = writer
        self._committer = committer
        self._housekeeper = housekeeper
        self._clock = clock
        self._pass_time = pass_time
        self._stopped = False

    def step(self) -> bool:
        """See `Driver`."""
        now = self._clock.monotonic()
        moved = self._writer.step(now)
        if self._committer.due(now):
            self._committer.commit()
            moved = True
        return self._housekeeper.step(now) or moved

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """See `Driver`."""
        deadline = self._clock.monotonic() + timeout_s
        for _ in range(_MOST_STEPS):
            if ready():
                return True
            if self._stopped or self._clock.monotonic() >= deadline:
                return False
            if not self.step():
                self._pass_time()
        return ready()

    def stop(self) -> None:
        """See `Driver`."""
        self._stopped = True
