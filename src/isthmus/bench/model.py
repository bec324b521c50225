"""The random model that engines are compared on: Llama, 124.7 million parameters, bfloat16, made from a seed.

Hidden 768, 12 layers, 12 heads, 4 KV heads, intermediate 2048, vocabulary 32000, untied. Every token is four ASCII
characters, so that whoever reads a stream can count the tokens in it.
"""

import json
import os
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 768, 12, 12, 4, 2048, 32_000
POSITIONS = 9216
"""Room for a conversation of 8k tokens and its answer."""
TOKEN_CHARS = 4
_HEAD_DIM = HIDDEN // HEADS
_ALPHABET = string.ascii_lowercase + string.digits


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors, by their published names."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        base = f"model.layers.{layer}"
        found[f"{base}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{base}.post_attention_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            found[f"{base}.self_attn.{name}_proj.weight"] = (rows * _HEAD_DIM, HIDDEN)
        found[f"{base}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            found[f"{base}.mlp.{name}_proj.weight"] = (INTERMEDIATE, HIDDEN)
        found[f"{base}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def parameters() -> int:
    """How many there are."""
    return sum(int(np.prod(shape)) for shape in shapes().values())


def read_bytes(tokens: int, element: int) -> int:
    """Bytes that a step with few rows reads: weights but for the embedding, K and V of `tokens` positions."""
    return element * (parameters() - VOCABULARY * HIDDEN + tokens * LAYERS * 2 * KV_HEADS * _HEAD_DIM)


def flops(rows: int, sampled: int) -> int:
    """Operations in the linears of `rows` tokens of which `sampled` have logits computed."""
    layers = parameters() - 2 * VOCABULARY * HIDDEN
    return 2 * (layers * rows + VOCABULARY * HIDDEN * sampled)


def make(folder: Path, seed: int, progress: Callable[[float], None]) -> None:
    """Write the model into `folder`, unless it is there already. The weights come last: whole or not at all. Another
    number of positions only takes another configuration.
    """
    weights, config = folder / "model.safetensors", folder / "config.json"
    if weights.exists():
        if config.read_text() != json.dumps(_config(), ensure_ascii=False):
            config.write_text(json.dumps(_config(), ensure_ascii=False))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", _config()), ("tokenizer.json", _tokenizer()), *_SMALL_FILES):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False))
    unfinished = weights.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        for part in _safetensors(seed, progress):
            file.write(part)
    os.replace(unfinished, weights)


def _safetensors(seed: int, progress: Callable[[float], None]) -> Iterator[bytes]:
    """The bytes of the file, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, total = 0, 2 * parameters()
    for name, shape in shapes().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    generator, done = np.random.default_rng(seed), 0
    for name, shape in shapes().items():
        if "norm" in name:
            values = np.ones(shape, np.float32)
        else:
            values = generator.standard_normal(shape, np.float32) * np.float32(0.02)
        # bfloat16 is the upper half of a float32; adding half of the lower half's range rounds.
        yield ((values.view(np.uint32) + 0x8000) >> 16).astype("<u2").tobytes()
        done += 2 * values.size
        progress(done / total)


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": _HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _text(token: int) -> str:
    """A space (as byte-level vocabularies write it) and three characters."""
    letters = ""
    for _ in range(TOKEN_CHARS - 1):
        token, digit = divmod(token, len(_ALPHABET))
        letters += _ALPHABET[digit]
    return "\u0120" + letters


def _tokenizer() -> dict[str, Any]:
    vocabulary = {_text(token): token for token in range(VOCABULARY)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


_SMALL_FILES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _text(2).replace("\u0120", " ")},
    ),
    ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}),
)
