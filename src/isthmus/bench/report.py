"""What every result names: version and commit, machine, load average before and after, seed, settings. Also of those in
benchmarks/, so that figures of both can be traced, and compared, in the same way.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import isthmus


def header(name: str, seed: int, settings: dict[str, Any], packages: Sequence[str] = ()) -> dict[str, Any]:
    """The head of a result that begins now; `packages`: whose versions belong to it, by name."""
    return {
        "benchmark": name,
        "version": isthmus.__version__,
        "commit": commit(),
        "tree_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(packages),
        "load_average_before": os.getloadavg(),
        "seed": seed,
        "settings": settings,
    }


def commit() -> str:
    """The commit that is checked out; empty when this code is installed without its history."""
    return _git("rev-parse", "HEAD")


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """The processor, the cores that this process may use, and the Python (and `packages`) that ran."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system() + " " + platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write(path: Path, head: dict[str, Any], results: Any) -> None:
    """Write head and results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {**head, "load_average_after": os.getloadavg(), "results": results}
    path.write_text(json.dumps(body, indent=1) + "\n")


def _git(*arguments: str) -> str:
    """What git says of the folder of this code; nothing when it is installed without its history."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
