"""A store whose calls to the operating system fail, one after the other, and what must hold whatever fails:

- nothing that is read is wrong, and nothing that was forgotten is read, while calls fail and afterwards;
- what was told to be durable is there when the log is opened again;
- the store takes records in and makes them durable again, or says that it is read-only; every call comes back.

Run as a module: `python -m tests.support.faults fail <folder> <backend> <seed> <calls>` fails so many calls of one life
after the other and prints how many of which; `... work <folder> <seed>...` (under strace, which does the failing) works
on a store for each seed, each in a process of its own, and tells in files beside them, as lives do.
"""

import errno
import fcntl
import json
import os
import random
import shutil
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tests.support.disk import FailingCalls, Plan
from tests.support.lives import Known, Message, Pipe, Worker, piece, settings_of, telling_what_leaves, uncounted_pages

from isthmus.contracts.blocks import Reason, Tier
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.errors import StoreError
from isthmus.state.kv.settings import StoreSettings
from isthmus.state.kv.store import Store, open_store

OPERATIONS = 16
HASTE = 8
ERRORS = (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.EINTR, errno.EAGAIN)


@dataclass(frozen=True)
class Fault:
    """The `nth` call fails with `error`; `forever`: so do all later ones of its kind. `late`: after it was made."""

    nth: int
    error: int
    forever: bool = False
    late: bool = False

    def plan(self) -> Plan:
        kinds: set[str] = set()

        def failing(name: str, number: int) -> int:
            if number == self.nth:
                kinds.add(name)
                return self.error
            return self.error if self.forever and name in kinds else 0

        return failing


def faults(folder: Path, backend: str, number: int, *, least: int, of_life: int = 1 << 30) -> Counter[str]:
    """Fail calls of workers' lives, from the first to the last (`of_life`: so many of each, evenly), until `least` were
    failed; how often which.
    """
    chance = random.Random(number)
    failed: Counter[str] = Counter()
    with uncounted_pages():
        while failed.total() < least:
            life = chance.getrandbits(40)
            total = len(attempt(folder / "log", life, backend, None).made)
            step = max(1, total // of_life)
            for nth in range(chance.randrange(step), total, step):
                often = chance.choice(("once", "once", "forever", "late"))
                error = errno.EIO if chance.random() < 0.5 else chance.choice(ERRORS)
                if often == "forever" and error in (errno.EINTR, errno.EAGAIN) and chance.random() < 0.9:
                    often = "once"  # what passes by itself is waited for: half a minute of each such attempt
                fault = Fault(nth, error, forever=often == "forever", late=often == "late")
                try:
                    failed.update(attempt(folder / "log", life, backend, fault).failed[:1])
                except Exception as wrong:  # raised again, with what is needed to repeat it
                    raise AssertionError(f"{backend}, life {life}, {fault}: {wrong!r}") from wrong
    return failed


def told_to(known: Known) -> Callable[[Message], None]:
    """For a worker in this process: `known` hears from it directly what it does itself."""
    lock = threading.Lock()

    def told(message: Message) -> None:
        if message[0] in ("durable", "left", "wrong"):
            with lock:
                known.hear(message)

    return told


class Hasty(SystemClock):
    """The machine's clock, some times as fast: limits on what never comes are over sooner."""

    def monotonic(self) -> float:
        return super().monotonic() * HASTE


def attempt(path: Path, life: int, backend: str, fault: Fault | None) -> FailingCalls:
    """Work on a new store while a call fails, then see what it is worth. Raises AssertionError."""
    path.unlink(missing_ok=True)
    settings = settings_of(path, life, backend)
    known = Known(life)
    calls = FailingCalls(fault.plan() if fault else lambda *_: 0, late=bool(fault and fault.late), clock=Hasty())
    with telling_what_leaves(told_to(known)), unbroken_threads():
        try:
            store = open_store(settings, SystemClock(), SystemEntropy(), calls=calls)
        except StoreError:
            store = None
        if store is not None:
            try:
                Worker(store, known, life, told_to(known)).run(OPERATIONS)
                calls.plan = lambda *_: 0
                assert goes_on(store, known) or store.stats().gauges["read_only"], "it neither writes nor says why not"
            finally:
                calls.plan = lambda *_: 0
                store.close()
    if fault is not None and fault.forever and "uring_enter" in calls.failed and locked(path):
        # What the ring had under way could not be heard of: for all that is known it goes on until the process ends,
        # so the disk is not let go of. A process that starts sees what is in the file now.
        settings = msgspec.structs.replace(settings, path=str(path.with_name("copy")))
        shutil.copyfile(path, settings.path)
    with looked_at(settings, known) as again:
        assert goes_on(again, known), "opened again it writes"
    # And once more: what opening mended is right.
    with looked_at(settings, known):
        pass
    return calls


def locked(path: Path) -> bool:
    """Whether a disk is kept by somebody, as its closing left it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def unbroken_threads() -> Iterator[None]:
    """Raises AssertionError when a thread ended with an error meanwhile."""
    died: list[str] = []

    def told(uncaught: threading.ExceptHookArgs) -> None:
        died.append("".join(traceback.format_exception(uncaught.exc_value)))

    plain = threading.excepthook
    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = plain
    assert not died, f"a thread died: {died[0]}"


@contextmanager
def looked_at(settings: StoreSettings, known: Known) -> Iterator[Store]:
    """The store, opened without faults and held to what is known."""
    known.begin()
    with telling_what_leaves(told_to(known)):
        store = open_store(settings, SystemClock(), SystemEntropy())
        try:
            known.recovered(store)
            yield store
        finally:
            store.close()


def goes_on(store: Store, known: Known) -> bool:
    """Whether new records become durable."""
    numbers = list(range(known.fresh, known.fresh + 3))
    known.hear(["offer", numbers])
    outcomes = store.write([piece(known.life, number).put() for number in numbers], 5.0)
    if any(outcome.reason is not Reason.STORED or outcome.tier is not Tier.NVME for outcome in outcomes):
        return False
    known.hear(["take", [[number, one.sequence] for number, one in zip(numbers, outcomes, strict=True)]])
    durable = store.flush(5.0)
    known.hear(["durable", durable])
    return durable >= outcomes[-1].sequence


def strained(number: int) -> int:
    """The life of a worker that strace watches: it has one log, by this number."""
    return random.Random(number).getrandbits(40)


def work(folder: Path, number: int) -> None:
    """Work on a store, and tell."""
    life = strained(number)
    told, known = Pipe(os.open(folder / f"{number}.told", os.O_WRONLY | os.O_CREAT, 0o600)), Known(life)
    with telling_what_leaves(told):
        try:
            settings = settings_of(folder / f"{number}.log", life, "threads")
            store = open_store(settings, SystemClock(), SystemEntropy())
        except StoreError as error:
            told(["failed", repr(error)])
            return
        told(["open"])
        worker = Worker(store, known, number, told)
        for _ in range(4):
            worker.run(10)
        stats = store.stats()
        told(["stats", stats.gauges, stats.counts])
        threading.Event().wait(random.choice((0.0, 0.01)))
        # As it is: nothing of closing is to help. While what leaves is still told: the log's threads go on until now.
        os._exit(0)


def work_apart(folder: Path, numbers: list[int]) -> int:
    """One after the other in processes that are warm already; 0 when none ended with an error of its own."""
    for number in numbers:
        pid = os.fork()
        if pid == 0:
            try:
                with uncounted_pages():
                    work(folder, number)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - whatever it is, the parent goes on as the parent
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            return 1
    return 0


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "work":
        return work_apart(folder, [int(number) for number in sys.argv[3:]])
    backend, number, least = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    print(json.dumps(faults(folder, backend, number, least=least)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
