"""What is compiled for a model, its key, and the seam: the eager pieces are the operators they stand for."""

from pathlib import Path

import msgspec
import pytest
import torch
from tests.support.tiny_models import MODELS, make_model, open_tiny

from isthmus.execution.inference.compiled import spec as module
from isthmus.execution.inference.compiled.check import differs
from isthmus.execution.inference.compiled.pieces import (
    AddNormModule,
    RotateWriteModule,
    compiled_add_norm,
    compiled_rotate_write,
    example,
)
from isthmus.execution.inference.compiled.spec import Machine, PieceSpec, cache_key, describe, this_machine
from isthmus.execution.inference.exact import exact_norm
from isthmus.execution.inference.models.pieces import Heads, eager_add_norm, eager_rotate_write
from isthmus.execution.inference.models.step import rms_norm
from isthmus.execution.inference.profile import INTERPRETER, NORMS, StepProfile, profiled
from isthmus.execution.inference.rope import rotate
from isthmus.execution.inference.runner import default_kernels

LLAMA = PieceSpec(
    dtype="f32", hidden=48, norm_dtype="f32", eps=1e-6, heads=6, kv_heads=2, head_dim=8, rotary_dim=8, columns=80
)
QWEN3 = msgspec.structs.replace(LLAMA, head_norm="f32")
QWEN3_NEXT = msgspec.structs.replace(LLAMA, head_dim=16, rotary_dim=8, columns=256, head_norm="f32")
BF16 = msgspec.structs.replace(LLAMA, dtype="bf16", norm_dtype="bf16")
BF16_PRECISE = msgspec.structs.replace(QWEN3_NEXT, dtype="bf16")
SPECS = {"llama": LLAMA, "qwen3": QWEN3, "qwen3-next": QWEN3_NEXT, "bf16": BF16, "bf16-precise": BF16_PRECISE}
OTHER = {"dtype": "bf16", "norm_dtype": "bf16", "head_norm": "bf16", "eps": 1e-5}
MACHINE = Machine("2", "AVX2", "x86_64", "avx avx2")


def test_the_key_changes_with_every_field_of_the_spec() -> None:
    keys = {cache_key(LLAMA, MACHINE)}
    for field in PieceSpec.__struct_fields__:
        value = OTHER.get(field) or getattr(LLAMA, field) + 2
        keys.add(cache_key(msgspec.structs.replace(LLAMA, **{field: value}), MACHINE))
    assert len(keys) == 1 + len(PieceSpec.__struct_fields__)


def test_the_key_changes_with_the_machine_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [
        MACHINE,
        Machine("3", "AVX2", "x86_64", "avx avx2"),
        Machine("2", "AVX512", "x86_64", "avx avx2"),
        Machine("2", "AVX2", "aarch64", "avx avx2"),
        Machine("2", "AVX2", "x86_64", "avx avx2 fma"),
    ]
    keys = {cache_key(LLAMA, machine) for machine in machines}
    monkeypatch.setattr(module, "PIECES_VERSION", 99)
    keys.add(cache_key(LLAMA, MACHINE))
    assert len(keys) == len(machines) + 1
    assert cache_key(LLAMA, MACHINE) == cache_key(msgspec.structs.replace(LLAMA), MACHINE)


def test_the_instructions_of_the_processor_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    cpuinfo = tmp_path / "proc" / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: sse avx\n\nprocessor : 1\nflags\t\t: sse avx other\n")
    assert this_machine(tmp_path).flags == "avx sse"
    cpuinfo.write_text("Features\t: fp asimd\n")
    assert this_machine(tmp_path).flags == "asimd fp"
    cpuinfo.unlink()
    assert this_machine(tmp_path).flags == ""
    assert this_machine().torch == torch.__version__


@pytest.mark.parametrize("name", ["llama-default", "qwen3", "qwen3-next", "qwen3-next-dense-odd-tied", "qwen3-moe"])
def test_a_model_is_described_as_it_was_built(tmp_path: Path, name: str) -> None:
    make_model(tmp_path, name)
    runner = open_tiny(tmp_path, dtype="bf16")
    spec, config = describe(runner._decoder), runner._decoder.config
    runner.close()
    options = MODELS[name]
    hybrid = name.startswith("qwen3-next")
    assert spec == PieceSpec(
        dtype="bf16",
        hidden=config.hidden_size,
        norm_dtype="f32" if hybrid else "bf16",
        eps=config.norm_eps,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        rotary_dim=int(config.head_dim * float(str(options.get("partial_rotary_factor", 1.0)))),
        columns=(config.heads * (2 if hybrid else 1) + 2 * config.kv_heads) * config.head_dim,
        head_norm="" if name.startswith("llama") else ("f32" if hybrid else "bf16"),
    )


def test_a_model_of_another_dtype_or_with_layers_that_differ_is_not_compiled(tmp_path: Path) -> None:
    make_model(tmp_path, "llama-default")
    runner = open_tiny(tmp_path)
    decoder = runner._decoder
    decoder.cos = decoder.cos.half()
    assert describe(decoder) is None
    decoder.cos = decoder.cos.float()
    assert describe(decoder) is not None
    object.__setattr__(decoder.layers[1].mixer.heads, "dim", 4)
    assert describe(decoder) is None
    runner.close()


@pytest.mark.parametrize("norm", [rms_norm, exact_norm])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-next"])
def test_the_eager_pieces_are_the_operators_that_a_layer_had(name: str, rows: int, norm: object) -> None:
    """Bit for bit; with padding, of which nothing is written."""
    spec, padded = SPECS[name], rows + 3
    (hidden, delta, weight), (projected, cos, sin, memory, places, *weights) = example(spec, padded, 300)
    places = torch.cat((places[:rows], places[padded : padded + rows]))
    expected = hidden + delta
    normed = norm(expected, weight, spec.eps)
    assert torch.equal(eager_add_norm(norm)(hidden, delta, weight, spec.eps), normed)
    assert torch.equal(hidden, expected)
    split, pair = projected.view(padded, -1, spec.head_dim), spec.heads + spec.kv_heads
    query, key, value = split[:, : spec.heads], split[:, spec.heads : pair], split[:, pair : pair + spec.kv_heads]
    if weights:
        query, key = norm(query, weights[0], spec.eps), norm(key, weights[1], spec.eps)
    part = spec.rotary_dim
    query, key = (torch.cat((rotate(one[..., :part], cos, sin), one[..., part:]), -1) for one in (query, key))
    wanted = memory.clone()
    wanted[places[:rows]] = key[:rows].flatten(1)
    wanted[places[rows:]] = value[:rows].flatten(1)
    heads = Heads(spec.heads, spec.kv_heads, spec.head_dim, spec.eps, (weights[0], weights[1]) if weights else None)
    assert torch.equal(eager_rotate_write(norm)(projected, heads, (cos, sin), memory, places), query)
    assert torch.equal(memory, wanted)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_the_modules_that_are_compiled_compute_what_the_eager_pieces_do(name: str, rows: int) -> None:
    spec = SPECS[name]
    add_norm, turn = AddNormModule(spec), RotateWriteModule(spec)
    pieces = compiled_add_norm(lambda inputs: [add_norm(*inputs)]), compiled_rotate_write(lambda ins: [turn(*ins)])
    assert differs(*pieces, spec, rows) == ""


def _spoilt(what: str) -> tuple[object, object]:
    add_norm, turn = AddNormModule(QWEN3), RotateWriteModule(QWEN3)

    def added(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        before = inputs[0].clone()
        normed = add_norm(*inputs)
        if what == "sum":
            inputs[0].copy_(before)
        return [normed * 1.001 if what == "norm" else normed]

    def turned(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        memory, places = inputs[3], inputs[4]
        query = turn(*inputs)
        half = places.shape[0] // 2
        if what == "value":
            memory[places[half]] *= 1 + 1e-7
            memory[places[half], 0] += 1e-6
        if what == "key":
            memory[places[0]] *= 1.001
        if what == "elsewhere":
            others = set(range(memory.shape[0])) - set(places.tolist())
            memory[min(others)] += 1
        return [query * 1.001 if what == "query" else query]

    return compiled_add_norm(added), compiled_rotate_write(turned)


@pytest.mark.parametrize("what", ["sum", "norm", "query", "key", "value", "elsewhere"])
def test_the_self_check_finds_what_is_wrong(what: str) -> None:
    piece = "add_norm" if what in ("sum", "norm") else "rotate_write"
    assert differs(*_spoilt(what), QWEN3, 33) == piece
    assert differs(*_spoilt(""), QWEN3, 33) == ""


def test_a_profile_counts_additions_with_their_norms_and_keeps_counting_after_a_change() -> None:
    kernels = default_kernels(torch.device("cpu"), torch.float32)
    now = [0.0]
    profile = StepProfile(lambda: now[0])
    pieces = profiled(kernels, profile).pieces
    assert pieces is not kernels.pieces

    def slow(*_: object) -> torch.Tensor:
        now[0] += 1.0
        return torch.zeros(1)

    (hidden, delta, weight), _ = example(LLAMA, 3, 20)
    expected = rms_norm(hidden + delta, weight, 1e-6)
    assert torch.equal(pieces.add_norm(hidden, delta, weight, 1e-6), expected)
    with profile.step():
        pieces.use(slow, slow)
        pieces.add_norm(hidden, delta, weight, 1e-6)
        pieces.rotate_write(hidden, None, (hidden, hidden), hidden, hidden)
    assert (profile.seconds[NORMS], profile.seconds[INTERPRETER]) == (1.0, 1.0)
