"""What comes from paging's threads on its way to the engine's loop: arrivals at once, events when it asks for them."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from isthmus.execution.inference.paging.jobs import Arrivals, Arrived, Event, Loaded


class Inbox:
    """Told from any thread. `wake` is called when `take` has something, or when a load has come so far that its request
    may be able to start.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._events: deque[Event] = deque()
        self._arrivals: dict[int, Arrivals] = {}
        self._lock = threading.Lock()

    def expect(self, serial: int, arrivals: Arrivals) -> None:
        """A load of `serial` begins."""
        with self._lock:
            self._arrivals[serial] = arrivals

    def tell(self, events: Sequence[Event | Arrived]) -> None:
        """These happened."""
        for event in events:
            if isinstance(event, Arrived):
                with self._lock:
                    arrivals = self._arrivals.get(event.serial)
                if arrivals is not None and event.spoiled:
                    arrivals.fail()
                elif arrivals is not None:
                    arrivals.arrived(event.layers)
                continue
            if isinstance(event, Loaded):
                self._ended(event)
            self._events.append(event)
        self._wake()

    def _ended(self, event: Loaded) -> None:
        """Whoever waits for the rest of this load is to know that nothing follows."""
        with self._lock:
            arrivals = self._arrivals.pop(event.serial, None)
        if arrivals is not None and not event.whole:
            arrivals.fail()

    def take(self) -> list[Event]:
        """What happened since the last call."""
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events
