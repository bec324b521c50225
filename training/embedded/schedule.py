"""The learning rate: warm up, hold, and fall to nothing by a given step or a given time."""

from __future__ import annotations

import datetime as dt
import tomllib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """So many steps at one length of context, and what they are trained on.

    ``tokens`` is the size of a batch and ``focus`` the part of its positions whose loss is
    computed; 0 leaves them to the run.
    """

    length: int
    steps: int
    sizes: tuple[str, ...]
    shares: dict[str, float] = field(hash=False)
    tokens: int = 0
    focus: float = 0.0


def read_stages(path: Path) -> list[Stage]:
    """The stages of a recipe file, in order."""
    found = tomllib.loads(path.read_text())["stage"]
    return [Stage(**{**one, "sizes": tuple(one["sizes"])}) for one in found]


def stage_at(stages: list[Stage], step: int) -> Stage:
    """The stage that a step belongs to."""
    for stage in stages:
        if stage.steps == 0 or step < stage.steps:
            return stage
        step -= stage.steps
    return stages[-1]


def seconds_until(clock: str, now: dt.datetime) -> float:
    """Seconds from now to the nearest ``HH:MM`` (UTC); negative if that is past."""
    hours, minutes = (int(part) for part in clock.split(":"))
    then = now.replace(hour=hours, minute=minutes, second=0, microsecond=0)
    return ((then - now).total_seconds() + 43200) % 86400 - 43200


def hold_and_fall(done: float, left: float, fall: float) -> float:
    """The factor for the rate: 1, then straight down to 0 over the last ``fall`` of what there is.

    ``done`` is the number of steps so far (the first 50 warm up); ``left`` and
    ``fall`` are in the same unit, be it steps or seconds.
    """
    return min(1.0, (done + 1) / 50) * max(0.0, min(1.0, left / fall))
