"""A process that has stores die: it forks workers that are warm already, ends each in some way, and looks at what is
left. Run as a module: `python -m tests.support.deaths '{"folder": ..., "seed": 1, "deaths": 100}'`; prints counts as
JSON, and ends with status 1 and the story of the first life that was wrong.

How a worker ends: by SIGKILL at a random moment, or by its own hand before, after or in the middle of the n-th call of
some kind that it makes to the operating system. With `"power": true` it is the filesystem under it that ends, and the
worker sees its disk fail before it is killed.

Who looks: mostly the next worker, before it works and dies in turn (so that one opening serves both, and may itself be
cut short); sometimes this process, which then closes the log as one does; at times nobody.
"""

import fcntl
import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.disk import FAILING
from tests.support.lives import (
    Heard,
    Known,
    Message,
    Pipe,
    Told,
    Worker,
    piece,
    settings_of,
    telling_what_leaves,
    uncounted_pages,
)
from tests.support.power import Ground, PatientCalls, Powered, PoweredCalls

from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.errors import StoreError
from isthmus.state.kv.io.calls import Calls
from isthmus.state.kv.io.disk import LOCK_S
from isthmus.state.kv.settings import StoreSettings
from isthmus.state.kv.store import Store, open_store

WITHIN_S = 30.0
OPERATIONS = (12, 12, 40)
LIFE_DEATHS = 12
"""Of a worker, if nothing ends it before: one of these; and of a log, before another one is made."""
RESTS_S = 0.01
"""How long the log's threads go on when a worker is done, before that is killed."""

MOST = {"pwritev": 60, "uring_enter": 60, "preadv": 40, "fdatasync": 30, "fallocate": 12, "map_memory": 6, "open": 2}
"""About how many calls of a kind a worker makes. Others: a few."""


@dataclass(frozen=True)
class Plan:
    """How a worker ends. `call`: the kind, `nth` of them, `how`: before, after, or in the middle (of a write)."""

    backend: str
    seed: int
    call: str = ""
    nth: int = 0
    how: str = "before"
    since: str = "fork"
    delay_s: float = 0.0
    lame_s: float = 0.0
    """How long it lives on without power."""
    looks: bool = False
    """Whether it holds the log to what is known before it works."""


def planned(chance: random.Random, *, looks: bool) -> Plan:
    backend, seed = chance.choice(("auto", "threads")), chance.getrandbits(48)
    lame_s = chance.choice((0.0, 0.002, 0.02))
    if chance.random() < 0.5:
        since = "open" if chance.random() < 0.8 else "fork"
        # Mostly soon: what matters is how many moments are tried. Sometimes late, when much has happened.
        delay_s = chance.uniform(0.0, 0.025 if chance.random() < 0.8 else 0.1)
        return Plan(backend, seed, since=since, delay_s=delay_s, lame_s=lame_s, looks=looks)
    likely = ("pwritev", "fdatasync") if backend == "threads" else ("uring_enter", "fdatasync")
    call = chance.choice(likely) if chance.random() < 0.7 else chance.choice(FAILING)
    nth = int(MOST.get(call, 3) ** chance.random())
    how = chance.choice(("before", "after", "part") if call == "pwritev" else ("before", "after"))
    since = "open" if chance.random() < 0.5 else "fork"
    return Plan(backend, seed, call, nth, how, since, lame_s=lame_s, looks=looks)


class DeadlyCalls(PoweredCalls):
    """Does the `deed` at the planned call, counted from the first one or from `count`. Calls of io_uring count only
    when they hand something over.
    """

    def __init__(self, plan: Plan, deed: Callable[[], None], *, cached: bool) -> None:
        super().__init__(cached=cached)
        self._plan, self._deed = plan, deed
        self._counted = 0
        self._counts = plan.since == "fork"
        self._counting = threading.Lock()
        if plan.call:
            setattr(self, plan.call, partial(self._counted_call, getattr(self, plan.call)))

    def count(self) -> None:
        """From now on calls count."""
        self._counts = True

    def _counted_call(self, call: Callable[..., object], *values: Any, **named: Any) -> object:
        with self._counting:
            counts = self._counts and not (self._plan.call == "uring_enter" and not values[1])
            self._counted += counts
            now = counts and self._counted == self._plan.nth
        if not now:
            return call(*values, **named)
        if self._plan.how == "part":
            (whole,) = values[1]
            keep = random.Random(self._plan.seed).randrange(len(whole) // 512 + 1) * 512
            with suppress(OSError):
                call(values[0], [whole[:keep]], values[2])
        if self._plan.how != "after":
            self._deed()
            return call(*values, **named)
        result = call(*values, **named)
        self._deed()
        return result


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell_of_dying_threads(told: Told) -> None:
    """A thread of a store that ends with an error is wrong, whatever went on without it."""

    def died(uncaught: threading.ExceptHookArgs) -> None:
        told(["wrong", "a thread died: " + "".join(traceback.format_exception(uncaught.exc_value))])

    threading.excepthook = died


def work(ground: Ground, known: Known, plan: Plan, told: Pipe) -> None:
    """A worker's life."""

    def cut() -> None:
        told(["cut"])
        ground.cut()

    tell_of_dying_threads(told)
    looking = plan.looks

    def leaves(message: Message) -> None:
        if looking:
            known.hear(message)
        told(message)

    deed = cut if ground.powered else kill_self
    # Until the end: the log's threads evict long after the work is done.
    with telling_what_leaves(leaves):
        try:
            calls = DeadlyCalls(plan, deed, cached=ground.cached)
            store = opened(settings_of(ground.path, known.life, plan.backend), calls)
            if plan.looks:
                told(known.recovered(store))
                looking = False
            calls.count()
            told(["open"])
            ground.write_back(plan.seed)
            Worker(store, known, plan.seed, told).run(OPERATIONS[plan.seed % len(OPERATIONS)])
            told(["done"])
            if plan.seed % 8 == 0:
                store.close()
                told(["closed"])
        except (StoreError, OSError) as error:
            told(["failed", f"{error!r}: {traceback.format_exc()}", ground.is_cut])
        except AssertionError as error:
            # Unless it was without power.
            told(["amiss", f"{error!r}: {traceback.format_exc()}"])
        except BaseException as error:  # noqa: BLE001 - told to the parent, whatever it is
            told(["wrong", f"{error!r}: {traceback.format_exc()}"])
        threading.Event().wait(WITHIN_S)


class Deaths:
    """Lives one after the other."""

    def __init__(self, ground: Ground, seed: int) -> None:
        self.ground = ground
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.life = 0
        self.story: list[Plan] = []

    def run(self, deaths: int, seconds: float) -> None:
        """Many deaths, for at most so long."""
        until = time.monotonic() + seconds
        # What is there from the start neither has to be looked through before each fork nor copied after it.
        gc.collect()
        gc.freeze()
        while self.counts["deaths"] < deaths and time.monotonic() < until:
            self.life = self.random.getrandbits(40)
            self.one_life(min(LIFE_DEATHS, deaths - self.counts["deaths"]))

    def one_life(self, deaths: int) -> None:
        known = Known(self.life)
        self.story = []
        self.ground.fresh()
        piece.cache_clear()
        for nth in range(deaths):
            # Sometimes the next one finds what this one left, and dies over it as well.
            plan = planned(self.random, looks=nth > 0 and self.random.random() < 0.6)
            self.story.append(plan)
            self.die(known, plan)
            assert not known.wrong, "; ".join(known.wrong)
            self.counts["deaths"] += 1
            if nth + 1 == deaths or self.random.random() < 0.15:
                self.look(known)
        self.counts["lives"] += 1
        self.counts["acknowledged"] += known.acknowledged
        self.counts.update(known.counts)

    def die(self, known: Known, plan: Plan) -> None:
        """One worker, to its end."""
        assert threading.active_count() == 1, "a fork takes one thread only"
        gc.collect()
        known.begin()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try:
                work(self.ground, known, plan, Pipe(writing))
            finally:
                os._exit(1)
        os.close(writing)
        try:
            self.listen(known, plan, pid, reading)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reading)
        if self.ground.powered:
            self.ground.cut()
            self.ground.back()
        else:
            self.released()

    def released(self) -> None:
        """Wait until the kernel has taken down the rings of who died: until then they keep the log locked. On a busy
        machine that takes longer than an opening waits for it.
        """
        try:
            descriptor = os.open(self.ground.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        start = time.monotonic()
        try:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                assert time.monotonic() < start + WITHIN_S, "a dead process keeps its log locked"
                time.sleep(0.0005)
        finally:
            os.close(descriptor)
        self.counts["released_late"] += time.monotonic() - start > LOCK_S

    def listen(self, known: Known, plan: Plan, pid: int, descriptor: int) -> None:
        """Hear what the worker tells until its end, which may be our doing."""
        heard, start = Heard(), time.monotonic()
        end = start + (WITHIN_S if plan.call or plan.since != "fork" else plan.delay_s)
        alive = True
        while True:
            if alive and time.monotonic() >= end:
                alive = self.end(plan, pid, descriptor, known, heard)
            left = max(0.0, end - time.monotonic()) if alive else WITHIN_S
            if not select.select([descriptor], [], [], left)[0]:
                assert alive, "a killed worker keeps its pipe open"
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                break
            for message in heard(data):
                if message[0] == "failed" and not message[2] and not self.ground.is_cut:
                    message = ["wrong", message[1]]  # nothing had failed under it
                known.hear(message)
                name, now = message[0], time.monotonic()
                if name == "open" and plan.since == "open" and not plan.call:
                    end = min(end, now + plan.delay_s)
                elif name == "cut":
                    self.counts["cut_at_a_call"] += 1
                    end = min(end, now + plan.lame_s)
                elif name in ("done", "closed", "failed", "amiss", "wrong"):
                    end = min(end, now + (RESTS_S if name == "done" else 0.0))
        if alive and plan.call and not self.ground.powered:
            self.counts["killed_at_a_call"] += 1

    def end(self, plan: Plan, pid: int, descriptor: int, known: Known, heard: Heard) -> bool:
        """Kill the worker, or take its power and kill it then."""
        if self.ground.powered and not self.ground.is_cut:
            self.hear(known, heard, descriptor, 0.0)
            known.hear(["cut"])
            self.ground.cut()
            self.hear(known, heard, descriptor, plan.lame_s)
        os.kill(pid, signal.SIGKILL)
        return False

    def hear(self, known: Known, heard: Heard, descriptor: int, seconds: float) -> None:
        """What is told within so long, or what was told already."""
        until = time.monotonic() + seconds
        while select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
            data = os.read(descriptor, 1 << 16)
            for message in heard(data):
                known.hear(message)
            if not data or (seconds and time.monotonic() >= until):
                return

    def look(self, known: Known) -> None:
        """Open what was left and hold it to what is known."""
        known.begin()
        with telling_what_leaves(known.hear):
            store = opened(settings_of(self.ground.path, known.life), PatientCalls())
            try:
                known.recovered(store)
                store._parts.dram.check()
            finally:
                store.close()
        self.counts["looks"] += 1


def opened(settings: StoreSettings, calls: Calls) -> Store:
    return open_store(settings, SystemClock(), SystemEntropy(), calls=calls)


def main(arguments: Sequence[str]) -> int:
    given = json.loads(arguments[0])
    folder = Path(given["folder"])
    ground = Powered(folder) if given.get("power") else Ground(folder)
    deaths = Deaths(ground, given["seed"])
    try:
        with uncounted_pages():
            deaths.run(given["deaths"], given.get("seconds", 1e9))
    except BaseException:  # noqa: BLE001 - what is wrong is kept, whatever it is
        kept = folder / f"wrong-{deaths.life}"
        with suppress(OSError):
            shutil.copyfile(ground.path, kept)
        story = "\n".join(str(plan) for plan in deaths.story)
        print(f"seed {given['seed']}, life {deaths.life}, kept in {kept}:\n{story}", file=sys.stderr)
        traceback.print_exc()
        return 1
    finally:
        ground.close()
    print(json.dumps(dict(deaths.counts)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
