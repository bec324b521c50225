"""What a store does by itself: it ends leases in time, and brings to DRAM what will be wanted soon.

Promises: what waits to be brought is bounded, the newest is dropped and counted; one thread does all of it, and its
waits have limits. Brought is what a `PREFETCH` hint names, what is `WAITING` shortly before it is expected back, and
what was read from the log twice lately. The other way, what the log refused for its wear is offered to it again when it
was used once more, and then each time that it was used twice as often.
"""

import heapq
import threading
from collections import deque
from collections.abc import Callable, Sequence

from isthmus.contracts.blocks import HintKind, Outcome, Reason, Tier, Want
from isthmus.contracts.errors import IsthmusError
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.arena import Record, State
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.log.records import Location, LogEntry, LogRead
from isthmus.state.kv.parts import Parts, log_record

TICK_S = 0.2
LEAD_S = 1.0
"""How long before somebody is expected back bringing begins; earlier, by a tenth, for long waits."""
_LONGEST_S = 86_400.0
_BATCH = 16
_END_S = 10.0


class Attendant:
    """One thread. `expire` ends the leases whose time is over."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._limit = parts.settings.prefetch_keys
        self._changed = threading.Condition()
        self._queue: deque[BlockKey] = deque()
        self._due: list[tuple[float, int, tuple[BlockKey, ...]]] = []
        self._due_keys = 0
        self._serial = 0
        self._once: dict[BlockKey, None] = {}
        self._offers: deque[BlockKey] = deque(maxlen=self._limit)
        self._busy = False
        self._ending = False
        self._expire: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="store-attendant", daemon=True)

    def start(self, expire: Callable[[], None]) -> None:
        """Begin; `expire` is called all the time."""
        self._expire = expire
        self._thread.start()

    def stop(self) -> None:
        """End: bounded."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(_END_S)
        self._expire = lambda: None

    def hinted(self, kind: HintKind, keys: Sequence[BlockKey], seconds: float) -> None:
        """What follows of a hint for what is brought when."""
        if self._parts.log is None:
            return
        if kind is HintKind.PREFETCH:
            self.bring(keys)
        elif kind is HintKind.WAITING and seconds >= 0:
            self._await(keys, seconds)

    def bring(self, keys: Sequence[BlockKey]) -> None:
        """Bring these to DRAM soon; what does not fit into the queue is dropped."""
        with self._changed:
            room = self._limit - len(self._queue)
            self._queue.extend(keys[:room])
            self._changed.notify_all()
        self._parts.counts.add("prefetch", None, "dropped", max(0, len(keys) - room))

    def read_below(self, keys: Sequence[BlockKey]) -> None:
        """These were read from the log: bring those that were so before, lately."""
        again: list[BlockKey] = []
        with self._changed:
            for key in keys:
                if key in self._once:
                    del self._once[key]
                    again.append(key)
                else:
                    self._once[key] = None
            while len(self._once) > self._limit:
                del self._once[next(iter(self._once))]
        if again:
            self.bring(again)

    def wanted(self, records: Sequence[Record]) -> None:
        """These were used, some of them perhaps ones that the log refused."""
        refused = self._parts.dram.refused
        again = [one.key for one in records if one.key in refused and one.hits & (one.hits - 1) == 0]
        if again:
            with self._changed:
                self._offers.extend(again)
                self._changed.notify_all()

    def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is left to be brought now; whether that came about."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._queue or self._offers or self._busy), timeout_s)

    def _await(self, keys: Sequence[BlockKey], seconds: float) -> None:
        wait = min(seconds, _LONGEST_S)
        when = self._parts.clock.monotonic() + max(0.0, wait - max(LEAD_S, wait / 10))
        with self._changed:
            full = self._due_keys + len(keys) > self._limit
            if not full:
                self._serial += 1
                heapq.heappush(self._due, (when, self._serial, tuple(keys)))
                self._due_keys += len(keys)
        if full:
            self._parts.counts.add("prefetch", None, "dropped", len(keys))

    def _run(self) -> None:
        while True:
            self._expire()
            with self._changed:
                if not (self._queue or self._offers or self._ending):
                    self._changed.wait(TICK_S)
                if self._ending:
                    return
                self._take_due()
                batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
                offers = [self._offers.popleft() for _ in range(min(_BATCH, len(self._offers)))]
                self._busy = bool(batch or offers)
            if batch or offers:
                self._attempt(self._bring, "prefetch", batch)
                self._attempt(self._offer, "append", offers)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _take_due(self) -> None:
        now = self._parts.clock.monotonic()
        while self._due and self._due[0][0] <= now:
            keys = heapq.heappop(self._due)[2]
            self._due_keys -= len(keys)
            self._queue.extend(keys)

    def _attempt(
        self, work: Callable[[SegmentLog, Sequence[BlockKey]], list[Outcome]], name: str, keys: Sequence[BlockKey]
    ) -> None:
        log = self._parts.log
        if log is None or not keys:
            return
        try:
            outcomes = work(log, keys)
        except IsthmusError as error:  # all of this is for the better only: what fails stays where it is
            self._parts.counts.add(name, Tier.NVME, error.code, len(keys))
            return
        self._parts.counts.add_outcomes(name, outcomes)

    def _offer(self, log: SegmentLog, keys: Sequence[BlockKey]) -> list[Outcome]:
        """Offer to the log what it refused, now that it was used."""
        dram = self._parts.dram
        records = [one for one in dram.pin(keys, use=False) if one is not None]
        number = self._parts.scopes.start_write({one.owner for one in records})
        try:
            refuses = self._parts.scopes.refuses
            offered = [one for one in records if one.state is State.VISIBLE and not refuses(one.owner)]
            outcomes = log.append([log_record(dram.arena, one) for one in offered], self._parts.settings.call_s)
            for record, outcome in zip(offered, outcomes, strict=True):
                if outcome.reason is Reason.STORED:
                    dram.append(record, outcome.sequence)
            return outcomes
        finally:
            self._parts.scopes.end_write(number)
            dram.unpin(records)

    def _bring(self, log: SegmentLog, keys: Sequence[BlockKey]) -> list[Outcome]:
        present = self._parts.dram.where(keys)
        missing = list(dict.fromkeys(key for key, record in zip(keys, present, strict=True) if record is None))
        places = log.locate(missing)
        entries = log.describe(missing)
        known = [(place, entry) for place, entry in zip(places, entries, strict=True) if place and entry]
        number = self._parts.scopes.start_write({entry.owner for _, entry in known})
        try:
            return self._copy(log, known)
        finally:
            self._parts.scopes.end_write(number)

    def _copy(self, log: SegmentLog, known: Sequence[tuple[Location, LogEntry]]) -> list[Outcome]:
        """Read records into the arena, where the log verifies them, and make them visible."""
        dram = self._parts.dram
        outcomes: list[Outcome] = []
        begun: list[tuple[Record, LogRead]] = []
        left: list[Record] = []
        try:
            for place, entry in known:
                parent = None if entry.parent is None else BlockKey(entry.parent)
                record = dram.begin(BlockKey(entry.key), parent, entry.owner, entry.shape, entry.lifetime)
                if isinstance(record, Reason):
                    outcomes.append(Outcome(record, Tier.DRAM))
                    continue
                left.append(record)
                begun.append((record, LogRead(place, Want(record.key, entry.shape, dram.arena.view(record)))))
            found = log.read([read for _, read in begun], self._parts.settings.call_s)
            for (record, _), outcome in zip(begun, found, strict=True):
                if outcome.reason is Reason.HIT:
                    record.digests = digests_of(dram.arena.view(record), record.shape.chunk_bytes)
                    left.remove(record)
                    if not dram.publish(record):
                        dram.arena.erase_bytes(record)
                    dram.unpin([record])
                outcomes.append(outcome)
        finally:
            for record in left:
                dram.give_up(record)
        return outcomes
