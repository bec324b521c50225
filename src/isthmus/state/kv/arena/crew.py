"""Copies and digests of large pieces by two threads: one core moves bytes at a fraction of what memory can.

Promises: nothing is under way any more when `together` ends, also when it ends with an error; nobody waits for work
that was not begun, so a helper that is busy, or gone with a fork, costs time and nothing else. Work is handed out only
where the pieces are large: every piece needs the interpreter's lock for a moment, and small ones would take turns.
"""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

PIECE_BYTES = 512 << 10
"""Pieces from here on are worth handing out."""
MOST_HELPERS = 1
_JOIN_S = 10.0

T = TypeVar("T")
R = TypeVar("R")


class _Job(Generic[T, R]):
    """Work on some items, each of which is taken by exactly one thread."""

    def __init__(self, work: Callable[[T], R], items: Sequence[T]) -> None:
        self._work = work
        self._items = items
        self._changed = threading.Condition(threading.Lock())
        self._following = self._helped = 0
        self._results: dict[int, R] = {}
        self._errors: list[Exception] = []

    def run(self) -> list[R]:
        """Work, with those who help, until all is done: the results, in order. Raises the first error."""
        try:
            while (index := self._taken(helping=False)) >= 0:
                self._do(index)
        finally:
            with self._changed:
                self._following = len(self._items)
                self._changed.wait_for(lambda: not self._helped)
        if self._errors:
            raise self._errors[0]
        return [self._results[index] for index in range(len(self._items))]

    def help(self) -> None:
        """Take items as long as there are any."""
        while (index := self._taken(helping=True)) >= 0:
            self._do(index)
            with self._changed:
                self._helped -= 1
                self._changed.notify_all()

    def _taken(self, helping: bool) -> int:
        with self._changed:
            index = self._following
            if index >= len(self._items):
                return -1
            self._following += 1
            self._helped += helping
            return index

    def _do(self, index: int) -> None:
        try:
            self._results[index] = self._work(self._items[index])
        except Exception as error:  # noqa: BLE001 - raised where the work was asked for
            self._errors.append(error)


_Jobs = queue.SimpleQueue[_Job[Any, Any] | None]


class Crew:
    """Helpers, started when they are first needed, that end at `close`. Safe to use from several threads.

    Whoever copies owns one, or is lent one by its owner.
    """

    def __init__(self, helpers: int) -> None:
        self._helpers = helpers
        self._lock = threading.Lock()
        self._jobs: _Jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._process = 0
        self._closed = False

    def together(self, work: Callable[[T], R], items: Sequence[T], size: int) -> list[R]:
        """What `work` makes of each item, in order; of items with `size` bytes in all, several may be worked on at the
        same time if they are large.
        """
        if len(items) < 2 or size < len(items) * PIECE_BYTES or not self._helpers:
            return [work(item) for item in items]
        job = _Job(work, items)
        self._call(job, min(self._helpers, len(items) - 1))
        return job.run()

    def close(self) -> None:
        """End the helpers, after what they are doing. What comes afterwards is done without them."""
        with self._lock:
            self._closed = True
            mine = self._threads if self._process == os.getpid() else []
            self._threads = []
            for _ in mine:
                self._jobs.put(None)
        for thread in mine:
            thread.join(_JOIN_S)

    def _call(self, job: _Job[T, R], helpers: int) -> None:
        """Ask for help, of threads of this very process: a fork has none."""
        with self._lock:
            if self._closed:
                return
            if self._process != os.getpid():
                self._process, self._jobs = os.getpid(), queue.SimpleQueue()
                self._threads = [
                    threading.Thread(target=_help, args=(self._jobs,), name="copies", daemon=True)
                    for _ in range(self._helpers)
                ]
                for thread in self._threads:
                    thread.start()
            for _ in range(helpers):
                self._jobs.put(job)


def _help(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job.help()
        del job  # while it waits for the next one it keeps nothing of this one


def crew_for(processors: int) -> Crew:
    """As many helpers as are worth having on so many processors."""
    return Crew(max(0, min(MOST_HELPERS, processors - 1)))


def together(crew: Crew | None, work: Callable[[T], R], items: Sequence[T], size: int) -> list[R]:
    """See `Crew.together`; without a crew one after the other."""
    return [work(item) for item in items] if crew is None else crew.together(work, items, size)
