"""The runner's contract: chunks, batches, drafts, blocks, hidden states; exact mode bitwise, the default closely."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.tiny_models import Request, edit_config, generate, greedy, make_model, open_tiny

from isthmus.contracts.errors import ConfigInvalid, EngineFailed, ExactUnavailable, InvalidInput
from isthmus.contracts.layout import Dtype
from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference import exact
from isthmus.execution.inference import runner as runner_module
from isthmus.execution.inference.batch import Batch, SampleTask, SequenceSlice, TokenHistory
from isthmus.execution.inference.compiled.spec import Machine
from isthmus.execution.inference.exact_proof import exact_arithmetic
from isthmus.execution.inference.linear import dense
from isthmus.execution.inference.runner import TorchRunner

LENGTHS = (1, 7, 18, 33, 70, 71, 100, 3)
CHUNKS = (1, 3, 5, 32, 11, 1 << 30, 64, 2)


@pytest.fixture(scope="module", params=["llama-odd-heads", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(path, request.param)
    return path


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 131, length).tolist() for length in LENGTHS]


def requests(params: SamplingParams, reverse: bool = False) -> list[Request]:
    """One request a prompt, each with 8 blocks of its own, from the low or the high end of the pool."""
    made = []
    for index, prompt in enumerate(prompts()):
        base = (len(LENGTHS) - 1 - index if reverse else index) * 8
        blocks = range(base, base + 8)
        made.append(Request(str(index), prompt, list(blocks)[:: -1 if reverse else 1], params))
    return made


def run_alone(runner: TorchRunner, params: SamplingParams) -> list[Request]:
    made = requests(params)
    for request in made:
        generate(runner, [request], 16)
    return made


@pytest.mark.parametrize(
    "params",
    [
        greedy(),
        SamplingParams(max_tokens=99, seed=4, temperature=1.1, top_p=0.9),
        SamplingParams(max_tokens=99, seed=9),
    ],
    ids=["greedy", "top_p", "plain"],
)
def test_exact_mode_is_bitwise_the_same_alone_batched_chunked_and_in_other_blocks(
    folder: Path, params: SamplingParams
) -> None:
    runner = open_tiny(folder, exact=True)
    alone = run_alone(runner, params)
    together, chunked = requests(params, reverse=True), requests(params)
    generate(runner, together, 16)
    generate(runner, chunked, 16, chunks=CHUNKS)
    runner.close()
    for one, two, three in zip(alone, together, chunked, strict=True):
        assert len(one.digests) == 16
        assert one.digests == two.digests == three.digests
        assert one.output == two.output == three.output


def test_the_name_of_exact_arithmetic_differs_with_all_that_bits_depend_on() -> None:
    base = Machine("2.13.0", "AVX2", "x86_64", "fma avx2")
    changed = [replace(base, **{name: "other"}) for name in ("torch", "capability", "architecture", "flags")]
    names = {exact_arithmetic(machine, 2) for machine in [base, *changed]} | {exact_arithmetic(base, 3)}
    assert len(names) == 6
    assert exact_arithmetic(base, 2) in names


def test_exact_mode_is_bitwise_the_same_over_written_blocks(folder: Path) -> None:
    """Reuse: blocks that were read, and written back elsewhere, give the logits of computing them."""
    runner = open_tiny(folder, exact=True)
    assert len(runner.info.arithmetic) == 32
    prompt = prompts()[6]
    whole = Request("a", prompt, range(8), greedy())
    generate(runner, [whole], 4)
    for block in range(5):
        runner.write_block(20 + block, runner.read_block(block))
    reused = Request("b", prompt, range(20, 28), greedy())
    reused.computed = 80
    generate(runner, [reused], 4)
    runner.close()
    assert reused.digests == whole.digests


def test_the_self_test_notices_attention_that_depends_on_the_chunk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exact.TiledAttention.plan

    def shifted(self: exact.TiledAttention, spans: list, memory: object, heads: int) -> object:
        step = real(self, spans, memory, heads)
        scale = 1.0 + 2.0**-23 * (len(spans) > 1)
        return lambda layer, query, window=0: step(layer, query, window) * scale

    monkeypatch.setattr(exact.TiledAttention, "plan", shifted)
    with pytest.raises(ExactUnavailable, match="bitwise"):
        open_tiny(folder, exact=True)


def test_the_self_test_notices_linears_without_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untiled(self: exact.TiledLinear, weight: torch.Tensor, bias: torch.Tensor | None) -> object:
        # A product whose order of additions depends on the number of rows, as some matrix kernels' does.
        def linear(rows: torch.Tensor) -> torch.Tensor:
            half = weight.shape[1] // 2 if rows.shape[0] > 32 else weight.shape[1] // 3
            out = rows[:, :half] @ weight[:, :half].T + rows[:, half:] @ weight[:, half:].T
            return out if bias is None else out + bias

        return linear

    monkeypatch.setattr(exact.TiledLinear, "prepare", untiled)
    with pytest.raises(ExactUnavailable):
        open_tiny(folder, exact=True)


def logits_of(runner: TorchRunner, request: Request) -> list[float]:
    return [entry.logprob for entry in request.logprobs]


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("bf16", 0.5)])
def test_default_mode_agrees_closely_over_batches_and_chunks(folder: Path, dtype: str, tolerance: float) -> None:
    runner = open_tiny(folder, dtype=dtype)
    params = greedy(logprobs=0)
    alone, chunked = run_alone(runner, params), requests(params, reverse=True)
    generate(runner, chunked, 1, chunks=CHUNKS)
    runner.close()
    for one, two in zip(alone, chunked, strict=True):
        assert math.isclose(logits_of(runner, one)[0], logits_of(runner, two)[0], abs_tol=tolerance)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_block_comes_back_bit_for_bit(folder: Path, dtype: str) -> None:
    runner = open_tiny(folder, dtype=dtype)
    assert runner.info.arithmetic == "", "the default mode promises no bits"
    record = np.random.default_rng(1).integers(0, 256, runner.info.block_bytes, np.uint8).tobytes()
    last = runner.info.blocks - 1
    runner.write_block(last, record)
    assert runner.read_block(last) == record
    assert runner.read_block(last - 1) == bytes(runner.info.block_bytes)
    for block, bad in ((0, record[:-1]), (last + 1, record), (-1, record)):
        with pytest.raises(InvalidInput):
            runner.write_block(block, bad)
    runner.close()


def test_a_block_record_has_the_canonical_layout(folder: Path) -> None:
    """Token t of K in layer 0 stands at [0][0][t]: computing two tokens changes exactly those rows of each layer."""
    runner = open_tiny(folder)
    info = runner.info
    runner.execute(Batch([SequenceSlice("r", [3, 4], 0, [2])])).result()
    record = np.frombuffer(runner.read_block(2), np.float32)
    record = record.reshape(info.layers, 2, info.block_tokens, info.kv_heads, info.head_dim)
    runner.close()
    assert (np.abs(record[:, :, :2]).sum((-1, -2)) > 0).all()
    assert not record[:, :, 2:].any()


@pytest.mark.parametrize("exact_mode", [False, True])
def test_what_another_request_left_in_a_block_has_no_effect(folder: Path, exact_mode: bool) -> None:
    runner = open_tiny(folder, exact=exact_mode)
    clean = Request("a", prompts()[2], range(8), greedy())
    generate(runner, [clean], 8)
    poison = np.full(runner.info.block_bytes // 4, np.nan, np.float32).tobytes()
    for block in range(8):
        runner.write_block(block, poison)
    short, long = Request("b", prompts()[2], range(8), greedy()), Request("c", prompts()[6], range(8, 16), greedy())
    for block in range(8, 16):
        runner.write_block(block, poison)
    generate(runner, [short, long], 8)
    runner.close()
    assert short.output == clean.output


def test_drafts_give_the_tokens_of_plain_decoding(folder: Path) -> None:
    params = SamplingParams(max_tokens=99, seed=4, temperature=0.8, presence_penalty=0.5)
    runner = open_tiny(folder, exact=True)
    plain = Request("a", prompts()[3], range(8), params)
    generate(runner, [plain], 6)
    first = Request("b", prompts()[3], range(8, 16), params)
    generate(runner, [first], 1)
    right, wrong = plain.output[1:4], (plain.output[3] + 1) % 131

    def verify(drafts: list[int]) -> tuple[list[int], int, list[bytes] | None]:
        task = SampleTask(params, 1, TokenHistory(first.prompt, list(first.output)), digest=True)
        ids = [first.output[0], *drafts]
        batch = Batch([SequenceSlice("b", ids, len(first.prompt), first.blocks, task, len(drafts))])
        result = runner.execute(batch).result().slices[0]
        return result.token_ids, result.accepted_drafts, result.digests

    assert verify([*right[:2], wrong]) == (plain.output[1:4], 2, plain.digests[1:4])
    assert verify(right) == (plain.output[1:5], 3, plain.digests[1:5])
    runner.close()


def test_the_hidden_state_is_of_the_last_position_after_the_final_norm(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama-default")
    runner = open_tiny(tmp_path)
    prompt = prompts()[3]
    batch = Batch([SequenceSlice("a", prompts()[1], 0, [0]), SequenceSlice("b", prompt, 0, [1, 2, 3], hidden=True)])
    results = runner.execute(batch).result().slices
    runner.close()
    with torch.inference_mode():
        expected = model.model(torch.tensor([prompt])).last_hidden_state[0, -1].numpy()
    assert results[0].hidden is None
    assert results[1].token_ids == []
    np.testing.assert_allclose(np.frombuffer(results[1].hidden or b"", "<f4"), expected, atol=1e-4)


@pytest.mark.parametrize(
    "bad",
    [
        SequenceSlice("r", [], 0, [0]),
        SequenceSlice("r", [1], 16, [0]),
        SequenceSlice("r", [1], 0, [10**6]),
        SequenceSlice("r", [1], 0, [-1]),
        SequenceSlice("r", [131], 0, [0]),
        SequenceSlice("r", [-1], 0, [0]),
        SequenceSlice("r", [1], 256, list(range(17))),
    ],
)
def test_a_slice_that_breaks_the_contract_fails_and_the_runner_lives(folder: Path, bad: SequenceSlice) -> None:
    runner = open_tiny(folder)
    with pytest.raises(EngineFailed):
        runner.execute(Batch([bad])).result()
    assert len(runner.execute(Batch([SequenceSlice("r", [1], 0, [0])])).result().slices) == 1
    runner.close()


@pytest.mark.parametrize(
    ("asked", "arithmetic", "expected"),
    [
        ("auto", True, Dtype.BF16),
        ("auto", False, Dtype.F32),
        ("bf16", False, Dtype.BF16),
        ("f32", True, Dtype.F32),
    ],
)
def test_bfloat16_weights_are_served_in_what_the_processor_computes_in(
    folder: Path, asked: str, arithmetic: bool, expected: Dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, torch_dtype="bfloat16", dtype="bfloat16")
    monkeypatch.setattr(runner_module, "computes_bf16", lambda: arithmetic)
    runner = open_tiny(tmp_path, dtype=asked)
    assert runner.info.dtype is expected
    runner.close()


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "arm", "expected"),
    [
        ("x86_64", False, False, True, False),  # oneDNN says yes wherever there is AVX-512
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("aarch64", False, False, True, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_only_instructions_for_bfloat16_count_as_arithmetic(
    machine: str, avx512_bf16: bool, amx: bool, arm: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm)
    assert dense.computes_bf16() is expected


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"dtype": "f16"}, "f16"),
        ({"exact": True, "dtype": "bf16"}, "exact"),
        ({"max_model_len": 257}, "max_model_len"),
        ({"kv_bytes": 1 << 16, "block_tokens": 1024}, "kv_bytes"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(folder: Path, options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigInvalid, match=match):
        open_tiny(folder, **options)
