"""A store that dies at any moment: kill -9 at random and at chosen calls, and power that is cut under it.

What is told, and what must hold, is in `tests.support.lives`; how it dies in `tests.support.deaths`.

Where: `make test` kills on the disk. At release scale a third of the lives is on the disk and two thirds in memory (a
log on tmpfs; for power cuts the image under the ext4), at the same time. Kill -9 leaves the page cache and what was
handed to the kernel as it is, so that the disk adds times and other orders only; and what a power cut loses is what
ext4 had not been asked to sync, whatever its image lies on. Counts named `on_disk` say how many were.
"""

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import power
from tests.support.deaths import tell_of_dying_threads
from tests.support.lives import Heard, Known, Pipe, State, forgets_of, piece
from tests.support.scale import in_memory, seed, tally, volatile
from tests.support.together import outputs_of

from isthmus.contracts.blocks import NO_SESSION, Erasure, StoreStats

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_POWER = pytest.mark.skipif(bool(power.missing()), reason=f"NOT RUN: {power.missing()}")


def die(folders: Sequence[Path], deaths: int, number: int, *, power: bool = False) -> Counter[str]:
    """Have stores die so often, in a process for each folder, at the same time; what happened in all of them."""
    command = [sys.executable, "-m", "tests.support.deaths"]
    given = [
        {"folder": str(folder), "seed": number + at, "deaths": deaths // len(folders), "power": power}
        for at, folder in enumerate(folders)
    ]
    ended = outputs_of([[*command, json.dumps(one)] for one in given])
    counts: Counter[str] = Counter()
    for folder, said in zip(folders, ended, strict=True):
        of_one = json.loads(said)
        counts.update(of_one)
        counts["on_disk"] += of_one["deaths"] * (not volatile(folder))
    kind = "power_cuts" if power else "kills"
    tally(
        {
            kind: counts["deaths"],
            f"{kind}_on_disk": counts["on_disk"],
            "durable_acknowledgements": counts["acknowledged"],
            f"{kind}_at_a_chosen_call": counts["cut_at_a_call" if power else "killed_at_a_call"],
            "records_read_back": counts["read_hit"],
        }
    )
    return counts


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Path]]:
    """A folder on the disk, and two in memory where there is such a filesystem."""
    with ExitStack() as made:
        yield [tmp_path, *(made.enter_context(in_memory(tmp_path)) for _ in range(2))]


@pytest.mark.parametrize("in_force", [True, False])
def test_what_is_offered_again_while_a_forget_is_in_doubt_may_be_gone(in_force: bool) -> None:
    known, numbers = Known(7), list(range(12))
    namespace = piece(7, 0).owner.namespace_id
    known.hear(["offer", numbers])
    known.hear(["take", [[number, number + 1] for number in numbers]])
    known.hear(["durable", 12])
    known.hear(["forgetting", namespace, NO_SESSION])
    known.hear(["cut"])
    known.hear(["forgotten", namespace, NO_SESSION, 1])
    known.hear(["offer", [0]])
    known._resolve(forgets_of(StoreStats(erasures=(Erasure(1, namespace, b""),) if in_force else ())))
    for number in numbers:
        forgotten = in_force and piece(7, number).owner.namespace_id == namespace
        left = State.MAY if number == 0 else State.NEVER
        assert known.status[number].state is (left if forgotten else State.MUST)


def test_of_a_forget_that_was_refused_some_may_be_gone() -> None:
    known = Known(7)
    namespace = piece(7, 0).owner.namespace_id
    known.hear(["offer", [0]])
    known.hear(["take", [[0, 1]]])
    known.hear(["durable", 1])
    known.hear(["forgetting", namespace, NO_SESSION])
    known.hear(["refused"])
    known._resolve({})
    assert known.status[0].state is State.MAY


def test_what_somebody_else_saw_is_judged() -> None:
    known = Known(7)
    known.hear(["offer", [0, 1]])
    known.hear(["take", [[0, 1], [1, 2]]])
    known.hear(["durable", 1])
    known.begin()
    known.hear(["held", [], [[0, "hit"], [1, "absent"]]])
    assert not known.wrong
    known.hear(["cut"])
    known.hear(["held", [], [[0, "io_error"], [1, "io_error"]]])
    assert not known.wrong, "what is seen without power says nothing"
    known.begin()
    known.hear(["held", [], [[0, "absent"], [1, "absent"]]])
    assert known.wrong == ["durable records that are gone: 0 (absent)"]


def test_kill_9_loses_nothing_durable_and_brings_back_nothing_forgotten(tmp_path: Path) -> None:
    counts = die([tmp_path], 30, 3)
    assert counts["killed_at_a_call"] > 2
    assert counts["acknowledged"] > 200
    assert counts["read_hit"] > 400


@WITHOUT_POWER
def test_a_power_cut_loses_nothing_durable_and_brings_back_nothing_forgotten(tmp_path: Path) -> None:
    counts = die([tmp_path], 10, 3, power=True)
    assert counts["acknowledged"] > 20


def test_a_thread_that_dies_is_told(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    thread = threading.Thread(target=lambda: 1 // 0, daemon=True)
    plain = threading.excepthook
    try:
        tell_of_dying_threads(Pipe(writing))
        thread.start()
        thread.join()
    finally:
        threading.excepthook = plain
    (told,) = Heard()(os.read(reading, 1 << 16))
    assert told[0] == "wrong"
    assert "ZeroDivisionError" in told[1]
    os.close(reading)
    os.close(writing)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_kill_9_many_times(places: list[Path]) -> None:
    die(places, 3000, seed(3))


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@WITHOUT_POWER
def test_power_cuts_many_times(places: list[Path]) -> None:
    die(places, 900, seed(3), power=True)
