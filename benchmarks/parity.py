"""Parity with transformers (M2): greedy tokens in float32, 50 prompts of 128 output tokens each, for every model.

    python -m benchmarks.parity [--prompts 50] [--tokens 128] [--device cuda]

On a GPU both run there, this engine with its kernels and graphs (`kernels` in the result says what was used).

A token may differ only where transformers' own two best logits lie within 1e-4; that prompt's comparison stops there
and is counted as a tie. Exit status 1 on any other difference; the result is benchmarks/results/parity.json.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from tests.support.tiny_models import MODELS, Request, generate, greedy, make_model, open_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import ROOT, Run

EMBEDDED = ROOT / "src/isthmus/data/embedded"
EPSILON = 1e-4
BATCH = 16
SEED = 20_260


@torch.inference_mode()
def compare(model: PreTrainedModel, prompt: list[int], output: list[int]) -> dict[str, int]:
    """Compare each output token with transformers' choice at its position."""
    logits = model(torch.tensor([prompt + output], device=model.device)).logits[0].float()
    for index, token in enumerate(output):
        best = logits[len(prompt) + index - 1].topk(2)
        if int(best.indices[0]) != token:
            tie = float(best.values[0] - best.values[1]) <= EPSILON
            return {"equal": index, "ties": int(tie), "different": int(not tie)}
    return {"equal": len(output), "ties": 0, "different": 0}


def measure(folder: Path, model: PreTrainedModel, count: int, tokens: int, device: str) -> dict[str, int | str]:
    """Generate in batches of mixed lengths and chunk sizes, then compare every prompt."""
    generator = torch.Generator().manual_seed(SEED)
    vocabulary, longest = model.config.vocab_size, min(96, model.config.max_position_embeddings - tokens)
    compiled = {} if device == "cpu" else {"compiled": "auto", "compiled_dir": str(folder)}
    runner = open_tiny(folder, kv_bytes=1 << 27, device=device, **compiled)
    per = -(-(longest + tokens) // runner.info.block_tokens)
    totals = {"prompts": count, "equal": 0, "ties": 0, "different": 0}
    for first in range(0, count, BATCH):
        requests = []
        for place in range(min(BATCH, count - first)):
            length = int(torch.randint(1, longest + 1, (1,), generator=generator))
            prompt = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
            requests.append(Request(str(place), prompt, range(place * per, (place + 1) * per), greedy()))
        generate(runner, requests, tokens, chunks=[(1 << 30, 16, 33)[place % 3] for place in range(len(requests))])
        for request in requests:
            for name, value in compare(model, request.prompt, request.output[:tokens]).items():
                totals[name] += value
    runner.close()
    told = {} if device == "cpu" else {"kernels": ": ".join(runner.compiled_state())}
    return totals | told


def main(arguments: list[str] | None = None) -> None:
    """Run all models and write the result. Exits with 1 when something differs beyond ties."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--models", nargs="*", default=["embedded", *MODELS], choices=["embedded", *MODELS])
    parser.add_argument("--name", default="parity", help="file name of the result")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<index> [%(default)s]")
    options = parser.parse_args(arguments)
    settings = {"prompts": options.prompts, "tokens": options.tokens, "epsilon": EPSILON, "dtype": "f32"}
    settings |= {"device": options.device}
    run = Run(options.name, SEED, settings)
    results: dict[str, dict[str, int | str]] = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = EMBEDDED if name == "embedded" else Path(scratch)
            if name == "embedded":
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            else:
                model = make_model(folder, name)
            results[name] = measure(folder, model.to(options.device), options.prompts, options.tokens, options.device)
        print(name, results[name])
        run.write(results)
    if any(result["different"] for result in results.values()):
        sys.exit("parity: tokens differ where transformers has no tie")


if __name__ == "__main__":
    main()
