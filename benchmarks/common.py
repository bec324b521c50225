"""What every benchmark shares: one lock, one JSON form, an honest header.

A result names the commit (and whether the tree was changed), the machine, the load average before and after, the seed
and the settings, so that a figure in the README can be traced to a run.
"""

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def commit() -> str:
    """The commit that is checked out."""
    return _git("rev-parse", "HEAD")


def machine() -> dict[str, Any]:
    """The processor, its cores and the Python and torch that ran."""
    from importlib.metadata import version

    cpu = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else ""
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.system() + " " + platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


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
        self._body: dict[str, Any] = {
            "benchmark": name,
            "commit": commit(),
            "tree_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "load_average_before": os.getloadavg(),
            "seed": seed,
            "settings": settings,
        }
        self._start = time.monotonic()

    def write(self, results: Any) -> Path:
        """Write the result; may be called again with more of it."""
        self._body["load_average_after"] = os.getloadavg()
        self._body["seconds"] = round(time.monotonic() - self._start, 1)
        self._body["results"] = results
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._body, indent=1) + "\n")
        print(f"wrote {self._path.relative_to(ROOT)}")
        return self._path
