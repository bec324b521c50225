"""kill -9 of the real thing: `isthmus store serve` as a process of its own, its clients and its administrator over the
socket. What it told to be durable is there when it is started again; what was forgotten is not.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.lives import NAMESPACES, SESSIONS, Known, piece
from tests.support.scale import seed, tally

from isthmus.contracts.blocks import Reason, Tier
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.errors import StoreUnavailable
from isthmus.state.kv.administrator import Administrator
from isthmus.state.kv.client import RemoteStore, open_client
from isthmus.state.kv.lanepool import ClientSettings

START_S = 60.0
CLOCK = SystemClock()
CLIENT = ClientSettings(window_bytes=1 << 20, area_bytes=1 << 20, backoff_s=(0.001, 0.02))
LIFE_KILLS = 8
TOGETHER = 3


class Binary:
    """`isthmus store serve`, from its start until it is killed."""

    def __init__(self, state: Path) -> None:
        command = [sys.executable, "-m", "isthmus", "store", "serve", "--state-dir", str(state)]
        command += ["--store-memory", "16MiB", "--store-disk", "160MiB"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ready(self) -> bool:
        """Whether it serves; False when it was killed before."""
        assert self.process.stderr is not None
        assert select.select([self.process.stderr], [], [], START_S)[0], "it neither starts nor ends"
        said = self.process.stderr.readline()
        assert not said or b"keeps blocks" in said, said + self.process.stderr.read()
        return bool(said)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(START_S) == -signal.SIGKILL, "it ended before it was killed"
        assert self.process.stderr is not None
        self.process.stderr.close()


class Client:
    """Writes, forgets and reads, until nobody answers any more."""

    def __init__(self, socket: Path, known: Known, chance: random.Random) -> None:
        self.store: RemoteStore = open_client(socket, CLOCK, CLIENT)
        self.admin = Administrator(socket, CLOCK)
        self.known, self.random = known, chance

    def run(self, operations: int) -> None:
        for _ in range(operations):
            if not self.step():
                return

    def step(self) -> bool:
        """Whether the store is still there."""
        known, what = self.known, self.random.random()
        if what < 0.8:
            numbers = list(range(known.fresh, known.fresh + 24))
            known.hear(["offer", numbers])
            outcomes = self.store.write([piece(known.life, number).put() for number in numbers], 5.0)
            taken = [
                [number, outcome.sequence]
                for number, outcome in zip(numbers, outcomes, strict=True)
                if outcome.reason is Reason.STORED and outcome.tier is Tier.NVME
            ]
            known.hear(["take", taken])
            return len(taken) == len(numbers)
        if what < 0.95:
            durable = self.store.flush(5.0)
            known.hear(["durable", durable])
            return durable > 0
        namespace, session = self.random.choice(NAMESPACES), self.random.choice(SESSIONS)
        known.hear(["forgetting", namespace, session])
        try:
            erasure = self.admin.forget(namespace, session, 10.0)
        except StoreUnavailable:
            return False
        known.hear(["forgotten", namespace, session, erasure.number])
        return True

    def close(self) -> None:
        self.store.close()
        self.admin.close()


def kills(folder: Path, count: int, number: int) -> Counter[str]:
    """Start and kill it so often."""
    chance = random.Random(number)
    told: Counter[str] = Counter()
    while told["binary_kills"] < count:
        known = Known(chance.getrandbits(40))
        state = folder / f"{known.life}"
        turns = min(LIFE_KILLS, count - told["binary_kills"])
        for turn in range(turns + 1):
            binary = Binary(state)
            try:
                told.update(one_life(binary, state, known, chance, last=turn == turns))
            finally:
                if binary.process.poll() is None:
                    binary.kill()
        told["binary_kills"] += turns
        told["binary_acknowledgements"] += known.acknowledged
        for file in (state / "store").iterdir():
            file.unlink()
    return told


def one_life(binary: Binary, state: Path, known: Known, chance: random.Random, *, last: bool) -> dict[str, int]:
    """From a start to a kill: look at what is there, and work until it is gone."""
    if not last and chance.random() < 0.25:
        # While it starts: looking for what it left is left to the next one.
        threading.Event().wait(chance.uniform(0.0, 1.0))
        binary.kill()
        return {"killed_while_starting": 1}
    known.begin()
    assert binary.ready()
    client = Client(state / "store" / "store.sock", known, chance)
    try:
        stats = client.store.stats()
        assert stats.epoch, "it answers"
        known.hold(client.store, stats)
        if last:
            return {}
        timer = threading.Timer(chance.uniform(0.0, 0.3), os.kill, (binary.process.pid, signal.SIGKILL))
        timer.start()
        try:
            client.run(10_000)
        finally:
            timer.cancel()
            timer.join()
    finally:
        client.close()
    binary.kill()
    return {"lives": 1}


def test_the_command_keeps_what_it_told_to_be_durable(tmp_path: Path) -> None:
    told = kills(tmp_path, 3, 5)
    assert told["binary_acknowledgements"] > 50


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_the_command_keeps_what_it_told_to_be_durable_many_times(tmp_path: Path) -> None:
    # Mostly it starts, on one core: several at the same time, each with a state and clients of its own.
    with ThreadPoolExecutor(TOGETHER) as pool:
        folders = [tmp_path / str(at) for at in range(TOGETHER)]
        counted = pool.map(lambda folder: kills(folder, 60 // TOGETHER, seed(5) + int(folder.name)), folders)
        told = sum(counted, Counter[str]())
    tally({name: told[name] for name in ("binary_kills", "binary_acknowledgements", "killed_while_starting")})
    print(json.dumps(told))
