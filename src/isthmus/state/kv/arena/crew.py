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


_Jobs = queue.SimpleQueue[_Job[Any, Any]]


class Crew:
    """Helpers, started when they are first needed. Safe to use from several threads."""

    def __init__(self, helpers: int) -> None:
        self._helpers = helpers
        self._lock = threading.Lock()
        self._jobs: _Jobs = queue.SimpleQueue()
        self._process = 0

    def together(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """What `work` makes of each item, in order; several may be worked on at the same time."""
        if len(items) < 2 or not self._helpers:
            return [work(item) for item in items]
        job = _Job(work, items)
        jobs = self._at_work()
        for _ in range(min(self._helpers, len(items) - 1)):
            jobs.put(job)
        return job.run()

    def _at_work(self) -> _Jobs:
        """The queue that helpers of this very process serve."""
        with self._lock:
            if self._process != os.getpid():
                self._process, self._jobs = os.getpid(), queue.SimpleQueue()
                for _ in range(self._helpers):
                    threading.Thread(target=_help, args=(self._jobs,), name="copies", daemon=True).start()
            return self._jobs


def _help(jobs: _Jobs) -> None:
    while True:
        jobs.get().help()


CREW = Crew(min(MOST_HELPERS, len(os.sched_getaffinity(0)) - 1))


def together(work: Callable[[T], R], items: Sequence[T], size: int) -> list[R]:
    """What `work` makes of each item, which have `size` bytes in all: with helpers if they are large."""
    if size < len(items) * PIECE_BYTES:
        return [work(item) for item in items]
    return CREW.together(work, items)
