"""The GPU's path on a CPU: plans of attention over block tables, and decode steps that are captured and replayed.

The kernel is the plain one, a captured step is the step itself: what is tried is everything around them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.paged import PLAIN, again, plain_kernel
from tests.support.tiny_models import MODELS, Request, generate, greedy, make_model, open_tiny
from tests.unit.inference_runner import test_windows as windows
from triton.compiler.errors import CompilationError

from isthmus.contracts.errors import EngineFailed
from isthmus.execution.inference.attention import paged_launch
from isthmus.execution.inference.attention.gathered import GatheredAttention
from isthmus.execution.inference.attention.paged import PagedAttention, PagedKernel, Tables
from isthmus.execution.inference.batch import Batch
from isthmus.execution.inference.gpu import FAILED, READY, Accelerator, graph_sizes
from isthmus.execution.inference.graphs import Output
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.runner import TorchRunner, open_runner
from isthmus.execution.inference.settings import EngineSettings, SchedulerSettings

CAPTURED = [name for name in MODELS if "moe" not in name and "next" not in name]
PIECES = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(PIECES, st.sampled_from((0, 1, 7, 64)))
def test_many_and_few_queries_in_one_step(pieces: Sequence[tuple[int, int]], window: int) -> None:
    spans = windows.spans_of(pieces)
    query = windows.queries(spans)
    step = PagedAttention(plain_kernel, GatheredAttention()).plan(spans, windows.MEMORY, windows.HEADS)
    for layer in range(2):
        expected = windows.reference(query, spans, layer, window)
        torch.testing.assert_close(step(layer, query, window), expected, atol=1e-5, rtol=1e-5)


def opened(folder: Path, accelerator: Accelerator = PLAIN, **options: object) -> TorchRunner:
    chosen = {"dtype": "f32", "kv_bytes": 1 << 22, "threads": 2, "scheduler": SchedulerSettings(max_running=6)}
    return open_runner(
        EngineSettings(model=str(folder), name="tiny", **{**chosen, **options}),
        lambda stage, fraction: None,
        accelerator,
    )


def outputs(runner: TorchRunner, count: int) -> list[list[int]]:
    """Sequences of many lengths, that end at different times, so that the sizes of steps vary."""
    per = 12
    requests = [
        Request(str(place), [(place * 31 + at * 7) % 131 for at in range(1 + 13 * place)],
                range(place * per, (place + 1) * per), greedy())
        for place in range(count)
    ]  # fmt: skip
    for last in (5, 18, 40):
        some = requests if last == 5 else requests[: 3 if last == 18 else 1]
        generate(runner, some, last, chunks=[64] * len(some))
    return [request.output for request in requests]


@pytest.mark.parametrize("name", CAPTURED)
def test_replayed_steps_change_no_token(tmp_path: Path, name: str) -> None:
    make_model(tmp_path, name)
    plain, replayed = open_tiny(tmp_path), opened(tmp_path)
    try:
        assert outputs(replayed, 6) == outputs(plain, 6)
        assert replayed.compiled_state() == (READY, "paged attention, decode graphs up to 6 sequences")
        assert replayed._gpu is not None
        assert replayed._gpu.graphs is not None
        assert replayed._gpu.graphs.replayed > 30
    finally:
        plain.close()
        replayed.close()


def test_what_fills_a_step_up_writes_to_no_other_sequence(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2")
    found = []
    for runner in (open_tiny(tmp_path), opened(tmp_path)):
        requests = [Request(str(place), [place] * 20, range(place * 4, place * 4 + 4), greedy()) for place in range(4)]
        generate(runner, requests, 5)
        # The blocks of the last one go to another; three sequences are in a step for four, where it was.
        taken = Request("other", [9] * 40, requests[3].blocks, greedy())
        generate(runner, [taken], 1)
        three = [*requests[:2], taken]
        generate(runner, three, 20)
        found.append([request.output for request in three])
        runner.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["qwen3-moe-window", "qwen3-next"])
def test_families_that_cannot_be_captured_say_so(tmp_path: Path, name: str) -> None:
    make_model(tmp_path, name)
    plain, paged = open_tiny(tmp_path), opened(tmp_path)
    try:
        assert outputs(paged, 4) == outputs(plain, 4)
        state, reason = paged.compiled_state()
        assert state == READY
        assert "no graphs" in reason
    finally:
        plain.close()
        paged.close()


def test_a_step_larger_than_all_graphs_goes_the_plain_way(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2")
    plain, small = open_tiny(tmp_path), opened(tmp_path, scheduler=SchedulerSettings(max_running=2))
    try:
        assert outputs(small, 6) == outputs(plain, 6)
    finally:
        plain.close()
        small.close()


def wrong_kernel(query: torch.Tensor, memory: KvMemory, tables: Tables, layer: int, window: int) -> torch.Tensor:
    return plain_kernel(query, memory, tables, layer, window) * 1.01


def no_window(query: torch.Tensor, memory: KvMemory, tables: Tables, layer: int, window: int) -> torch.Tensor:
    return plain_kernel(query, memory, tables, layer, 0)


def nothing() -> Accelerator:
    raise ImportError("no triton here")


def frozen(work: Callable[[], Output]) -> Callable[[], Output]:
    """A capture that does not look at its inputs again."""
    output = work()
    return lambda: output


def largest_frozen() -> Callable[[Callable[[], Output]], Callable[[], Output]]:
    """A capture that goes wrong once, for the size that is captured first."""
    made: list[object] = []

    def capture(work: Callable[[], Output]) -> Callable[[], Output]:
        made.append(work)
        return frozen(work) if len(made) == 1 else work

    return capture


def failing(work: Callable[[], Output]) -> Callable[[], Output]:
    raise RuntimeError("operation not permitted when stream is capturing")


def uncompiled() -> PagedKernel:
    """Triton's own launch, of a kernel that its compiler refuses."""
    kernel = paged_launch.TritonKernel(4)

    class Refused:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*_: object, **__: object) -> None:
                raise CompilationError("", None, "no such instruction")

            return launch

    def launched(*arguments: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paged_launch, "attend_part", Refused())
            return kernel(*arguments)

    return launched


@pytest.mark.parametrize(
    ("accelerator", "told"),
    [
        (Accelerator(lambda: wrong_kernel, again), "attention with window"),
        (Accelerator(lambda: no_window, again), "attention with window 12"),
        (Accelerator(nothing, again), "no triton here"),
        (Accelerator(lambda: plain_kernel, frozen), "a replayed step"),
        (Accelerator(lambda: plain_kernel, largest_frozen()), "a replayed step of 6"),
        (Accelerator(lambda: plain_kernel, failing), "not permitted"),
        (Accelerator(uncompiled, again), "Triton: CompilationError"),
    ],
    ids=["wrong", "no-window", "missing", "frozen", "largest-frozen", "failing", "uncompiled"],
)
def test_what_does_not_agree_with_the_plain_path_is_not_used(
    tmp_path: Path, accelerator: Accelerator, told: str
) -> None:
    make_model(tmp_path, "mistral")
    plain, refused = open_tiny(tmp_path), opened(tmp_path, accelerator)
    try:
        state, reason = refused.compiled_state()
        assert state == FAILED
        assert told in reason
        assert outputs(refused, 4) == outputs(plain, 4)
    finally:
        plain.close()
        refused.close()


def test_a_replayed_step_keeps_the_contract_of_slices(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2")
    runner = opened(tmp_path)
    try:
        for blocks, token in (([10**6], 5), ([-1], 5), ([], 5), ([0], 10**6)):
            request = Request("bad", [token], blocks, greedy())
            with pytest.raises(EngineFailed):
                runner.execute(Batch([request.slice()])).result()
    finally:
        runner.close()


def test_sizes_of_graphs() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert graph_sizes(256)[-3:] == [224, 240, 256]
