"""A whole store on a disk that fails: every call in turn, a filesystem without room, errors injected by strace.

At release scale a third of the stores is on the disk, the others are in memory: what fails does so before the kernel
sees it, or after it did as it was asked.
"""

import errno
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support import power
from tests.support.faults import faults, looked_at, strained
from tests.support.lives import Heard, Known, settings_of, uncounted_pages
from tests.support.scale import in_memory, seed, tally
from tests.support.together import outputs_of

ROOT = Path(__file__).resolve().parents[2]
MODULE = (sys.executable, "-m", "tests.support.faults")


def faults_apart(folders: Sequence[Path], backend: str, number: int, least: int) -> int:
    """`faults` in a process for each folder, at the same time; how many calls were failed."""
    given = [[str(folder), backend, str(number + at), str(least // len(folders))] for at, folder in enumerate(folders)]
    return sum(sum(json.loads(said).values()) for said in outputs_of([[*MODULE, "fail", *one] for one in given]))


@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_any_call_may_fail(tmp_path: Path, backend: str) -> None:
    failed = faults(tmp_path, backend, 11, least=1, of_life=14)
    assert len(failed) > 3, f"calls of many kinds, not only {dict(failed)}"


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_every_call_may_fail(tmp_path: Path, backend: str) -> None:
    with in_memory(tmp_path) as first, in_memory(tmp_path) as second:
        tally({"failed_calls": faults_apart([tmp_path, first, second], backend, seed(11), 1500)})


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
OF_A_TRACE = 8
"""Workers, each a process with a log of its own, that one strace starts and fails."""
STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="NOT RUN: there is no strace")


def judged(folder: Path, numbers: Sequence[int], inject: str) -> list[str]:
    """Work on stores, one after the other, while strace fails calls on their files; afterwards each is opened and held
    to what was told. The calls that were failed.
    """
    trace = folder / "trace"
    # Only what is traced stops a process: without the filter in the kernel every call would.
    command = ["strace", "-f", "--seccomp-bpf", "-q", "-o", str(trace), "-e", f"trace=fdatasync,{WRITES},{READS}"]
    command += [word for number in numbers for word in ("-P", str(folder / f"{number}.log"))]
    command += ["-e", f"inject={inject}", *MODULE, "work", str(folder), *(str(number) for number in numbers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120 + 10 * len(numbers), check=False)
    assert done.returncode == 0, done.stderr.decode()
    for number in numbers:
        log, told = folder / f"{number}.log", folder / f"{number}.told"
        known = Known(strained(number))
        for message in Heard()(told.read_bytes()):
            known.hear(message)
        assert not known.counts["failed"] or not known.status, known
        with uncounted_pages(), looked_at(settings_of(log, known.life), known):
            pass
        for one in (log, told):
            one.unlink(missing_ok=True)
    return [line for line in trace.read_text().splitlines() if "INJECTED" in line]


@STRACE
@pytest.mark.parametrize("inject", ["fdatasync:error=EIO:when=6", f"{WRITES}:error=ENOSPC:when=5+3"])
def test_errors_of_the_kernel_cost_no_durable_record(tmp_path: Path, inject: str) -> None:
    assert judged(tmp_path, [3], inject)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@STRACE
def test_errors_of_the_kernel_many_times(tmp_path: Path) -> None:
    chance = random.Random(seed(3))
    injected = 0
    for nth in range(20):
        call, first = chance.choice(("fdatasync", WRITES, READS)), int(25 ** chance.random())
        often = chance.choice(("", "+", "+2", "+5"))
        inject = f"{call}:error={chance.choice(('EIO', 'ENOSPC', 'EROFS'))}:when={first}{often}"
        numbers = [chance.getrandbits(30) for _ in range(OF_A_TRACE)]
        with in_memory(tmp_path) as memory:
            try:
                injected += len(judged(memory if nth % 3 else tmp_path, numbers, inject))
            except AssertionError as wrong:
                raise AssertionError(f"{inject}, seeds {numbers}: {re.sub(chr(10), ' ', str(wrong))}") from wrong
    assert injected
    tally({"strace_runs": 20 * OF_A_TRACE, "strace_errors": injected})
