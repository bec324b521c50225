"""Paging by a process of its own, which shares the memory of the engine's device (a CPU's).

Promises
- Every job ends with its event, whatever becomes of the process. One that has said nothing for `QUIET_S` while there
were jobs is killed. Events for what a dead process was doing are told only once it is reaped: nothing writes to a block
that somebody else may get.
- Nothing here waits for the process: what its socket does not take is kept (jobs are bounded by the policy's limits)
and sent by a thread.
- A process that ended is replaced, after a wait that grows from `BACKOFF_S`; meanwhile the answer to everything is
`UNAVAILABLE`, and requests compute. Each loss is counted (`pager_lost`).
"""

import select
import sys
import threading
from collections.abc import Callable, Sequence

import msgspec

from isthmus.contracts.blocks import Hint, RecordKind
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import IsthmusError, WireViolation
from isthmus.contracts.wire import encode_frame
from isthmus.execution.inference.bell import Bell
from isthmus.execution.inference.paging.child import Child
from isthmus.execution.inference.paging.frames import MAX_FRAME_BYTES, Begin, Happened
from isthmus.execution.inference.paging.inbox import Inbox
from isthmus.execution.inference.paging.jobs import (
    Arrivals,
    Arrived,
    Cancel,
    Erased,
    Event,
    Found,
    Job,
    Keep,
    Kept,
    Load,
    Loaded,
    Look,
    Lost,
    Notice,
    unavailable,
)

QUIET_S = 30.0
"""A load and a write have ended by then."""
POLL_S = 1.0
BACKOFF_S = (0.1, 30.0)
JOIN_S = 30.0


class _Owed:
    """Jobs that have not ended."""

    def __init__(self) -> None:
        self.looks: dict[int, Look] = {}
        self.loads: dict[int, Load] = {}
        self.keeps: dict[tuple[RecordKind, int], Keep] = {}

    def __bool__(self) -> bool:
        return bool(self.looks or self.loads or self.keeps)

    def add(self, job: Job) -> None:
        """`job` is under way."""
        match job:
            case Look():
                self.looks[job.serial] = job
            case Load():
                self.loads[job.serial] = job
            case Keep():
                self.keeps[job.kind, job.place] = job

    def ended(self, event: Event | Arrived) -> None:
        """Of what this tells the end."""
        match event:
            case Found():
                self.looks.pop(event.serial, None)
            case Loaded():
                self.loads.pop(event.serial, None)
            case Kept():
                self.keeps.pop((event.kind, event.place), None)

    def failed(self) -> list[Event]:
        """The ends of all of them, as unavailable."""
        events: list[Event] = []
        for jobs in (self.looks, self.loads, self.keeps):
            events += [end for job in jobs.values() for end in unavailable(job)]
            jobs.clear()
        return events


class RemotePager:
    """Implements `jobs.Pager`. `start` makes a process; `first` is one that was made before, to open its store while a
    model is being loaded. `wake` is called, from any thread, when `take` has something.
    """

    def __init__(
        self,
        start: Callable[[], Child],
        first: Child,
        begin: Begin,
        descriptors: Sequence[int],
        clock: Clock,
        *,
        wake: Callable[[], None],
        quiet_s: float = QUIET_S,
    ) -> None:
        """Raises the error of a store that cannot be opened."""
        self._start, self._begin, self._descriptors, self._clock = start, begin, descriptors, clock
        self._quiet_s = quiet_s
        self._inbox = Inbox(wake)
        self._lock = threading.Lock()
        self._owed = _Owed()
        self._heard = False
        """Whether the process has said something since that was last looked at."""
        self._backlog = bytearray()
        self._closing = threading.Event()
        self._child: Child | None = None
        self._take_up(first)
        self._bell = Bell()
        self._thread = threading.Thread(target=self._run, args=(first,), name="isthmus-paging", daemon=True)
        self._thread.start()

    # ---- what the scheduler's side calls

    def look(self, job: Look) -> None:
        """See `Pager`."""
        self._do(job)

    def load(self, job: Load, arrivals: Arrivals) -> None:
        """See `Pager`."""
        self._inbox.expect(job.serial, arrivals)
        self._do(job)

    def cancel(self, serial: int) -> None:
        """See `Pager`."""
        self._do(Cancel(serial))

    def keep(self, job: Keep) -> None:
        """See `Pager`."""
        self._do(job)

    def notice(self, hint: Hint) -> None:
        """See `Pager`."""
        self._do(Notice(hint))

    def take(self) -> list[Event]:
        """See `Pager`."""
        return self._inbox.take()

    def close(self) -> None:
        """Let the process end: what was written behind becomes durable, within its limits."""
        self._closing.set()
        self._bell.ring()
        self._thread.join(JOIN_S)
        self._bell.close()

    def _do(self, job: Job) -> None:
        frame = encode_frame(job, MAX_FRAME_BYTES)
        with self._lock:
            child = self._child
            if child is not None:
                self._owed.add(job)
                sent = 0 if self._backlog else child.send(memoryview(frame))
                self._backlog += frame[sent:]
                waiting = bool(self._backlog)
        if child is None:
            self._inbox.tell(unavailable(job))
        elif waiting:
            self._bell.ring()

    # ---- the thread

    def _run(self, child: Child | None) -> None:
        """Serve one process after the other."""
        wait, most = BACKOFF_S
        while not self._closing.is_set():
            if child is not None:
                since = self._clock.monotonic()
                self._serve(child)
                if self._closing.is_set():
                    break
                self._lose(child)
                if self._clock.monotonic() - since > most:
                    wait = BACKOFF_S[0]
            select.select([self._bell.fileno], [], [], wait)
            wait = min(2 * wait, most)
            child = None if self._closing.is_set() else self._again()
        if child is not None:
            child.end(kill=False)

    def _serve(self, child: Child) -> None:
        """Until the process is gone, breaks the rules or is quiet for too long, or until `close`."""
        quiet, patience = 0.0, min(POLL_S, self._quiet_s)
        while not self._closing.is_set():
            with self._lock:
                writable = [child.fileno] if self._backlog else []
            begun = self._clock.monotonic()
            ready, free, _ = select.select([child.fileno, self._bell.fileno], writable, [], patience)
            self._bell.hush()
            if free:
                self._flush(child)
            if child.fileno in ready and not self._hear(child):
                return
            # While both were stopped nobody was quiet: a wait that took far longer than it may counts as one.
            waited = min(self._clock.monotonic() - begun, 2 * patience)
            with self._lock:
                quiet = quiet + waited if self._owed and not self._heard else 0.0
                self._heard = False
            if quiet > self._quiet_s:
                sys.stderr.write(f"isthmus-engine: the paging process has said nothing for {quiet:.0f} s\n")
                return

    def _flush(self, child: Child) -> None:
        with self._lock:
            with memoryview(bytes(self._backlog)) as data:
                sent = child.send(data)
            del self._backlog[:sent]

    def _hear(self, child: Child) -> bool:
        """Take what the process says. False when that is its end."""
        try:
            messages = child.receive()
        except WireViolation as error:
            sys.stderr.write(f"isthmus-engine: the paging process: {error}\n")
            return False
        for message in messages or ():
            if not isinstance(message, Happened):
                continue
            with self._lock:
                self._heard = True
                for event in message.events:
                    self._owed.ended(event)
                    if isinstance(event, Erased):
                        self._begin = msgspec.structs.replace(self._begin, heard=event.erasures[-1].number)
            self._inbox.tell(message.events)
        return messages is not None

    def _lose(self, child: Child) -> None:
        """The process is no use any more: end it, then end what it was doing."""
        with self._lock:
            self._child = None
        status = child.end(kill=True)
        with self._lock:
            events = self._owed.failed()
            self._backlog.clear()
        sys.stderr.write(f"isthmus-engine: the paging process ended ({status}); another one is started\n")
        self._inbox.tell([*events, Lost()])

    def _again(self) -> Child | None:
        """Another process; None when it cannot open its store."""
        child = self._start()
        try:
            self._take_up(child)
        except IsthmusError as error:
            sys.stderr.write(f"isthmus-engine: the paging process does not start: {error}\n")
            return None
        return child

    def _take_up(self, child: Child) -> None:
        """Wait for its store, and hand it the engine's memory. Raises the store's error; the process is ended then."""
        try:
            child.opened(self._clock)
            child.begin(self._begin, self._descriptors)
        except IsthmusError:
            child.end(kill=True)
            raise
        with self._lock:
            self._child = child
