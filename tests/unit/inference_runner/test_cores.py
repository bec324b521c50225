"""How many threads a step takes: cores, quota, and a measurement where cores have several processors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.execution.inference.cores import choose_threads, faster, processors


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def machine(root: Path, siblings: dict[int, str], quota: str | None = None, group: str = "/") -> Path:
    for number, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"0::{group}\n")
    limits = root / "sys/fs/cgroup" / group[1:]
    limits.mkdir(parents=True)
    if quota is not None:
        (limits / "cpu.max").write_text(f"{quota}\n")
    return root


SMT = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
PLAIN = {0: "0", 1: "1", 2: "2", 3: "3"}


@pytest.mark.parametrize(
    ("siblings", "allowed", "quota", "expected"),
    [
        (PLAIN, {0, 1, 2, 3}, None, (4, 4)),
        (PLAIN, {1, 3}, "max 100000", (2, 2)),
        (SMT, {0, 1, 2, 3}, None, (4, 2)),
        (SMT, {0, 2}, None, (2, 1)),
        (PLAIN, {0, 1, 2, 3}, "150000 100000", (2, 2)),
        (PLAIN, {0, 1, 2, 3}, "20000 100000", (1, 1)),
        (SMT, {0, 1, 2, 3}, "300000 100000", (3, 2)),
        (PLAIN, {0, 1}, "nonsense", (2, 2)),
        ({}, {0, 1, 2}, None, (3, 3)),
    ],
)
def test_processors_and_cores(
    tmp_path: Path, siblings: dict[int, str], allowed: set[int], quota: str | None, expected: tuple[int, int]
) -> None:
    assert processors(allowed, machine(tmp_path, siblings, quota)) == expected


def test_the_quota_is_that_of_the_own_group(tmp_path: Path) -> None:
    assert processors({0, 1, 2, 3}, machine(tmp_path, PLAIN, "100000 100000", "/a/b")) == (1, 1)


def test_a_machine_that_tells_nothing_has_a_core_a_processor(tmp_path: Path) -> None:
    assert choose_threads(torch.float32, {0, 1, 2}, tmp_path) == 3


@pytest.mark.parametrize(("slower", "expected"), [(0.5, 2), (0.97, 4), (1.5, 4)])
def test_the_better_of_two_numbers_is_taken(slower: float, expected: int) -> None:
    """Time goes on by 1 s a piece of work with 4 threads, and by `slower` with 2."""
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 1.0 if torch.get_num_threads() == 4 else slower

    assert faster(4, 2, work, lambda: now) == expected


def test_with_several_processors_a_core_it_is_measured(tmp_path: Path) -> None:
    assert choose_threads(torch.float32, {0, 1, 2, 3}, machine(tmp_path, SMT)) in (2, 4)
