"""How much a test tries: little in `make test`, the release figure in `make chaos`, which adds up what was tried."""

import json
import os
from pathlib import Path


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
