"""Tiny random models in the Hugging Face layout, made by transformers from a seed, and a driver for a runner."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import Batch, SampleTask, SequenceSlice, SliceResult, TokenHistory
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
}


def make_model(folder: Path, name: str, seed: int = 0) -> PreTrainedModel:
    """A model of `MODELS`, saved in `folder`. Weights are large enough that logits differ clearly."""
    options = {**BASE, **MODELS[name]}
    family = options.pop("family", "llama")
    rope = options.pop("rope_scaling", None)
    options["rope_parameters"] = {"rope_theta": options.pop("rope_theta"), **(rope or {"rope_type": "default"})}
    torch.manual_seed(seed)
    made = Qwen3ForCausalLM(Qwen3Config(**options)) if family == "qwen3" else LlamaForCausalLM(LlamaConfig(**options))
    with torch.no_grad():
        for key, tensor in made.named_parameters():
            tensor.normal_(1.0 if "norm" in key else 0.0, 0.1 if "norm" in key or "bias" in key else 0.2)
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
    """One request driven by hand: its own blocks, its own tokens."""

    def __init__(self, name: str, prompt: Sequence[int], blocks: Sequence[int], params: SamplingParams) -> None:
        self.name, self.prompt, self.blocks, self.params = name, list(prompt), list(blocks), params
        self.output: list[int] = []
        self.digests: list[bytes] = []
        self.logprobs: list[object] = []
        self.computed = 0

    def slice(self, chunk: int = 1 << 30, digest: bool = True) -> SequenceSlice:
        """The next chunk of what is not computed yet; samples when it reaches the end."""
        tokens = [*self.prompt, *self.output]
        end = min(len(tokens), self.computed + chunk)
        task = None
        if end == len(tokens):
            task = SampleTask(
                self.params, len(self.output), TokenHistory(self.prompt, list(self.output)), digest=digest
            )
        return SequenceSlice(self.name, tokens[self.computed : end], self.computed, self.blocks, task)

    def take(self, part: SequenceSlice, result: SliceResult) -> None:
        self.computed = part.end
        self.output.extend(result.token_ids)
        self.digests.extend(result.digests or [])
        self.logprobs.extend(result.logprobs or [])


def generate(runner: TorchRunner, sequences: Sequence[Request], count: int, chunks: Sequence[int] = ()) -> None:
    """Run all together until each has `count` output tokens."""
    sizes = list(chunks) or [1 << 30] * len(sequences)
    while True:
        todo = [(s, s.slice(size)) for s, size in zip(sequences, sizes, strict=True) if len(s.output) < count]
        if not todo:
            return
        results = runner.execute(Batch([part for _, part in todo])).result().slices
        for (sequence, part), result in zip(todo, results, strict=True):
            sequence.take(part, result)
