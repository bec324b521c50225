"""Promise 1: in exact mode a request's logits are bitwise its own alone, whatever runs beside it.

A short version of `python -m benchmarks.exactness`, which runs 200 mixes a model.
"""

import random
from pathlib import Path

import pytest
from benchmarks.exactness import NAMES, compare_default, compare_exact, make_folder, open_for
from benchmarks.mixes import library

MIXES = {"embedded": 3, "llama-llama3": 3, "qwen3-odd-tied-bias": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("models")
    return {name: make_folder(name, scratch) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_bitwise_those_of_each_request_alone(folders: dict[str, Path], name: str) -> None:
    rng = random.Random(name)
    runner = open_for(folders[name], "f32", exact=True)
    mixes = MIXES.get(name, 1)
    counts = compare_exact(runner, library(rng, runner.info.vocab_size, 16, 100), mixes, rng, crowded=True)
    runner.close()
    assert counts["different"] == 0
    assert counts["requests"] == mixes * 32
    assert counts["preemptions"] > 0, "the mixes are meant to preempt"
    assert counts["aborted"] > 0 or mixes == 1, "three mixes are meant to abort something"


def test_default_mode_differs_only_where_the_two_best_are_close(folders: dict[str, Path]) -> None:
    rng = random.Random(5)
    runner = open_for(folders["llama-llama3"], "f32", exact=False)
    counts = compare_default(runner, library(rng, runner.info.vocab_size, 60, 160), 3, rng)
    runner.close()
    assert counts["divergences_over_epsilon"] == 0


def test_the_comparison_can_fail(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tiles the default kernels do not keep the promise, and the comparison says so."""
    from isthmus.execution.inference import runner as module

    monkeypatch.setattr(module, "prove_exact", lambda runner, decoder: None)
    monkeypatch.setattr(
        module, "exact_kernels", lambda: module.default_kernels(module.torch.device("cpu"), module.torch.float32)
    )
    rng = random.Random(7)
    broken = open_for(folders["llama-llama3"], "f32", exact=True)
    counts = compare_exact(broken, library(rng, broken.info.vocab_size, 60, 160), 1, rng)
    broken.close()
    assert counts["different"] > 0
