"""Hybrid models on the runner: parity past the grid, kept states, rollback, and slots that nobody else may touch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import Request, edit_config, generate, greedy, make_model, open_tiny
from transformers import PreTrainedModel

from isthmus.contracts.errors import ConfigInvalid, EngineFailed, ExactUnavailable, InvalidInput, ModelInvalid
from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference import exact
from isthmus.execution.inference.batch import (
    Batch,
    SampleTask,
    SequenceSlice,
    StateCapture,
    StateWork,
    TokenHistory,
)
from isthmus.execution.inference.models.gated_delta import DeltaKernels
from isthmus.execution.inference.runner import TorchRunner

MOE, DENSE = "qwen3-next", "qwen3-next-dense-odd-tied"
LENGTHS = (1, 63, 64, 65, 150, 30)
CHUNKS = (1 << 30, 16, 64, 33, 100, 7)
BLOCKS = 12
EPSILON = 1e-4
SLOTS = 20


@pytest.fixture(scope="module", params=[MOE, DENSE])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("hybrid")
    return make_model(folder, request.param), folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make_model(folder, DENSE)
    return folder


@pytest.fixture(scope="module")
def exact_runner(dense: Path) -> Iterator[TorchRunner]:
    runner = open_tiny(dense, exact=True)
    yield runner
    runner.close()


@pytest.fixture
def runner(dense: Path) -> Iterator[TorchRunner]:
    """The default mode, with few slots."""
    opened = open_tiny(dense, state_bytes=40 * 2 * (96 * 2 + 3 * 10 * 12) * 4)
    yield opened
    opened.close()


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 131, (length,), generator=generator).tolist() for length in lengths]


def requests(params: SamplingParams, *, turned: bool = False) -> list[Request]:
    made = []
    for index, prompt in enumerate(prompts()):
        place = len(LENGTHS) - 1 - index if turned else index
        made.append(Request(str(index), prompt, range(place * BLOCKS, (place + 1) * BLOCKS), params))
        made[-1].slot = place
    return made


def task(prompt: Sequence[int], output: Sequence[int] = ()) -> SampleTask:
    return SampleTask(greedy(logprobs=0), len(output), TokenHistory(prompt, list(output)), digest=True)


@torch.inference_mode()
def test_greedy_tokens_equal_transformers_past_the_grid_and_in_chunks(made: tuple[PreTrainedModel, Path]) -> None:
    model, folder = made
    runner = open_tiny(folder)
    together = requests(greedy())
    generate(runner, together, 24, chunks=CHUNKS)
    runner.close()
    for request in together:
        logits = model(torch.tensor([request.prompt + request.output])).logits[0]
        for token, row in zip(request.output, logits[len(request.prompt) - 1 :], strict=False):
            best = row.topk(2)
            if int(best.indices[0]) != token:
                assert float(best.values[0] - best.values[1]) <= EPSILON
                break


def test_exact_mode_is_bitwise_the_same_alone_batched_chunked_and_in_other_slots(
    made: tuple[PreTrainedModel, Path],
) -> None:
    runner = open_tiny(made[1], exact=True)
    params = SamplingParams(max_tokens=99, seed=9, temperature=0.8)
    alone = requests(params)
    for request in alone:
        generate(runner, [request], 6)
    together, chunked = requests(params, turned=True), requests(params)
    generate(runner, together, 6)
    generate(runner, chunked, 6, chunks=CHUNKS)
    runner.close()
    for one, two, three in zip(alone, together, chunked, strict=True):
        assert len(one.digests) == 6
        assert one.digests == two.digests == three.digests
        assert one.output == two.output == three.output


@pytest.mark.parametrize("middle", [1, 63, 64, 65, 128, 149])
def test_a_resumed_state_gives_the_uninterrupted_run_bitwise_in_exact_mode(
    exact_runner: TorchRunner, middle: int
) -> None:
    """The state goes through its record to another slot, and two requests start from it."""
    prompt = prompts()[4]
    whole = Request("a", prompt, range(BLOCKS), greedy())
    generate(exact_runner, [whole], 4)
    work = StateWork(None, [StateCapture(middle, 5), StateCapture(150, 6)])
    exact_runner.execute(Batch([SequenceSlice("b", prompt, 0, range(BLOCKS), state=work)])).result()
    exact_runner.write_state(7, exact_runner.read_state(5))
    shared = list(range(-(-middle // 16)))
    first = Request("c", prompt, range(BLOCKS), greedy())
    exact_runner.write_block(30, exact_runner.read_block(shared[-1]))
    second = Request("d", prompt, [*shared[:-1], 30, *range(31, 31 + BLOCKS - len(shared))], greedy())
    slices = []
    for request, slot in ((first, 8), (second, 9)):
        work = StateWork(7, [StateCapture(150, slot)])
        slices.append(SequenceSlice(request.name, prompt[middle:], middle, request.blocks, task(prompt), state=work))
        request.slot = slot
    results = exact_runner.execute(Batch(slices)).result().slices
    for request, part, result in zip((first, second), slices, results, strict=True):
        request.take(part, result)
    generate(exact_runner, [first, second], 4)
    assert first.digests == second.digests == whole.digests
    assert first.output == second.output == whole.output


def logprob(runner: TorchRunner, prompt: list[int], start: int, source: int | None) -> float:
    work = StateWork(source, [])
    part = SequenceSlice("r", prompt[start:], start, range(BLOCKS), task(prompt), state=work)
    entries = runner.execute(Batch([part])).result().slices[0].logprobs
    assert entries is not None
    return entries[0].logprob


def test_default_mode_resumes_from_any_kept_state_within_rounding(runner: TorchRunner) -> None:
    prompt = prompts()[4]
    ends = [1, 16, 64, 100, 128, 149]
    expected = logprob(runner, prompt, 0, None)
    work = StateWork(None, [StateCapture(end, slot) for slot, end in enumerate(ends)])
    runner.execute(Batch([SequenceSlice("r", prompt, 0, range(BLOCKS), state=work)])).result()
    for slot, end in enumerate(ends):
        assert abs(logprob(runner, prompt, end, slot) - expected) < EPSILON


def test_a_swapped_or_empty_state_is_felt(runner: TorchRunner) -> None:
    """Otherwise the comparisons above would show nothing."""
    prompt, other = prompts()[4], prompts((128,))[0][::-1]
    for slot, ids in ((0, prompt[:128]), (1, other)):
        work = StateWork(None, [StateCapture(128, slot)])
        runner.execute(Batch([SequenceSlice("r", ids, 0, range(BLOCKS, 2 * BLOCKS), state=work)])).result()
    expected = logprob(runner, prompt, 0, None)
    runner.write_state(2, bytes(len(runner.read_state(2))))
    for slot in (1, 2):
        assert abs(logprob(runner, prompt, 128, slot) - expected) > 100 * EPSILON


def test_drafts_are_rolled_back_to_the_state_after_the_last_right_one(exact_runner: TorchRunner) -> None:
    prompt = prompts()[1]
    plain = Request("a", prompt, range(BLOCKS), greedy())
    generate(exact_runner, [plain], 6)
    for right in range(4):
        request = Request("b", prompt, range(BLOCKS, 2 * BLOCKS), greedy())
        request.slot = 10
        generate(exact_runner, [request], 1)
        drafts = [*plain.output[1 : 1 + right], *[(token + 1) % 131 for token in plain.output[1 + right : 4]]]
        ids, start = [plain.output[0], *drafts], len(prompt)
        captures = [StateCapture(start + count, 10 + count % 4) for count in range(1, 5)]
        work = StateWork(10, captures)
        part = SequenceSlice("b", ids, start, request.blocks, task(prompt, request.output), 3, state=work)
        result = exact_runner.execute(Batch([part])).result().slices[0]
        assert result.accepted_drafts == right
        request.take(part, result)
        request.computed = start + 1 + right
        request.slot = captures[right].slot
        generate(exact_runner, [request], 6)
        assert request.output[:6] == plain.output
        assert request.digests[:6] == plain.digests


@pytest.mark.parametrize("exact_mode", [False, True])
def test_a_step_writes_its_captures_and_no_other_slot(
    exact_mode: bool, runner: TorchRunner, exact_runner: TorchRunner
) -> None:
    """Whatever else is in the slots, even NaN: padded rows, other sources, the empty state."""
    used = exact_runner if exact_mode else runner
    size = len(used.read_state(0)) // 4
    poison = np.full(size, np.nan, np.float32).tobytes()
    for slot in range(SLOTS):
        used.write_state(slot, poison)
    first = Request("a", prompts()[3], range(BLOCKS), greedy())
    second = Request("b", prompts()[5], range(20, 30), greedy())
    first.slot, second.slot = 3, 17
    generate(used, [first, second], 3)
    for slot in range(SLOTS):
        assert (used.read_state(slot) == poison) == (slot not in (3, 17))
        assert not np.isnan(np.frombuffer(used.read_state(slot), "<f4")).any() or slot not in (3, 17)
    alone = Request("c", prompts()[3], range(BLOCKS), greedy())
    alone.slot = 4
    generate(used, [alone], 3)
    assert alone.output == first.output


IDS, PLACE = list(range(20)), list(range(2))
GOOD = SequenceSlice("r", IDS, 0, PLACE, state=StateWork(None, [StateCapture(20, 0)]))
LATER = replace(GOOD, start=5, state=StateWork(1, [StateCapture(25, 1)]))


@pytest.mark.parametrize(
    "bad",
    [
        [replace(GOOD, state=None)],
        [replace(GOOD, state=StateWork(1, [StateCapture(20, 0)]))],
        [replace(LATER, state=StateWork(None, [StateCapture(25, 1)]))],
        [replace(LATER, state=StateWork(-1, []))],
        [replace(LATER, state=StateWork(40, []))],
        [replace(GOOD, state=StateWork(None, [StateCapture(20, 40)]))],
        [replace(GOOD, state=StateWork(None, [StateCapture(20, -1)]))],
        [replace(GOOD, state=StateWork(None, [StateCapture(21, 0)]))],
        [replace(GOOD, state=StateWork(None, [StateCapture(0, 0)]))],
        [replace(LATER, state=StateWork(1, [StateCapture(5, 0)]))],
        [replace(GOOD, state=StateWork(None, [StateCapture(9, 0), StateCapture(9, 1)]))],
        [replace(GOOD, state=StateWork(None, [StateCapture(9, 0), StateCapture(8, 1)]))],
        [replace(GOOD, state=StateWork(None, [StateCapture(9, 0), StateCapture(20, 0)]))],
        [replace(LATER, state=StateWork(1, [StateCapture(9, 1), StateCapture(25, 0)]))],
        [GOOD, replace(GOOD, blocks=[4, 5])],
        [LATER, replace(LATER, blocks=[4, 5], state=StateWork(1, [StateCapture(25, 2)]))],
    ],
)  # fmt: skip
def test_a_slice_that_breaks_the_contract_of_states_fails_and_writes_nothing(
    runner: TorchRunner, bad: list[SequenceSlice]
) -> None:
    assert runner.info.states is not None
    assert runner.info.states.slots == 40
    before = [runner.read_state(slot) for slot in range(40)]
    with pytest.raises(EngineFailed):
        runner.execute(Batch(bad)).result()
    assert [runner.read_state(slot) for slot in range(40)] == before
    assert len(runner.execute(Batch([GOOD])).result().slices) == 1


def test_info_says_what_is_kept(runner: TorchRunner) -> None:
    info = runner.info
    assert info.states is not None
    assert info.layers == 1
    assert info.block_bytes == 2 * 16 * 7 * 12 * 4
    assert info.states.state_bytes == len(runner.read_state(0)) == 2 * (96 * 2 + 3 * 10 * 12) * 4
    assert info.states.grid_tokens == 64
    with pytest.raises(InvalidInput):
        runner.read_state(info.states.slots)


def test_a_model_without_recurrent_layers_takes_no_state(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen3")
    runner = open_tiny(tmp_path)
    assert runner.info.states is None
    with pytest.raises(EngineFailed):
        runner.execute(Batch([GOOD])).result()
    with pytest.raises(InvalidInput, match="no recurrent state"):
        runner.read_state(0)
    with pytest.raises(InvalidInput, match="no recurrent state"):
        runner.write_state(0, b"")
    runner.close()


def test_states_stay_float32_in_bfloat16(dense: Path) -> None:
    narrow, wide = open_tiny(dense, dtype="bf16"), open_tiny(dense)
    prompt = prompts()[4]
    values = [logprob(opened, prompt, 0, None) for opened in (narrow, wide)]
    work = StateWork(None, [StateCapture(150, 0)])
    narrow.execute(Batch([SequenceSlice("r", prompt, 0, range(BLOCKS), state=work)])).result()
    record = np.frombuffer(narrow.read_state(0), "<u4")
    assert narrow.info.states == wide.info.states
    narrow.close()
    wide.close()
    assert abs(values[0] - values[1]) < 0.5
    assert (record & 0xFFFF).any(), "a state rounded to bfloat16 has no low bits"


def test_tensors_of_the_multi_token_head_are_ignored_and_no_others(dense: Path, tmp_path: Path) -> None:
    for file in dense.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "mtp.fc.weight": torch.zeros(2, 2), "mtp.layers.0.norm.weight": torch.zeros(2)}, path)
    open_tiny(tmp_path).close()
    save_file({**tensors, "mtpx.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ModelInvalid, match="mtpx"):
        open_tiny(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layer_types": ["linear_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention", "full_attention", "mamba"]}, "layer_types"),
        ({"linear_num_value_heads": 4}, "linear_num_value_heads"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim"),
        ({"sliding_window": 12}, "sliding_window"),
        ({"linear_value_head_dim": 14}, "shape"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    dense: Path, tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    for file in dense.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelInvalid, match=match):
        open_tiny(tmp_path)


def test_memory_that_holds_no_state_is_refused(dense: Path) -> None:
    with pytest.raises(ConfigInvalid, match="state_bytes"):
        open_tiny(dense, state_bytes=4000)
    with pytest.raises(ExactUnavailable, match="self-test"):
        open_tiny(dense, state_bytes=5000, exact=True)


@pytest.mark.parametrize("fault", ["batch", "record"])
def test_the_self_test_notices_states_that_depend_on_the_step(
    dense: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real = exact.exact_delta()

    def advance(state: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        found = real.advance(state, *inputs)
        if state.shape[0] > 1:
            state.mul_(1.0 + 2.0**-22)
        return found

    if fault == "batch":
        broken = DeltaKernels(real.cells, real.transposed, advance, real.pointwise, real.unit)
        monkeypatch.setattr(exact, "exact_delta", lambda: broken)
    else:
        read = TorchRunner.read_state
        monkeypatch.setattr(TorchRunner, "read_state", lambda self, slot: read(self, slot)[:-4] + b"\0\0\0?")
    with pytest.raises(ExactUnavailable, match="bitwise"):
        open_tiny(dense, exact=True)
