"""Tiny random models in the Hugging Face layout, made by transformers from a seed, and a driver for a runner."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import (
    Batch,
    SampleTask,
    SequenceSlice,
    SliceResult,
    StateCapture,
    StateWork,
    TokenHistory,
)
from isthmus.execution.inference.runner import TorchRunner, open_runner
from isthmus.execution.inference.settings import EngineSettings

BASE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "eos_token_id": 1,
}
ROPES: dict[str, dict[str, object] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
}
HYBRID: dict[str, object] = {
    "family": "qwen3_next",
    "head_dim": 16,
    "num_hidden_layers": 4,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
MODELS: dict[str, dict[str, object]] = {
    **{f"llama-{name}": {"rope_scaling": rope} for name, rope in ROPES.items()},
    "llama-odd-heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8},
    "llama-one-kv-head-tied": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3-odd-tied-bias": {
        "family": "qwen3",
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "qwen3-yarn": {"family": "qwen3", "rope_scaling": ROPES["yarn"]},
    "qwen3-window-upper": {
        "family": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 33,
        "max_window_layers": 1,
    },
    "qwen2": {"family": "qwen2"},
    "qwen2-odd-tied-window-upper": {
        "family": "qwen2",
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen2-layer-types": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 60,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": ROPES["yarn"],
    },
    "mistral": {"family": "mistral", "sliding_window": 12},
    "mistral-odd-tied": {
        "family": "mistral",
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 12,
        "sliding_window": 60,
        "tie_word_embeddings": True,
    },
    "mistral-no-window": {"family": "mistral", "sliding_window": None},
    "qwen3-moe": {
        "family": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen3-moe-odd-tied-some-dense": {
        "family": "qwen3_moe",
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "head_dim": 12,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "qwen3-moe-window": {
        "family": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "use_sliding_window": True,
        "sliding_window": 12,
    },
    "qwen3-next": {
        **HYBRID,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3-next-dense-odd-tied": {
        **HYBRID,
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "head_dim": 12,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_key_head_dim": 10,
        "linear_conv_kernel_dim": 3,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_only_layers": [0, 1, 2],
        "tie_word_embeddings": True,
        "attention_bias": True,
        "partial_rotary_factor": 1.0,
    },
}


def make_model(folder: Path, name: str, seed: int = 0) -> PreTrainedModel:
    """A model of `MODELS`, saved in `folder`. Weights are large enough that logits differ clearly."""
    options = {**BASE, **MODELS[name]}
    family = options.pop("family", "llama")
    rope = options.pop("rope_scaling", None)
    options["rope_parameters"] = {"rope_theta": options.pop("rope_theta"), **(rope or {"rope_type": "default"})}
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for key, tensor in made.named_parameters():
            tensor.normal_(1.0 if "norm" in key else 0.0, 0.1 if "norm" in key or "bias" in key else 0.2)
            if "A_log" in key:  # From states that last for hundreds of positions to some that last for one.
                tensor.uniform_(-6.0, 1.0)
    made.eval()
    made.save_pretrained(folder)
    return made


def open_tiny(folder: Path, **options: object) -> TorchRunner:
    """A runner on a folder: float32 unless told otherwise."""
    chosen = {"dtype": "f32", "kv_bytes": 1 << 22, "threads": 2, **options}
    return open_runner(EngineSettings(model=str(folder), name="tiny", **chosen), lambda stage, fraction: None)


def edit_config(folder: Path, **changes: object) -> None:
    """Change entries of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def greedy(max_tokens: int = 1 << 20, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, **{"temperature": 0.0, **options})


class Request:
    """One request driven by hand: its own blocks, its own tokens, with a hybrid model its own state slot."""

    def __init__(self, name: str, prompt: Sequence[int], blocks: Sequence[int], params: SamplingParams) -> None:
        self.name, self.prompt, self.blocks, self.params = name, list(prompt), list(blocks), params
        self.output: list[int] = []
        self.digests: list[bytes] = []
        self.logprobs: list[object] = []
        self.computed = 0
        self.slot: int | None = None

    def slice(self, chunk: int = 1 << 30, digest: bool = True) -> SequenceSlice:
        """The next chunk of what is not computed yet; samples when it reaches the end."""
        tokens = [*self.prompt, *self.output]
        end = min(len(tokens), self.computed + chunk)
        task = None
        if end == len(tokens):
            task = SampleTask(
                self.params, len(self.output), TokenHistory(self.prompt, list(self.output)), digest=digest
            )
        state = None
        if self.slot is not None:
            state = StateWork(self.slot if self.computed else None, [StateCapture(end, self.slot)])
        return SequenceSlice(self.name, tokens[self.computed : end], self.computed, self.blocks, task, state=state)

    def take(self, part: SequenceSlice, result: SliceResult) -> None:
        self.computed = part.end
        self.output.extend(result.token_ids)
        self.digests.extend(result.digests or [])
        self.logprobs.extend(result.logprobs or [])


def generate(runner: TorchRunner, sequences: Sequence[Request], count: int, chunks: Sequence[int] = ()) -> None:
    """Run all together until each has `count` output tokens. A hybrid's slots are as the places in `sequences`."""
    for place, sequence in enumerate(sequences):
        if runner.info.states and sequence.slot is None:
            sequence.slot = place
    sizes = list(chunks) or [1 << 30] * len(sequences)
    while True:
        todo = [(s, s.slice(size)) for s, size in zip(sequences, sizes, strict=True) if len(s.output) < count]
        if not todo:
            return
        results = runner.execute(Batch([part for _, part in todo])).result().slices
        for (sequence, part), result in zip(todo, results, strict=True):
            sequence.take(part, result)
