"""What every benchmark here shares: one lock, one place for results. Their header is that of `isthmus bench`: the
commit (and whether the tree was changed), the machine, the load average before and after, the seed and the settings, so
that a figure in the README can be traced to a run.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.bench import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


PACKAGES = ("torch",)
"""Whose versions every result names."""


def machine() -> dict[str, Any]:
    """The processor, its cores and the Python and torch that ran."""
    return report.machine(PACKAGES)


@contextmanager
def lock() -> Iterator[None]:
    """Nothing else is measured meanwhile; waits for a running benchmark to end."""
    path = RESULTS / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Run:
    """One benchmark run: collects, then writes `benchmarks/results/<name>.json`."""

    def __init__(self, name: str, seed: int, settings: dict[str, Any]) -> None:
        self._path = RESULTS / f"{name}.json"
        self._head = report.header(name, seed, settings, PACKAGES)
        self._start = time.monotonic()

    def write(self, results: Any) -> Path:
        """Write the result; may be called again with more of it."""
        head = {**self._head, "seconds": round(time.monotonic() - self._start, 1)}
        report.write(self._path, head, results)
        print(f"wrote {self._path.relative_to(ROOT)}")
        return self._path
