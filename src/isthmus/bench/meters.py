"""What a measurement needs to know of the machine: CPU time and memory of process trees, and how busy others are."""

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_MOST_PROCESSES = 4096


def tree(pid: int) -> list[int]:
    """`pid` and its descendants that live."""
    found, at = [pid], 0
    while at < len(found) < _MOST_PROCESSES:
        for task in _listed(Path(f"/proc/{found[at]}/task")):
            children = _text(Path(f"/proc/{found[at]}/task/{task}/children")).split()
            found += [int(child) for child in children if int(child) not in found]
        at += 1
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes, threads and ended children that were waited for included."""
    return sum(sum(map(int, _fields(pid)[11:15])) for pid in pids) / _TICK


def stopped(pids: Iterable[int]) -> bool:
    """Whether none of them runs: each is stopped, or gone."""
    return all(fields[0] in "TtZX" for fields in map(_fields, pids) if fields)


def _fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on, its third field (man 5 proc); empty when the process is gone.

    The name before it is in parentheses and may hold spaces.
    """
    return _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def memory_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of processes: shared pages count once."""
    total = 0
    for pid in pids:
        lines = _text(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def disk_bytes_read(pid: int) -> int:
    """Bytes that a process has had read from disks, its threads included; 0 when it is gone."""
    lines = _text(Path(f"/proc/{pid}/io")).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _text(path: Path) -> str:
    """The content of a file of /proc; nothing when the process is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Reading:
    """At one moment: the wall clock, CPU seconds of the whole machine, and of the processes that belong here."""

    wall: float
    machine: float
    own: float


def read(own: Iterable[int]) -> Reading:
    """The meters now."""
    fields = [int(text) for text in _text(Path("/proc/stat")).splitlines()[0].split()[1:]]
    # user nice system idle iowait irq softirq steal: all but idle and iowait is work, stolen time work of others.
    busy = sum(fields[:3]) + sum(fields[5:8])
    return Reading(time.monotonic(), busy / _TICK, cpu_seconds(own))


def other_load(before: Reading, after: Reading) -> float:
    """How many cores others kept busy between two readings."""
    return max(0.0, (after.machine - before.machine) - (after.own - before.own)) / max(1e-9, after.wall - before.wall)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """One benchmark at a time; waits for a running one to end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
