"""One fact a request into the journal, never in the request's way.

Promises: `record` returns at once; a recorded fact is durable about a second later; what could not be kept (queue
full, or the journal failed again and again) is counted and written as a gap, so that its absence is visible. The
journal's errors never reach a request.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import JournalError
from isthmus.contracts.journal import Append, LineageFact, NewEvent
from isthmus.contracts.ports import Journal

LINEAGE_KIND = "lineage"
GAP_KIND = "lineage-gap"
GAP_STREAM = "lineage/gaps"


def request_stream(request_id: str) -> str:
    """The stream of one request."""
    return f"request/{request_id}"


class LineageGap(msgspec.Struct, frozen=True):
    """`lost` facts of requests received between two times (seconds since the Unix epoch) were not kept, and why."""

    lost: int
    first_at: float
    last_at: float
    reason: str


@dataclass(frozen=True, slots=True)
class LineageSettings:
    """Limits. Facts wait at most `flush_s` for company; a batch is tried `attempts` times, `retry_s` apart."""

    max_waiting: int = 4096
    batch: int = 256
    flush_s: float = 0.5
    attempts: int = 3
    retry_s: float = 0.5
    close_s: float = 5.0


@dataclass(slots=True)
class LineageStats:
    """Counters since the start."""

    recorded: int = 0
    written: int = 0
    lost: int = 0
    journal_errors: int = 0


class LineageRecorder:
    """Implements `ports.Lineage` over a journal.

    `start` it in the event loop that records, `close` it before the journal.
    """

    def __init__(self, journal: Journal, settings: LineageSettings, clock: Clock) -> None:
        self._journal = journal
        self._settings = settings
        self._clock = clock
        self._waiting: deque[LineageFact] = deque()
        self._wake = asyncio.Event()
        self._gap: LineageGap | None = None
        self._gaps_written = 0
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self.stats = LineageStats()

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run(), name="lineage")

    def record(self, fact: LineageFact) -> None:
        """See `ports.Lineage`."""
        self.stats.recorded += 1
        if self._closing or len(self._waiting) >= self._settings.max_waiting:
            self._lose([fact], "closed" if self._closing else "queue full")
            return
        self._waiting.append(fact)
        self._wake.set()

    async def close(self) -> None:
        """Write what waits (for at most `close_s`), then stop."""
        self._closing = True
        self._wake.set()
        if self._task is None:
            return
        try:
            async with asyncio.timeout(self._settings.close_s):
                await self._task
        except TimeoutError:
            self._waiting.clear()
            self.stats.lost = self.stats.recorded - self.stats.written
        self._task = None

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._closing and len(self._waiting) < self._settings.batch:
                await self._wait_for_company()
            while self._waiting or self._gap:
                await self._flush()
            if self._closing:
                return

    async def _wait_for_company(self) -> None:
        """Up to `flush_s`, less when closing. More facts share a commit then."""
        sleep = asyncio.create_task(self._clock.sleep(self._settings.flush_s))
        wake = asyncio.create_task(self._wait_for_close())
        _, pending = await asyncio.wait({sleep, wake}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _wait_for_close(self) -> None:
        while not self._closing and len(self._waiting) < self._settings.batch:
            await self._wake.wait()
            self._wake.clear()

    async def _flush(self) -> None:
        """Write one batch, or give it up as a gap."""
        facts = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._settings.batch))]
        gap, self._gap = self._gap, None
        batch = [_fact_append(fact) for fact in facts]
        if gap is not None:
            batch.append(self._gap_append(gap))
        for attempt in range(self._settings.attempts):
            if attempt:
                await self._clock.sleep(self._settings.retry_s)
            try:
                await self._journal.append(batch)
            except JournalError:
                self.stats.journal_errors += 1
            else:
                self.stats.written += len(facts)
                self._gaps_written += gap is not None
                return
        self._restore_gap(gap)
        self._lose(facts, "journal unavailable")
        if not self._closing:
            # The gap waits for the next fact: a broken journal is not asked in a loop.
            await self._wake.wait()
            return
        self._lose(list(self._waiting), "journal unavailable")
        self._waiting.clear()
        self._gap = None

    def _lose(self, facts: list[LineageFact], reason: str) -> None:
        """Count facts as lost, and make the gap that will say so."""
        if not facts:
            return
        self.stats.lost += len(facts)
        times = [fact.received_at for fact in facts]
        self._restore_gap(LineageGap(len(facts), min(times), max(times), reason))

    def _restore_gap(self, gap: LineageGap | None) -> None:
        old = self._gap
        if gap is None or old is None:
            self._gap = gap or old
            return
        first, last = min(old.first_at, gap.first_at), max(old.last_at, gap.last_at)
        self._gap = LineageGap(old.lost + gap.lost, first, last, gap.reason)

    def _gap_append(self, gap: LineageGap) -> Append:
        event_id = f"{int(self._clock.wall() * 1e6)}-{self._gaps_written}"
        return Append(GAP_STREAM, (NewEvent(event_id, GAP_KIND, msgspec.msgpack.encode(gap)),))


def _fact_append(fact: LineageFact) -> Append:
    """The event id is a hash of the fact: a retry is written once, two requests that share an id are both kept."""
    body = msgspec.msgpack.encode(fact)
    return Append(request_stream(fact.request_id), (NewEvent(blake3(body).hexdigest(), LINEAGE_KIND, body),))
