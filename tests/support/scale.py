"""How much a test tries: little in `make test`, the release figure in `make chaos`, which adds up what was tried."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/dev/shm")


def examples(quick: int, release: int) -> int:
    """`release` when the chaos run asks for it (TEST_SCALE=release), else `quick`."""
    return release if os.environ.get("TEST_SCALE") == "release" else quick


def seed(quick: int) -> int:
    """The seed of a chaos run's round (CHAOS_SEED), else `quick`."""
    return int(os.environ.get("CHAOS_SEED", quick))


def tally(counts: dict[str, int]) -> None:
    """Say how much was tried, by name: `make chaos` adds it up (CHAOS_REPORT)."""
    report = os.environ.get("CHAOS_REPORT")
    if report:
        with Path(report).open("a") as file:
            file.write(json.dumps(counts) + "\n")


@contextmanager
def in_memory(instead: Path) -> Iterator[Path]:
    """A folder in a filesystem of memory; one under `instead` where there is none."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else instead
    with tempfile.TemporaryDirectory(dir=place, prefix="isthmus-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def volatile(folder: Path) -> bool:
    """Whether a folder is of `in_memory` and really there."""
    return folder.is_relative_to(MEMORY)
