"""The order of runs, what a run tells, and the comparison, with targets that compute nothing."""

from collections.abc import Sequence

import pytest

from isthmus.bench import engines
from isthmus.bench.client import BadAnswer, Trace
from isthmus.bench.limits import Machine
from isthmus.bench.workloads import Ask


class Fake:
    """Answers every token after `token_s`; profiles itself from its first answer on."""

    def __init__(self, name: str, token_s: float, calls: list[str], *, fails: bool = False) -> None:
        self.name, self._token_s, self._calls, self._fails = name, token_s, calls, fails
        self._computed = 0.0

    def start(self) -> float:
        self._calls.append(f"start {self.name}")
        return 0.5

    def run(self, asks: Sequence[Ask]) -> list[Trace]:
        if self._fails:
            raise BadAnswer("no")
        self._calls.append(f"run {self.name}")
        self._computed += 1.0
        return [Trace(0.0, [(self._token_s * (at + 1), 1) for at in range(ask.output)]) for ask in asks]

    def processes(self) -> list[int]:
        return []

    def profile(self) -> dict[str, float]:
        return {"linears": self._computed} if self._computed else {}

    def pause(self) -> None:
        self._calls.append(f"pause {self.name}")

    def resume(self) -> None:
        self._calls.append(f"resume {self.name}")

    def stop(self) -> None:
        self._calls.append(f"stop {self.name}")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_SETTLE_S", 0.0)
    monkeypatch.setattr(engines, "other_load", lambda before, after: 0.0)


def test_engines_take_turns_and_others_rest_meanwhile() -> None:
    calls: list[str] = []
    targets = [Fake("a", 0.01, calls), Fake("b", 0.02, calls)]
    plan = engines.Plan(("B",), 2, 1, 1.0)
    found = engines.measure(targets, plan, lambda _: None)
    assert calls[:6] == ["start a", "run a", "pause a", "start b", "run b", "pause b"]
    measured = [call for call in calls[6:] if not call.startswith("stop")]
    turns = ["a", "b", "b", "a"]
    assert measured == [f"{what} {name}" for name in turns for what in ("resume", "run", "pause")]
    assert calls[-2:] == ["stop a", "stop b"]
    assert [run["profile_s"] for run in found["a"].runs["B"]] == [{"linears": 1.0}, {"linears": 1.0}]
    table = engines.compare(found, "a", plan, Machine(20e9, 2e12, "bf16"))
    assert table["B"]["ratio_to"]["b"]["tokens_per_s"] == pytest.approx(2.0, rel=0.01)
    assert 0 < table["B"]["of_roofline"]["b"] < table["B"]["of_roofline"]["a"]


def test_a_noisy_run_is_thrown_away_and_the_last_one_kept_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "other_load", lambda before, after: 0.9)
    found = engines.measure([Fake("a", 0.01, [])], engines.Plan(("B",), 1, 1, 1.0), lambda _: None)
    assert found["a"].discarded == engines.MOST_TRIES - 1
    assert [run["noisy"] for run in found["a"].runs["B"]] == [True]


def test_every_target_is_ended_when_one_fails() -> None:
    calls: list[str] = []
    with pytest.raises(BadAnswer):
        engines.measure(
            [Fake("a", 0.01, calls), Fake("b", 0.01, calls, fails=True)],
            engines.Plan(("B",), 1, 1, 1.0),
            lambda _: None,
        )
    assert calls[-2:] == ["stop a", "stop b"]
