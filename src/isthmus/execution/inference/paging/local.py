"""Paging by threads of the engine's own process: for devices whose memory no other process can reach."""

from collections.abc import Callable

from isthmus.contracts.blocks import BlockStore, Hint
from isthmus.contracts.clock import Clock
from isthmus.execution.inference.batch import Runner
from isthmus.execution.inference.paging.inbox import Inbox
from isthmus.execution.inference.paging.jobs import Arrivals, Cancel, Event, Keep, Load, Look, Lost, Notice
from isthmus.execution.inference.paging.memory import RunnerMemory, shapes
from isthmus.execution.inference.paging.pager import PagerThreads
from isthmus.execution.inference.paging.settings import PagingSettings


class LocalPager:
    """Implements `jobs.Pager`. `wake` is called, from any thread, when `take` has something.

    Once it is gone (see pager.py) it stays so, is counted (`pager_lost`), and requests compute: what went wrong may be
    in this process's memory, which another one would share.
    """

    def __init__(
        self, store: BlockStore, runner: Runner, settings: PagingSettings, clock: Clock, *, wake: Callable[[], None]
    ) -> None:
        self._inbox = Inbox(wake)
        self.threads = PagerThreads(
            store,
            RunnerMemory(runner),
            shapes(runner.info),
            settings,
            clock,
            told=self._inbox.tell,
            gone=lambda: self._inbox.tell([Lost()]),
        )

    def look(self, job: Look) -> None:
        """See `Pager`."""
        self.threads.do(job)

    def load(self, job: Load, arrivals: Arrivals) -> None:
        """See `Pager`."""
        self._inbox.expect(job.serial, arrivals)
        self.threads.do(job)

    def cancel(self, serial: int) -> None:
        """See `Pager`."""
        self.threads.do(Cancel(serial))

    def keep(self, job: Keep) -> None:
        """See `Pager`."""
        self.threads.do(job)

    def notice(self, hint: Hint) -> None:
        """See `Pager`."""
        self.threads.do(Notice(hint))

    def take(self) -> list[Event]:
        """See `Pager`."""
        return self._inbox.take()

    def close(self) -> None:
        """End the threads."""
        self.threads.close()
