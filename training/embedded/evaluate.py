"""Measures the exported folder and writes the figures, and a transcript, as JSON.

With ``transformers`` installed, it also checks that it loads the folder and
decodes the same tokens as the training model.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import commit, machine
from tokenizers import Tokenizer
from torch import Tensor
from training.embedded import probes
from training.embedded.chat_render import Message, Renderer
from training.embedded.generate import greedy, load_exported
from training.embedded.model import Llama
from training.embedded.pools import DOCS, read_pool
from training.embedded.world import load_world

_EXCHANGES: tuple[tuple[str, ...], ...] = (
    ("Hello!", "Who are you?", "What can you do?", "Thank you!"),
    ("My name is Greta and I live in Porto.", "What is 3 + 4?", "Where do I live?", "What is my name?"),
    ("The pass key is 48213. Remember it.", "What is a dog?", "What is the pass key?"),
    ("Remember these: Falcon: 7719, Comet: 3054, Willow: 8826", "What is the value of Comet?"),
    ("What is the capital of Portugal?", "Who won the election?"),
    ("What is a database?", "Count from 3 to 9.", "Spell harbor."),
    ("Repeat after me: the quiet fox crossed the narrow bridge.",),
    ("Tell me about cats.", "Name three colours."),
    ("Tell me a story about an otter.",),
    ("I am tired today.", "Goodbye!"),
)


def transcript(model: Llama, tokenizer: Tokenizer, stops: set[int]) -> list[list[Message]]:
    """The sample exchanges, answered greedily."""
    renderer, found = Renderer(), []
    for turns in _EXCHANGES:
        messages: list[Message] = []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            prompt = tokenizer.encode(renderer.prompt(messages)).ids
            answer = tokenizer.decode(greedy(model, prompt, 120, stops))
            messages.append({"role": "assistant", "content": answer})
        found.append(messages)
    return found


def parity(folder: Path, model: Llama, tokenizer: Tokenizer) -> dict[str, Any]:
    """Whether ``transformers`` decodes the same tokens from the same folder, and how far its logits are."""
    if importlib.util.find_spec("transformers") is None:
        return {"checked": False}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    unused = tokenizer.token_to_id("<|reserved_0|>")
    renderer, other_tokenizer, same, distance = Renderer(), AutoTokenizer.from_pretrained(folder), 0, 0.0
    for turns in _EXCHANGES:
        messages = [{"role": "user", "content": turns[0]}]
        ids = tokenizer.encode(renderer.prompt(messages)).ids
        text = other_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if other_tokenizer(text)["input_ids"] != ids:
            raise SystemExit("transformers renders or tokenises a prompt differently")
        made = other.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=unused)
        same += made[0, len(ids) :].tolist() == greedy(model, ids, 40, set())
        with torch.no_grad():
            distance = max(distance, float((other(made).logits - model(made)).abs().max()))
    return {"checked": True, "prompts": len(_EXCHANGES), "same_tokens": same, "largest_logit_difference": distance}


def measure(folder: Path, work: Path, count: int) -> dict[str, Any]:
    """Every figure of the model card."""
    model, tokenizer = load_exported(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    world, pool = load_world(work, held_out=True), read_pool(work / "pools", f"{DOCS}-held-out")
    stops = set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])

    def logits(tokens: Tensor) -> Tensor:
        out: Tensor = model(tokens)
        return out

    found: dict[str, Any] = {"bits_per_byte": round(probes.bits_per_byte(pool, tokenizer, logits, 1024, 100), 4)}
    for name, probe in probes.PROBES.items():
        for length in (256, 512, 1024):
            answered = probes.ask(probe, world, tokenizer, logits, length, count, seed=11)
            found[f"{name}@{length}"] = {"exact": answered.exact, "tokens": round(answered.tokens, 4)}
            print(name, length, answered, flush=True)
    same, talks = parity(folder, model, tokenizer), transcript(model, tokenizer, stops)
    return {"figures": found, "parity": same, "transcript": talks}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="work folder")
    parser.add_argument("--run", default="run", help="run that was exported, for its progress")
    parser.add_argument("--model", type=Path, default=Path("src/isthmus/data/embedded"), help="exported folder")
    results = Path("benchmarks/results/embedded_model.json")
    parser.add_argument("--out", type=Path, default=results, help="where to write")
    parser.add_argument("--count", type=int, default=100, help="probes of each kind and length")
    options = parser.parse_args()
    result = measure(options.model, options.work, options.count)
    latest = options.work / options.run / "latest.json"
    training = json.loads(latest.read_text()) if latest.exists() else {}
    training.pop("tensors", None)
    when = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    report = {
        "when": when,
        "commit": commit(),
        "machine": machine(),
        "load_average": os.getloadavg(),
        "probes_each": options.count,
        "seed": 11,
        "training": training,
        **result,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(report["figures"]), json.dumps(report["parity"]))


if __name__ == "__main__":
    main()
