"""Model folders that must be refused, each by a `ModelInvalid` that names the file and the entry."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import edit_config, make_model, open_tiny
from transformers import AutoConfig

from isthmus.contracts.errors import ModelInvalid
from isthmus.execution.inference.check import check_folder
from isthmus.execution.inference.config_families import MoeConfig
from isthmus.execution.inference.model_config import load_config
from isthmus.execution.inference.models.families import FAMILIES, tensor_layout

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path, "llama-default")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mamba"}, 'model_type "mamba" is not served; accepted: llama, mistral, qwen2'),
        ({"model_type": None}, "model_type"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": 131}, "eos_token_id"),
        ({"eos_token_id": ["1"]}, "eos_token_id"),
        ({"dtype": "int8"}, "torch_dtype"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, 'rope_type "longrope"'),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2}}, 'rope_type "su"'),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_configs_that_are_not_served_are_refused_by_name(folder: Path, changes: dict[str, object], match: str) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, **changes)
    with pytest.raises(ModelInvalid, match=match):
        open_tiny(folder)


SLIDING, FULL = "sliding_attention", "full_attention"
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def configured(folder: Path, model_type: str, **entries: object) -> Path:
    """A folder with a config.json alone: four layers."""
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config |= {"model_type": model_type, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.mark.parametrize(
    ("model_type", "entries", "expected"),
    [
        ("llama", {}, (0, 0, 0, 0)),
        ("mistral", {}, (4096, 4096, 4096, 4096)),
        ("mistral", {"sliding_window": None}, (0, 0, 0, 0)),
        ("mistral", {"sliding_window": 512, "max_position_embeddings": 512}, (0, 0, 0, 0)),
        ("mistral", {"sliding_window": 511, "max_position_embeddings": 512}, (511, 511, 511, 511)),
        ("mistral", {"sliding_window": 9, "layer_types": [SLIDING] * 4}, (9, 9, 9, 9)),
        ("qwen2", {"sliding_window": 9}, (0, 0, 0, 0)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9}, (0, 0, 0, 0)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, (9, 9, 9, 9)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, (0, 0, 0, 9)),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
            (9, 0, 9, 0),
        ),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, (9, 9, 9, 9)),
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 9}, (0, 0, 0, 0)),
    ],
)
def test_each_layer_has_the_window_transformers_gives_it(
    tmp_path: Path, model_type: str, entries: dict[str, object], expected: tuple[int, ...]
) -> None:
    assert load_config(configured(tmp_path, model_type, **entries)).windows == expected


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "qwen3_next"])
def test_defaults_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": model_type,
                "vocab_size": 64,
                "hidden_size": 4096,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 32,
            }
        )
    )
    ours, theirs = load_config(tmp_path), AutoConfig.for_model(model_type)
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 128)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied == theirs.tie_word_embeddings
    assert set(ours.windows) == {getattr(theirs, "sliding_window", None) or 0}
    if ours.moe is not None:
        found = (ours.moe.experts, ours.moe.per_token, ours.moe.intermediate_size, ours.moe.normalise)
        assert found == (
            theirs.num_experts,
            theirs.num_experts_per_tok,
            theirs.moe_intermediate_size,
            theirs.norm_topk_prob,
        )
        assert all(ours.moe.sparse)


def test_experts_lie_where_step_and_list_say(tmp_path: Path) -> None:
    config = load_config(configured(tmp_path, "qwen3_moe", **MOE, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert config.moe == MoeConfig(4, 2, 8, False, (False, True, False, False))
    names = tensor_layout(config).shapes
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert "model.layers.3.mlp.down_proj.weight" in names
    assert not any("layers.3.mlp.experts" in name for name in names)


@pytest.mark.parametrize(
    ("model_type", "entries", "match"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"sliding_window": "9"}, "sliding_window"),
        ("mistral", {"sliding_window": 9, "layer_types": [SLIDING, FULL, SLIDING, FULL]}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"layer_types": [SLIDING] * 4}, "layer_types has sliding_attention"),
        ("qwen2", {"layer_types": [FULL]}, "layer_types"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, 'rope_type "mrope"'),
        ("qwen3_moe", MOE | {"num_experts": 0}, "num_experts"),
        ("qwen3_moe", MOE | {"num_experts": 5000}, "num_experts is 5000, accepted: an integer from 1 to 1024"),
        ("qwen3_moe", MOE | {"num_experts": 1024, "num_hidden_layers": 65}, "num_experts 1024 in 65 layers"),
        ("qwen3_moe", MOE | {"num_local_experts": 5}, "num_local_experts"),
        ("qwen3_moe", MOE | {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, accepted: an integer from 1 to 4"),
        ("qwen3_moe", MOE | {"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ("qwen3_moe", MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", MOE | {"mlp_only_layers": [4]}, "mlp_only_layers"),
        ("qwen3_moe", MOE | {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("qwen3_moe", MOE | {"norm_topk_prob": 1}, "norm_topk_prob"),
        ("qwen3_moe", MOE | {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
    ],
)
def test_what_a_family_does_not_serve_is_refused_by_name(
    tmp_path: Path, model_type: str, entries: dict[str, object], match: str
) -> None:
    with pytest.raises(ModelInvalid, match=rf"config\.json.*{match}"):
        load_config(configured(tmp_path, model_type, **entries))


def test_check_reports_a_model_with_experts(tmp_path: Path) -> None:
    made = make_model(tmp_path, "qwen3-moe")
    report = check_folder(tmp_path)
    assert report.parameters == sum(tensor.numel() for tensor in made.parameters())
    assert report.kv_bytes_per_token(4) == 2 * 2 * 2 * 16 * 4
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelInvalid, match=r"experts\.7\.up_proj\.weight is missing"):
        check_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a":"' + "x" * (1 << 20) + '"}'])
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelInvalid, match=r"config\.json"):
        load_config(folder)


def test_old_and_new_spelling_of_rope_mean_the_same(folder: Path) -> None:
    new = {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_config(folder, rope_parameters=new, rope_theta=None)
    modern = load_config(folder)
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_config(folder, rope_parameters=None, rope_theta=5e5, rope_scaling=old)
    assert load_config(folder) == modern


def test_end_tokens_come_from_the_generation_config_first(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 6, 5]}')
    assert load_config(folder).eos_token_ids == (5, 6)
    path.write_text("{}")
    assert load_config(folder).eos_token_ids == (1,)


def test_python_code_in_a_folder_is_never_run(folder: Path) -> None:
    (folder / "modeling_llama.py").write_text("raise SystemExit('ran')")
    open_tiny(folder).close()


def rewrite(folder: Path, change: Callable[[dict[str, dict]], None]) -> None:
    """Change the header of the weight file, data as it is."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_files_are_refused(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep] if keep >= 0 else data[: len(data) + keep])
    with pytest.raises(ModelInvalid, match=WEIGHTS):
        open_tiny(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[NORM].update(dtype="I64"),
        lambda h: h[NORM].update(dtype=3),
        lambda h: h[NORM].update(shape=[47]),
        lambda h: h[NORM].update(shape=[-48]),
        lambda h: h[NORM].update(shape="48"),
        lambda h: h[NORM].update(shape=[2**40, 2**40]),
        lambda h: h[NORM].update(data_offsets=[0, 192]),
        lambda h: h[NORM].update(data_offsets=[192, 0]),
        lambda h: h[NORM].update(data_offsets=[10**12, 10**12 + 192]),
        lambda h: h.update({NORM: []}),
        lambda h: h.pop(NORM),
        lambda h: h.update({"extra.weight": h.pop(NORM)}),
        lambda h: h.update({NORM: {"dtype": "F32", "shape": [6, 8], "data_offsets": h[NORM]["data_offsets"]}}),
    ],
)
def test_corrupt_headers_are_refused(folder: Path, change: Callable[[dict[str, dict]], None]) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelInvalid, match=r"safetensors|model\.norm\.weight"):
        open_tiny(folder)


@pytest.mark.parametrize("header", [b"{", b"[]", b"\xff\xfe", b"[" * 200_000])
def test_headers_that_are_no_objects_are_refused(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelInvalid, match=WEIGHTS):
        open_tiny(folder)


def test_a_header_length_beyond_any_limit_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ModelInvalid, match="header length"):
        open_tiny(folder)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over two files; the index's weight_map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return files


def test_shards_load_to_the_same_digest_and_other_weights_do_not(folder: Path) -> None:
    with_one = open_tiny(folder)
    with_one.close()
    shard(folder)
    sharded = open_tiny(folder)
    sharded.close()
    assert sharded.info.weights == with_one.info.weights
    assert sharded.info.parameters == with_one.info.parameters
    edit_config(folder, rms_norm_eps=1e-5)
    other = open_tiny(folder)
    other.close()
    assert other.info.weights != with_one.info.weights


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 3, "gone.safetensors"]
)
def test_an_index_stays_inside_the_folder(folder: Path, file: object) -> None:
    files = shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": files | {NORM: file}}))
    with pytest.raises(ModelInvalid):
        open_tiny(folder)


def test_an_index_that_disagrees_with_the_files_is_refused(folder: Path) -> None:
    files = shard(folder)
    other = next(file for file in files.values() if file != files[NORM])
    (folder / INDEX).write_text(json.dumps({"weight_map": files | {NORM: other}}))
    with pytest.raises(ModelInvalid, match=NORM):
        open_tiny(folder)


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelInvalid, match="only safetensors"):
        open_tiny(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_cast_to_the_serving_dtype(folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    runner = open_tiny(folder)
    runner.close()
    assert runner.info.dtype == "F32"
