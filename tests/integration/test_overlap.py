"""Overlapped scheduling on a real model: bitwise the same logits as step by step, in the order handed in."""

from pathlib import Path

import pytest
from tests.support.requests import make_request
from tests.support.tiny_models import greedy, make_model, open_tiny

from isthmus.contracts.clock import SystemClock
from isthmus.contracts.errors import EngineFailed
from isthmus.execution.inference.batch import SAMPLED, Batch, SampleTask, SequenceSlice, TokenHistory
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.runner import TorchRunner
from isthmus.execution.inference.settings import SchedulerSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(path, "llama-odd-heads")
    return path


def answers(folder: Path, *, overlap: bool) -> tuple[dict[str, list[int]], dict[str, bytes | None], int]:
    """Tokens and logits' digests of several requests at once, and how many steps were scheduled ahead."""
    runner = open_tiny(folder, exact=True)
    core = EngineCore(runner, SchedulerSettings(overlap=overlap), SystemClock())
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 0.7, "min_tokens": 9},
    ]
    tokens: dict[str, list[int]] = {}
    digests: dict[str, bytes | None] = {}
    for place, kind in enumerate(kinds):
        prompt = [5 + place, *range(10, 30 + 7 * place)]
        assert core.submit(make_request(f"r{place}", prompt, 10 + 3 * place, place, **kind)) is None
    while not core.idle:
        assert core.begin_step()
        for output in core.finish_step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish is not None:
                digests[output.request_id] = output.logits_digest
    core.check()
    assert core.stats().blocks_leased == 0
    runner.close()
    return tokens, digests, core.stats().steps_ahead


def test_logits_and_tokens_are_bitwise_those_of_scheduling_step_by_step(folder: Path) -> None:
    tokens, digests, ahead = answers(folder, overlap=True)
    assert ahead > 10
    assert (tokens, digests, 0) == answers(folder, overlap=False)


def step(runner: TorchRunner, token: int, start: int, serial: int) -> object:
    task = SampleTask(greedy(), start, TokenHistory([1], []))
    return runner.execute(Batch([SequenceSlice("a", [token], start, [0], task, serial=serial)])).result()


def test_a_token_that_no_step_sampled_fails_the_step(folder: Path) -> None:
    runner = open_tiny(folder)
    step(runner, 3, 0, 7)
    with pytest.raises(EngineFailed, match="sampled no token"):
        step(runner, SAMPLED, 1, 8)
    # The step that failed sampled nothing: what was handed in after it fails, too.
    with pytest.raises(EngineFailed, match="sampled no token"):
        step(runner, SAMPLED, 1, 7)
    step(runner, 3, 0, 7)
    step(runner, SAMPLED, 1, 7)
    runner.close()
