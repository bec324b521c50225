"""The threads of paging, done by hand: nothing happens until `work`, and then what the test wants."""

from collections import deque
from dataclasses import dataclass, field

from tests.support.fake_runner import FakeRunner

from isthmus.contracts.blocks import NO_SESSION, Erasure, Hint, Owner, Reason, RecordKind, Tier, namespace_id
from isthmus.contracts.ids import Namespace
from isthmus.execution.inference.paging.jobs import Arrivals, Erased, Event, Found, Keep, Kept, Load, Loaded, Look


@dataclass
class FakePager:
    """A store of what a `FakeRunner` computed, by key."""

    runner: FakeRunner | None = None
    records: dict[bytes, tuple[Owner, object]] = field(default_factory=dict)
    jobs: deque[Look | Load | Keep] = field(default_factory=deque)
    events: list[Event] = field(default_factory=list)
    hints: list[Hint] = field(default_factory=list)
    arrivals: dict[int, Arrivals] = field(default_factory=dict)
    erasures: int = 0
    layered: bool = False
    """Loads come in two parts: the first layer, and the rest."""
    gate_fault: Reason | None = None
    """What befalls loads that a step waits for."""

    def look(self, job: Look) -> None:
        self.jobs.append(job)

    def load(self, job: Load, arrivals: Arrivals) -> None:
        self.arrivals[job.serial] = arrivals
        self.jobs.append(job)

    def cancel(self, serial: int) -> None:
        assert self.arrivals[serial].failed

    def keep(self, job: Keep) -> None:
        self.jobs.append(job)

    def notice(self, hint: Hint) -> None:
        self.hints.append(hint)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def forget(self, namespace: Namespace) -> None:
        """Erase a tenant's records, and say so."""
        scope = namespace_id(namespace)
        self.records = {key: one for key, one in self.records.items() if one[0].namespace_id != scope}
        self.erasures += 1
        self.events.append(Erased([Erasure(self.erasures, scope, NO_SESSION)]))

    def work(self, count: int, fault: Reason | None = None) -> None:
        """Carry out the next `count` jobs; `fault` befalls the last record of each load."""
        for _ in range(min(count, len(self.jobs))):
            job = self.jobs.popleft()
            match job:
                case Look():
                    self.events.append(Found(job.serial, self._tiers(job.keys), self._tiers(job.states)))
                case Load() if self.layered and self._untouched(self.arrivals[job.serial]):
                    self.arrivals[job.serial].arrived(1)
                    self.jobs.appendleft(job)
                case Load():
                    self.events.append(self._load(job, fault))
                case Keep():
                    known = job.key in self.records
                    self.records[job.key] = (job.owner, self._read(job.kind, job.place))
                    self.events.append(Kept(job.kind, job.place, Reason.PRESENT if known else Reason.STORED))

    def finish(self, arrivals: Arrivals) -> None:
        """A step waits for the rest of this load."""
        for job in self.jobs:
            if isinstance(job, Load) and self.arrivals[job.serial] is arrivals:
                self.jobs.remove(job)
                self.events.append(self._load(job, self.gate_fault))
                return

    @staticmethod
    def _untouched(arrivals: Arrivals) -> bool:
        return arrivals.fraction == 0 and not arrivals.failed

    def _tiers(self, keys: object) -> list[Tier | None]:
        return [Tier.NVME if key in self.records else None for key in keys]  # type: ignore[attr-defined]

    def _load(self, job: Load, fault: Reason | None) -> Loaded:
        reasons = []
        for index, (key, block) in enumerate(zip(job.keys, job.blocks, strict=True)):
            wrong = fault if index == len(job.keys) - 1 else None
            reasons.append(self._bring(RecordKind.BLOCK, key, block, wrong))
        state = None
        if job.state is not None:
            state = self._bring(RecordKind.STATE, *job.state, None if job.keys else fault)
        arrivals = self.arrivals[job.serial]
        if all(reason is Reason.HIT for reason in reasons) and not arrivals.failed:
            arrivals.arrived(2)
        else:
            arrivals.fail()
        return Loaded(job.serial, reasons, [Tier.NVME] * len(reasons), state, 0.001)

    def _bring(self, kind: RecordKind, key: bytes, place: int, fault: Reason | None) -> Reason:
        """What is written when it fails is wrong on purpose."""
        assert self.runner is not None
        known = self.records.get(key)
        reason = fault or (Reason.HIT if known is not None else Reason.ABSENT)
        if kind is RecordKind.STATE:
            self.runner.slots[place] = known[1] if reason is Reason.HIT and known else (-1, b"wrong")  # type: ignore[assignment]
        elif reason is Reason.HIT and known is not None:
            self.runner.memory[place] = list(known[1])  # type: ignore[call-overload]
        else:
            self.runner.memory[place] = [(-1, -1)] * self.runner.info.block_tokens
        return reason

    def _read(self, kind: RecordKind, place: int) -> object:
        assert self.runner is not None
        return self.runner.slots[place] if kind is RecordKind.STATE else tuple(self.runner.memory[place])
