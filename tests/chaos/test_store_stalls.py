"""A client of the daemon is stopped (SIGSTOP) in the middle of a call, past its lease, and goes on later.

One client is, or one at every point of a call, all at the same time. Meanwhile the others find and store what they
want, the memory that it was looking at becomes somebody else's, and what it may have been given is dropped in time.
What it says it read, when it goes on, is right or no hit. At release scale the log of those that are stopped together
is in memory.
"""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.support.scale import in_memory, seed, tally
from tests.support.stalled import READS, WRITES
from tests.support.stores import LOG, holds, reasons, store_all

from isthmus.contracts.blocks import Reason, Tier
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.state.kv.client import RemoteStore, open_client
from isthmus.state.kv.daemon import Daemon
from isthmus.state.kv.lanepool import ClientSettings
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import Store, open_store

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 20.0
FULL = 84
"""Records that fill the arena."""
CLOCK = SystemClock()


def in_time(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Client:
    """`tests.support.stalled` in a process of its own."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "tests.support.stalled", str(path)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == "ready"

    def order(self, verb: str, names: list[str], point: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"verb": verb, "names": names, "point": point}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def stopped(self) -> bool:
        state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert self.process.poll() is None
        return state == "T"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WITHIN_S)

    def go_on(self) -> list[tuple[str, bool]]:
        self.process.send_signal(signal.SIGCONT)
        told = json.loads(self.answer())
        assert told["stopped"], "it never came to the point"
        return [(reason, right) for reason, right in told["found"]]


@contextmanager
def house(folder: Path, lease_s: float) -> Iterator[tuple[Path, Store, Daemon]]:
    settings = StoreSettings(
        arena_bytes=1 << 20, region_bytes=1 << 19, lease_s=lease_s, path=str(folder / "log"), log=LOG
    )
    place = DaemonSettings(socket=str(folder / "run" / "s"))
    store = open_store(settings, CLOCK, SystemEntropy())
    daemon = Daemon(store, place, CLOCK, SystemEntropy())
    daemon.start()
    try:
        yield Path(place.socket), store, daemon
    finally:
        daemon.stop()
        store._parts.dram.check()
        store.close()


def stalls(folder: Path, rounds: int, number: int, *, together: bool = False) -> Counter[str]:
    """Stop a client at every point, `rounds` times; what it said in the end, by point. `together`: one client for each
    point, all of them stopped at the same time.
    """
    chance = random.Random(number)
    told: Counter[str] = Counter()
    points = (*READS, *WRITES)
    groups = [points] if together else [(point,) for point in points]
    with house(folder, lease_s=0.3 if together else 0.15) as (path, store, daemon), ExitStack() as ended:
        good = open_client(path, CLOCK, ClientSettings(window_bytes=1 << 20, area_bytes=1 << 19))
        ended.callback(in_time, lambda: daemon.clients == 0, "nobody is left")
        ended.callback(good.close)
        bad = [Client(path) for _ in groups[0]]
        for client in bad:
            ended.callback(client.end)
        for turn in range(rounds):
            for group in groups:
                told.update(stalled(dict(zip(group, bad, strict=True)), good, store, turn, chance))
        assert store.counts.snapshot().get("client_none_violation", 0) == 0
    return told


def stalled(bad: dict[str, Client], good: RemoteStore, store: Store, turn: int, chance: random.Random) -> Counter[str]:
    """Each client is stopped at its point, the others go on, then it does; what it said."""
    told: Counter[str] = Counter()
    mine = {point: [f"mine-{turn}-{point}-{index}" for index in range(4)] for point in bad}
    for point in READS:
        store_all(good, mine.get(point, []))
    if chance.random() < 0.3:
        assert good.flush(5.0)
        store.admin.evict(Tier.DRAM, 1 << 20, 1.0)
    for point, client in bad.items():
        client.order("read" if point in READS else "write", mine[point], point)
    for point, client in bad.items():
        in_time(client.stopped, f"it stops when it is {point}")
    disturb(good, store, turn, "-".join(bad))
    for point, client in bad.items():
        told["stalls"] += 1
        for reason, right in client.go_on():
            told[f"{point}: {reason}"] += 1
            assert reason != Reason.HIT or (point in READS and right), f"{point}: wrong bytes"
        for name in mine[point]:
            told["kept"] += holds(good, name)  # whatever it wrote, it is that or nothing
    in_time(lambda: len(store.reader) == 0, "no lease is left")
    return told


def disturb(good: RemoteStore, store: Store, turn: int, point: str) -> None:
    """What the others do meanwhile: first with the lease, then all of the memory anew, in which nothing is pinned."""
    assert reasons(store_all(good, [f"early-{turn}-{point}"]))[0] in (Reason.STORED, Reason.PRESENT)
    assert holds(good, f"early-{turn}-{point}")
    in_time(lambda: len(store.reader) == 0, "its lease ends without it")
    tries = itertools.count()
    names: list[str] = []

    def all_stored() -> bool:
        names[:] = [f"other-{turn}-{point}-{next(tries)}-{index}" for index in range(FULL)]
        return set(reasons(store_all(good, names))) == {Reason.STORED}

    # What is on its way to the log may not go yet, for a moment; what is pinned for who is stopped would never.
    in_time(all_stored, "the memory is the others'")
    assert all(holds(good, name) for name in names[::7])


@pytest.mark.parametrize("together", [False, True])
def test_a_client_that_is_stopped_in_a_call_harms_nobody(tmp_path: Path, together: bool) -> None:
    told = stalls(tmp_path, 1, 1, together=together)
    for point in READS:
        assert told[f"{point}: hit"] == 0, "its lease had ended"
    assert told["filled: stored"] == told["asked: stored"] == 4


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_client_that_is_stopped_in_a_call_harms_nobody_many_times(tmp_path: Path) -> None:
    with in_memory(tmp_path) as memory:
        alone, together = stalls(tmp_path, 15, seed(7)), stalls(memory, 150, seed(7), together=True)
    tally({"stalls": alone["stalls"] + together["stalls"], "stalls_alone": alone["stalls"]})
