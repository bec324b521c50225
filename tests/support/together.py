"""Several processes of a test at the same time."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 1400


def outputs_of(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run all; what each printed. Fails with what they complained of when one ends with another status than 0."""
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        ended = [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(error for _, error in ended)
    return [said for said, _ in ended]
