"""A store that dies at any moment: kill -9 at random and at chosen calls, and power that is cut under it.

What is told, and what must hold, is in `tests.support.lives`; how it dies in `tests.support.deaths`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import power
from tests.support.lives import Known, State, piece
from tests.support.scale import seed, tally

from isthmus.contracts.blocks import NO_SESSION, Erasure, StoreStats

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_POWER = pytest.mark.skipif(bool(power.missing()), reason=f"NOT RUN: {power.missing()}")


def die(folder: Path, deaths: int, number: int, *, power: bool = False) -> dict[str, int]:
    """Have stores die so often; what happened."""
    given = {"folder": str(folder), "seed": number, "deaths": deaths, "power": power}
    command = [sys.executable, "-m", "tests.support.deaths", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    kind = "power_cuts" if power else "kills"
    tally(
        {
            kind: counts["deaths"],
            "durable_acknowledgements": counts["acknowledged"],
            f"{kind}_at_a_chosen_call": counts.get("cut_at_a_call" if power else "killed_at_a_call", 0),
            "records_read_back": counts.get("read_hit", 0),
        }
    )
    return counts


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
    known._resolve(StoreStats(erasures=(Erasure(1, namespace, b""),) if in_force else ()))
    for number in numbers:
        forgotten = in_force and piece(7, number).owner.namespace_id == namespace
        left = State.MAY if number == 0 else State.NEVER
        assert known.status[number].state is (left if forgotten else State.MUST)


def test_kill_9_loses_nothing_durable_and_brings_back_nothing_forgotten(tmp_path: Path) -> None:
    counts = die(tmp_path, 30, 3)
    assert counts["killed_at_a_call"] > 2
    assert counts["acknowledged"] > 200
    assert counts["read_hit"] > 400


@WITHOUT_POWER
def test_a_power_cut_loses_nothing_durable_and_brings_back_nothing_forgotten(tmp_path: Path) -> None:
    counts = die(tmp_path, 10, 3, power=True)
    assert counts["acknowledged"] > 20


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_kill_9_many_times(tmp_path: Path) -> None:
    die(tmp_path, 1500, seed(3))


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@WITHOUT_POWER
def test_power_cuts_many_times(tmp_path: Path) -> None:
    die(tmp_path, 300, seed(3), power=True)
