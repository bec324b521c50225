"""Tiny random models in the Hugging Face layout, made with transformers from fixed seeds."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 512

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LLAMA = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 3}
QWEN3 = {
    "hidden_size": 80,
    "intermediate_size": 144,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 32,
}


def random_folders(root: Path) -> dict[str, Path]:
    """A tied rope-scaled Llama and an untied Qwen3 with an odd head count, saved under `root`."""
    llama = LlamaConfig(**COMMON, **LLAMA, tie_word_embeddings=True, rope_parameters=LLAMA3)
    qwen3 = Qwen3Config(**COMMON, **QWEN3, tie_word_embeddings=False, rope_parameters=YARN)
    folders = {}
    for seed, (name, build) in enumerate(
        {"llama": lambda: LlamaForCausalLM(llama), "qwen3": lambda: Qwen3ForCausalLM(qwen3)}.items()
    ):
        torch.manual_seed(seed)
        folder = root / name
        build().float().eval().save_pretrained(folder)
        folders[f"random-{name}"] = folder
    return folders
