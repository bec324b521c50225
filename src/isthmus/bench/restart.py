"""`isthmus bench restart`: what is left after kill -9, and how long it takes to be there again.

Kills. A daemon (`isthmus store serve`) keeps blocks that a worker, its client, wrote. They are read, then the worker
writes more, about as fast as an engine computes them, and at a random moment one of the two is killed with SIGKILL, or
both at once. What was killed is started again and everything is read once more. The hit ratio afterwards over that
before is of all blocks older than the durable lag when the kill came: those of before, and those written meanwhile
whose write had returned at least so long ago as the longest lag that the store had shown. Younger ones are counted
apart. Every hit is compared with what was written.

Recovery. A worker writes records of 4 KiB until the log has as many as asked for. In each round it goes on writing as
fast as it can, the daemon is killed at a random moment, and its log, with open segments and torn writes, is opened: by
a process that does nothing else (seconds, CPU seconds, bytes read), then by a daemon (seconds until it serves, beside
one whose log is empty). Beside it stands what the disk reads without a store (disk_limits.py).
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.bench.client import BadAnswer
from isthmus.bench.disk_limits import disk_rates
from isthmus.bench.meters import cpu_seconds, disk_bytes_read, other_load, read
from isthmus.bench.restart_worker import MOST_BATCH
from isthmus.bench.targets import LinesTarget
from isthmus.config import inherited_environment

KILLS = ("worker", "daemon", "both")
HELD = 0.99
"""The part of the hits that is to be left."""
RECORD = (1, 4096)
"""Chunks and bytes of a chunk of the records of the recovery."""
SAMPLE = 2000

_WITHIN_S = 120.0
_SPAN = 4352
"""Bytes that a record of 4 KiB takes of a log, about."""
_MIB = 1 << 20
_DIGITS = 4

Say = Callable[[str], None]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is tried: `blocks` of `chunks` x `chunk_bytes` are there before the kills, of which there are `rounds`
    of each kind; the log that is recovered has `records` of 4 KiB, and is recovered `recoveries` times.
    """

    folder: Path
    seed: int = 1
    blocks: int = 8192
    chunks: int = 16
    chunk_bytes: int = 8192
    rounds: int = 5
    bytes_per_s: float = 128e6
    memory: int = 256 * _MIB
    records: int = 1_000_000
    recoveries: int = 5
    delay_s: tuple[float, float] = (0.8, 2.4)
    """How long the worker has been writing when the kill comes: at least, at most."""
    disk_seconds: float = 0.1
    disk_bytes: int = 512 * _MIB
    """Of each measurement of the disk without a store; and of its file."""

    @property
    def kills_disk(self) -> int:
        """Bytes of the log of the kills: nothing has to leave it."""
        meanwhile = len(KILLS) * self.rounds * self.delay_s[1] * self.bytes_per_s
        return _whole(1.3 * (self.blocks * self.chunks * self.chunk_bytes + meanwhile) + 1024 * _MIB)

    @property
    def recovery_disk(self) -> int:
        """Bytes of the log that is recovered."""
        return _whole(1.1 * self.records * _SPAN + (512 + 512 * self.recoveries) * _MIB)


def _whole(size: float) -> int:
    return int(size) // (64 * _MIB) * 64 * _MIB


class Daemon:
    """`isthmus store serve` in a process of its own, to be killed."""

    def __init__(self, state: Path, memory: int, disk: int) -> None:
        self.state, self.disk = state, disk
        self._command = [sys.executable, "-m", "isthmus", "store", "serve", "--state-dir", str(state)]
        self._command += ["--store-memory", str(memory), "--store-disk", str(disk)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Where clients connect."""
        return self.state / "store" / "store.sock"

    def start(self) -> dict[str, float]:
        """Start; seconds until it serves, CPU seconds and bytes read until then. Raises `BadAnswer`."""
        began = time.monotonic()
        process = self._process = subprocess.Popen(
            self._command, env=inherited_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        watch = threading.Timer(_WITHIN_S, process.kill)
        watch.start()
        try:
            said = process.stderr.readline() if process.stderr is not None else b""
        finally:
            watch.cancel()
        took = time.monotonic() - began
        if b"keeps blocks" not in said:
            self.kill()
            raise BadAnswer(f"the store did not start: {said.decode(errors='replace')}")
        pid = process.pid
        return {"ready_s": took, "cpu_s": cpu_seconds([pid]), "read_bytes": disk_bytes_read(pid)}

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; nothing when it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


class Client(LinesTarget):
    """restart_worker.py as a client of a daemon."""

    def __init__(self, daemon: Daemon, shape: tuple[int, int], seed: int, log: Path) -> None:
        command = [sys.executable, "-m", "isthmus.bench.restart_worker", "client", str(daemon.socket)]
        super().__init__("the worker", [*command, *map(str, shape), str(seed)], {}, log)

    def write(self, first: int, count: int, bytes_per_s: float = 0.0) -> None:
        """Begin to write; see `written`. Raises `BadAnswer` when it is gone."""
        pipe = self.child.stdin
        if pipe is None:
            raise BadAnswer("the worker has no input")
        pipe.write(json.dumps({"write": [first, count], "bytes_per_s": bytes_per_s}).encode() + b"\n")
        pipe.flush()

    def written(self) -> tuple[list[dict[str, Any]], str]:
        """What it told of its writing, to its end, and why it ended: "killed" when it was."""
        told: list[dict[str, Any]] = []
        while line := self._line():
            if "end" in line:
                return told, str(line["end"])
            told.append(line)
        return told, "killed"

    def wrote(self, first: int, count: int) -> list[dict[str, Any]]:
        """Write, to the end. Raises `BadAnswer` when not all was taken in."""
        self.write(first, count)
        told, reason = self.written()
        if reason != "stored":
            raise self.failure(f"could not write: {reason}")
        return told

    def served(self, number: int) -> float:
        """When the store had that record. Raises `BadAnswer` when it does not come back."""
        at = self.ask({"served": number, "within_s": _WITHIN_S})["at"]
        if at is None:
            raise self.failure(f"does not find record {number} again")
        return float(at)

    def read(self, ranges: Sequence[Range]) -> dict[str, Any]:
        """Read records; see restart_worker.py."""
        return self.ask({"read": ranges}) if ranges else {"reasons": {}, "tiers": {}, "wrong": 0, "missed": []}

    def kill(self) -> None:
        """SIGKILL. What it told before can still be read."""
        self.child.kill()

    def end(self) -> None:
        """Wait for a killed one, or end it; give its pipes back."""
        self.stop()


@dataclass(slots=True)
class _House:
    """A daemon, its worker, and how many records were written."""

    plan: Plan
    daemon: Daemon
    shape: tuple[int, int]
    client: Client = field(init=False)
    next: int = 0
    lag_s: float = 0.0
    starts: int = 0

    def open(self) -> dict[str, float]:
        """Start both; what the daemon's start took."""
        started = self.daemon.start()
        self.employ()
        return started

    def employ(self) -> None:
        """Start a new worker."""
        self.starts += 1
        log = self.daemon.state / f"worker-{self.starts}.log"
        self.client = Client(self.daemon, self.shape, self.plan.seed, log)
        self.client.start()

    def fill(self, count: int) -> None:
        """Write so many records, and wait until they are durable. Raises `BadAnswer`."""
        told = self.client.wrote(self.next, count)
        self.next += count
        self.lag_s = max([self.lag_s, *(one["lag_s"] for one in told)])
        durable = self.client.ask({"flush": 60.0})["durable"]
        if durable < told[-1]["sequence"]:
            raise BadAnswer("what was written does not become durable")

    def close(self) -> None:
        """End both."""
        if hasattr(self, "client"):
            self.client.end()
        self.daemon.kill()


# ---- kills


def kills(plan: Plan, say: Say) -> dict[str, Any]:
    """Kill the worker, the daemon, and both, in turn. Raises `BadAnswer`."""
    chance = random.Random(f"kills {plan.seed}")
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KILLS}
    with _fresh(plan.folder / "kills") as state:
        house = _House(plan, Daemon(state, plan.memory, plan.kills_disk), (plan.chunks, plan.chunk_bytes))
        with closing(house):
            house.open()
            house.fill(plan.blocks)
            for number in range(plan.rounds):
                for kind in KILLS:
                    rounds[kind].append(_kill(house, kind, chance.uniform(*plan.delay_s)))
                    say(f"round {number + 1}, {kind}: {_sentence(rounds[kind][-1])}")
    return {kind: summary(ones) for kind, ones in rounds.items()}


def _kill(house: _House, kind: str, delay_s: float) -> dict[str, Any]:
    """One round."""
    plan, client, before_range = house.plan, house.client, (0, house.plan.blocks)
    before = client.read([before_range])
    size = plan.chunks * plan.chunk_bytes
    client.write(house.next, int(10 * plan.delay_s[1] * plan.bytes_per_s / size) + 1, plan.bytes_per_s)
    time.sleep(delay_s)
    killed = time.monotonic()
    if kind != "worker":
        house.daemon.kill()
    if kind != "daemon":
        client.kill()
    told, reason = client.written()
    started = house.daemon.start() if kind != "worker" else {}
    if kind != "daemon":
        client.end()
        house.employ()
    elif reason == "stored":
        raise BadAnswer("the worker had written everything before the store was killed")
    again = house.client.served(0)
    house.lag_s = max([house.lag_s, *(one["lag_s"] for one in told)])
    old, young = split(told, killed - house.lag_s)
    house.next = max([house.next, *(first + count for first, count in [*old, *young])])
    # What the call under way wrote was not told of: those numbers are not used again.
    house.next += MOST_BATCH
    after, after_young = house.client.read([before_range, *old]), house.client.read(young)
    durable = max((one["durable"] for one in told), default=0)
    return {
        "asked_before": plan.blocks,
        "hits_before": before["reasons"].get("hit", 0),
        "tiers_before": before["tiers"],
        "written_meanwhile": sum(count for _, count in old),
        "hits_after": after["reasons"].get("hit", 0),
        "tiers_after": after["tiers"],
        "reasons_after": after["reasons"],
        "young": sum(count for _, count in young),
        "young_hits": after_young["reasons"].get("hit", 0),
        "not_durable_when_killed": sum(one["kept"][1] for one in told if one["sequence"] > durable),
        "wrong": before["wrong"] + after["wrong"] + after_young["wrong"],
        "lag_s": round(house.lag_s, _DIGITS),
        "served_again_s": round(again - killed, _DIGITS),
        "daemon_ready_s": round(started["ready_s"], _DIGITS) if started else None,
    }


def split(told: Sequence[dict[str, Any]], until: float) -> tuple[list[Range], list[Range]]:
    """What a worker told of, as ranges: whose write had returned by `until`, and later."""
    old = [(int(first), int(count)) for one in told if one["at"] <= until for first, count in [one["kept"]]]
    young = [(int(first), int(count)) for one in told if one["at"] > until for first, count in [one["kept"]]]
    return old, young


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of one kind of kill together. What was written meanwhile was there before: its writes had returned."""
    asked = sum(one["asked_before"] + one["written_meanwhile"] for one in rounds)
    before = sum(one["hits_before"] + one["written_meanwhile"] for one in rounds)
    after = sum(one["hits_after"] for one in rounds)
    again = [one["served_again_s"] for one in rounds]
    ready = [one["daemon_ready_s"] for one in rounds if one["daemon_ready_s"] is not None]
    reasons: Counter[str] = Counter()
    for one in rounds:
        reasons.update(one["reasons_after"])
    return {
        "kills": len(rounds),
        "asked": asked,
        "hit_ratio_before": round(before / asked, 6),
        "hit_ratio_after": round(after / asked, 6),
        "after_over_before": round(after / before, 6) if before else 0.0,
        "held": after >= HELD * before,
        "reasons_after": dict(reasons),
        "young": sum(one["young"] for one in rounds),
        "young_hits": sum(one["young_hits"] for one in rounds),
        "wrong": sum(one["wrong"] for one in rounds),
        "longest_lag_s": max(one["lag_s"] for one in rounds),
        "served_again_s": {"median": round(statistics.median(again), _DIGITS), "most": max(again)},
        "daemon_ready_s": {"median": round(statistics.median(ready), _DIGITS), "most": max(ready)} if ready else None,
        "rounds": list(rounds),
    }


def _sentence(one: dict[str, Any]) -> str:
    asked = one["asked_before"] + one["written_meanwhile"]
    return (
        f"{one['hits_after']} of {asked} blocks hit, {one['young_hits']} of {one['young']} younger ones, "
        f"served again after {one['served_again_s']:.2f} s"
    )


# ---- recovery


def recovery(plan: Plan, say: Say) -> dict[str, Any]:
    """Open a log of many records after a kill -9, several times. Raises `BadAnswer`."""
    chance, rounds = random.Random(f"recovery {plan.seed}"), list[dict[str, Any]]()
    with _fresh(plan.folder / "recovery") as state:
        house = _House(plan, Daemon(state, plan.memory, plan.recovery_disk), RECORD)
        with closing(house):
            house.daemon.start()
            house.daemon.kill()
            empty = house.open()
            began = time.monotonic()
            house.fill(plan.records)
            filled_s = time.monotonic() - began
            say(f"wrote {plan.records} records in {filled_s:.0f} s")
            for number in range(plan.recoveries):
                rounds.append(one := _recover(house, chance))
                words = f"{one['records']} records, {one['read_bytes'] / 1e6:.0f} MB read in {one['seconds']:.2f} s"
                say(f"recovery {number + 1}: {words}; the daemon served after {one['daemon_ready_s']:.2f} s")
    say("the disk without a store")
    rates = [one for one in disk_rates(plan.folder, plan.disk_seconds, plan.disk_bytes) if one.operation == "read"]
    best = max(rates, key=lambda rate: rate.gb_per_s)
    return {
        "record_bytes": RECORD[0] * RECORD[1],
        "log_bytes": plan.recovery_disk,
        "fill_s": round(filled_s, _DIGITS),
        "empty_daemon_ready_s": round(empty["ready_s"], _DIGITS),
        "disk_read": {"gb_per_s": round(best.gb_per_s, _DIGITS), "how": f"{best.backend}, {best.size} x {best.depth}"},
        **typical(rounds, best.gb_per_s * 1e9),
        "rounds": rounds,
    }


def typical(rounds: Sequence[dict[str, Any]], bytes_per_s: float) -> dict[str, Any]:
    """Medians over the rounds; what the disk alone would have taken to read as much."""
    names = (
        "records",
        "seconds",
        "cpu_s",
        "read_bytes",
        "segments_scanned",
        "daemon_ready_s",
        "daemon_cpu_s",
        "other_load",
    )
    found = {name: round(statistics.median(one[name] for one in rounds), _DIGITS) for name in names}
    return {
        **found,
        "seconds_a_million": round(statistics.median(one["seconds"] / one["records"] * 1e6 for one in rounds), _DIGITS),
        "reading_alone_s": round(found["read_bytes"] / bytes_per_s, _DIGITS),
        "sampled": sum(one["sampled"] for one in rounds),
        "sampled_hits": sum(one["sampled_hits"] for one in rounds),
        "wrong": sum(one["wrong"] for one in rounds),
    }


def _recover(house: _House, chance: random.Random) -> dict[str, Any]:
    """One round: kill the daemon while it is written to, open its log, start it again, read a sample."""
    daemon, client, known = house.daemon, house.client, house.plan.records
    client.write(house.next, known)
    time.sleep(chance.uniform(0.05, house.plan.delay_s[0]))
    daemon.kill()
    told, _ = client.written()
    house.next = max([house.next, *(one["kept"][0] + one["kept"][1] for one in told)]) + MOST_BATCH
    opener = [sys.executable, "-m", "isthmus.bench.restart_worker", "open", str(daemon.state), str(daemon.disk)]
    before = read([os.getpid()])
    done = subprocess.run(opener, capture_output=True, check=False, timeout=_WITHIN_S, env=inherited_environment())
    load = other_load(before, read([os.getpid()]))
    if done.returncode:
        raise BadAnswer(f"the log does not open: {done.stderr.decode(errors='replace')[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    started = daemon.start()
    client.served(0)
    sample = [(number, 1) for number in chance.sample(range(known), min(SAMPLE, known))]
    back = client.read(sample)
    return {
        **found,
        "other_load": round(load, 3),
        "daemon_ready_s": started["ready_s"],
        "daemon_cpu_s": started["cpu_s"],
        "daemon_read_bytes": started["read_bytes"],
        "sampled": len(sample),
        "sampled_hits": back["reasons"].get("hit", 0),
        "wrong": back["wrong"],
    }


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """An empty folder, removed in the end: logs are large."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
