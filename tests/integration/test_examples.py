"""The programs in examples/ do what they say, against a real server with the embedded model."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.server import Served, serve

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("examples")) as server:
        yield server


def run(served: Served, name: str, *questions: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), "--url", served.url, *questions]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_assistant_calls_both_tools_and_uses_what_they_return(served: Served) -> None:
    lines = run(served, "two_tools.py")
    assert [line for line in lines if line.startswith("  ")] == [
        '  get_weather({"city": "Lisbon"}) -> {"condition": "sunny", "temperature": 24}',
        '  get_price({"article": "table"}) -> {"price": 120}',
    ]
    first, second = (line for line in lines if line.startswith("assistant: "))
    assert "sunny" in first
    assert "24" in first
    assert "120" in second


def test_the_passage_is_answered_from_reused_and_its_gaps_are_said(served: Served) -> None:
    answers = [line.removeprefix("assistant: ") for line in run(served, "passage.py") if line.startswith("assistant")]
    said = [answer.partition("    (")[0] for answer in answers]
    cached = [int(answer.rpartition(", ")[2].partition(" cached")[0]) for answer in answers]
    assert said == [
        "Greta Larsen lives in Porto.",
        "Greta Larsen works as a teacher.",
        "Martin was born in 1968.",
        "Martin plays the violin.",
        "I cannot find that in the passage.",
    ]
    assert all(later >= 32 for later in cached[1:])
