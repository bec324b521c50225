"""A whole store on a disk that fails: every call in turn, a filesystem without room, errors injected by strace."""

import errno
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.support import power
from tests.support.faults import Fault, attempt, looked_at
from tests.support.lives import Heard, Known, settings_of
from tests.support.scale import seed, tally

from isthmus.contracts.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]
ERRORS = (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.EINTR, errno.EAGAIN)


def faults(folder: Path, backend: str, count: int, number: int) -> Counter[str]:
    """Fail calls of one worker's life, from the first to the last; how often which was failed."""
    chance = random.Random(number)
    life = chance.getrandbits(40)
    total = len(attempt(folder / "log", life, backend, None).made)
    failed: Counter[str] = Counter()
    step = max(1, total // count)
    for nth in range(chance.randrange(step), total, step):
        often = chance.choice(("once", "once", "forever", "late"))
        error = errno.EIO if chance.random() < 0.5 else chance.choice(ERRORS)
        fault = Fault(nth, error, forever=often == "forever", late=often == "late")
        try:
            calls = attempt(folder / "log", life, backend, fault)
        except (AssertionError, StoreError) as wrong:
            raise AssertionError(f"{backend}, life {life}, {fault}: {wrong}") from wrong
        failed.update(calls.failed[:1])
    return failed


@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_any_call_may_fail(tmp_path: Path, backend: str) -> None:
    failed = faults(tmp_path, backend, 14, 11)
    assert len(failed) > 3, f"calls of many kinds, not only {dict(failed)}"


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_every_call_may_fail(tmp_path: Path, backend: str) -> None:
    failed = faults(tmp_path, backend, 1 << 30, seed(11))
    tally({"failed_calls": sum(failed.values())})


# A filesystem without room

FULL = """
import sys
from pathlib import Path
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.errors import StoreFull
from isthmus.state.kv.store import open_store
from tests.support.faults import goes_on, looked_at
from tests.support.lives import Known, Worker, settings_of
from tests.support.power import Powered
import msgspec
ground = Powered(Path(sys.argv[1]), 6 << 20)
try:
    small = settings_of(ground.path, 1)
    large = msgspec.structs.replace(small, log=msgspec.structs.replace(small.log, capacity=small.log.capacity << 4))
    for _ in range(3):
        try:
            open_store(large, SystemClock(), SystemEntropy())
        except StoreFull as error:
            assert "no room" in str(error), error
        else:
            raise AssertionError("there is no room for that")
        assert not ground.path.exists()
    store = open_store(small, SystemClock(), SystemEntropy())
    with (ground.path.parent / "others").open("wb") as others:
        try:
            while True:
                others.write(bytes(4096))
        except OSError as error:
            print(error.errno)
    known = Known(1)
    Worker(store, known, 3, lambda message: None).run(150)
    assert goes_on(store, known), "its room is its own"
    stats = store.stats()
    assert not stats.gauges["read_only"], stats
    assert not stats.gauges.get("log_write_errors", 0), stats
    store.close()
    with looked_at(small, Known(1)):
        pass
finally:
    ground.close()
"""


@pytest.mark.skipif(bool(power.missing()), reason=f"NOT RUN: {power.missing()}")
def test_without_room_no_file_is_left_and_with_room_it_stays_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) == errno.ENOSPC


# strace

WRITES, READS = "pwritev,pwritev2", "preadv,preadv2"
"""By which of its two forms a Python transfers is a matter of how it was built. Each thread's calls are counted."""
STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="NOT RUN: there is no strace")


def strained(folder: Path, number: int, inject: str) -> tuple[Known, list[str]]:
    """Work on a store while strace fails calls on its file; what was told, and the calls that were seen."""
    path, trace = folder / "log", folder / "trace"
    for one in (path, trace):
        one.unlink(missing_ok=True)
    life = random.Random(number).getrandbits(40)
    command = ["strace", "-f", "-q", "-o", str(trace), "-P", str(path), "-e", f"trace=fdatasync,{WRITES},{READS}"]
    command += ["-e", f"inject={inject}", sys.executable]
    command += ["-m", "tests.support.faults", str(path), str(life), str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    known = Known(life)
    for message in Heard()(done.stdout):
        known.hear(message)
    return known, trace.read_text().splitlines()


def judged(folder: Path, number: int, inject: str) -> list[str]:
    """As `strained`; afterwards the store is opened and held to what was told. The calls that were failed."""
    known, seen = strained(folder, number, inject)
    assert not known.counts["failed"] or not known.status, known
    with looked_at(settings_of(folder / "log", known.life), known):
        pass
    return [line for line in seen if "INJECTED" in line]


@STRACE
@pytest.mark.parametrize("inject", ["fdatasync:error=EIO:when=6", f"{WRITES}:error=ENOSPC:when=5+3"])
def test_errors_of_the_kernel_cost_no_durable_record(tmp_path: Path, inject: str) -> None:
    assert judged(tmp_path, 3, inject)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@STRACE
def test_errors_of_the_kernel_many_times(tmp_path: Path) -> None:
    chance = random.Random(seed(3))
    injected = 0
    for _ in range(40):
        call, first = chance.choice(("fdatasync", WRITES, READS)), int(25 ** chance.random())
        often = chance.choice(("", "+", "+2", "+5"))
        inject = f"{call}:error={chance.choice(('EIO', 'ENOSPC', 'EROFS'))}:when={first}{often}"
        number = chance.getrandbits(30)
        try:
            injected += len(judged(tmp_path, number, inject))
        except AssertionError as wrong:
            raise AssertionError(f"{inject}, seed {number}: {re.sub(chr(10), ' ', str(wrong))}") from wrong
    assert injected
    tally({"strace_runs": 40, "strace_errors": injected})
