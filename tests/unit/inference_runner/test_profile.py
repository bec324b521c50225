"""The profile of steps: its parts are there, do not overlap, and add up to the steps."""

import pytest
import torch

from isthmus.contracts.errors import ConfigInvalid
from isthmus.execution.inference.models.step import Kernels
from isthmus.execution.inference.profile import (
    ATTENTION,
    INTERPRETER,
    LINEARS,
    NORMS,
    SAMPLING,
    SCHEDULE,
    StepProfile,
    profiled,
)
from isthmus.execution.inference.runner import default_kernels


class Watch:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


def test_what_no_other_part_counts_is_the_interpreters() -> None:
    watch = Watch()
    profile = StepProfile(watch)
    with profile.part(SCHEDULE):
        watch.move(1.0)
    with profile.step():
        watch.move(2.0)
        profile.timed(LINEARS, watch.move)(4.0)
        with profile.part(SAMPLING):
            watch.move(8.0)
        watch.move(16.0)
    expected = {SCHEDULE: 1.0, LINEARS: 4.0, SAMPLING: 8.0, INTERPRETER: 18.0, ATTENTION: 0.0, NORMS: 0.0}
    assert profile.seconds == expected


def test_a_part_that_raises_is_counted_all_the_same() -> None:
    watch = Watch()
    profile = StepProfile(watch)

    def fail() -> None:
        watch.move(2.0)
        raise ConfigInvalid("no")

    with pytest.raises(ConfigInvalid):
        profile.timed(NORMS, fail)()
    assert profile.seconds[NORMS] == 2.0


def test_profiled_kernels_compute_the_same() -> None:
    kernels = default_kernels(torch.device("cpu"), torch.float32)
    profile = StepProfile()
    timed: Kernels = profiled(kernels, profile)
    weight, rows = torch.randn(8, 4), torch.randn(3, 4)
    assert torch.equal(timed.linear.prepare(weight, None)(rows), kernels.linear.prepare(weight, None)(rows))
    assert torch.equal(timed.norm(rows, torch.ones(4), 1e-5), kernels.norm(rows, torch.ones(4), 1e-5))
    assert min(profile.seconds[LINEARS], profile.seconds[NORMS]) > 0
    assert profile.seconds[ATTENTION] == 0
