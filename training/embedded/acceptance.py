"""How often the main model would accept the draft's guesses.

On held-out documents and conversations the main model decodes greedily; at each position
the draft guesses ``k`` tokens from the same text, and those before the first difference are
accepted, as greedy speculative decoding does. Written into the evaluation's JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from training.embedded.chat_render import Renderer
from training.embedded.generate import greedy, load_exported
from training.embedded.mixture import KINDS as MIXTURE
from training.embedded.models import KINDS, Network
from training.embedded.pools import DOCS, parse_marks, read_pool
from training.embedded.world import load_world

SEED = 29


@dataclass(frozen=True)
class Acceptance:
    """Guesses made and accepted: ``rate`` is accepted per guessed, ``per_step`` the tokens that a step yields."""

    rate: float
    per_step: float
    steps: int
    tokens: int


def _guesses(draft: Network, ids: list[int], starts: list[int], k: int) -> list[list[int]]:
    """The draft's greedy ``k`` tokens after each of the prefixes of ``ids`` that end before ``starts``."""
    rows = [ids[:start] for start in starts]
    for _ in range(k):
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        states = draft.hidden(padded)[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        best = (states @ draft.model.embed_tokens.weight.T).argmax(-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, best, strict=True)]
    return [row[-k:] for row in rows]


def accepted(guess: list[int], truth: list[int]) -> int:
    """How many guessed tokens stand before the first that differs."""
    for at, (guessed, right) in enumerate(zip(guess, truth, strict=False)):
        if guessed != right:
            return at
    return min(len(guess), len(truth))


@torch.no_grad()
def measure(main: Network, draft: Network, prompts: list[list[int]], most: int, k: int, stops: set[int]) -> Acceptance:
    """Acceptance over the main model's greedy answers to ``prompts``, up to ``most`` tokens each.

    A step that ends a text has fewer than ``k`` tokens to guess; only those count as guesses.
    """
    good = guessed = steps = tokens = 0
    for prompt in prompts:
        answer = greedy(main, prompt, most, stops)
        if not answer:
            continue
        whole = prompt + answer
        found = _guesses(draft, whole, list(range(len(prompt), len(whole))), k)
        at = 0
        while at < len(answer):
            truth = answer[at : at + k]
            right = accepted(found[at], truth)
            good, guessed, steps = good + right, guessed + len(truth), steps + 1
            at += right + 1
        tokens += len(answer)
    return Acceptance(round(good / max(1, guessed), 4), round(tokens / max(1, steps), 3), steps, tokens)


def conversations(work: Path, tokenizer: Tokenizer, count: int) -> dict[str, list[list[int]]]:
    """Held-out prompts by kind: documents cut after 96 tokens, and exercises up to their last answer."""
    rng, renderer, world = random.Random(SEED), Renderer(), load_world(work, held_out=True)
    found: dict[str, list[list[int]]] = {}
    for kind in ("chat", "table", "passage", "tools"):
        rows = found.setdefault(kind, [])
        for _ in range(count):
            text, _ = parse_marks(MIXTURE[kind][0](world, rng, renderer, 700))
            prompt, mark, _ = text.rpartition("<|assistant|>")
            rows.append(tokenizer.encode("<|bos|>" + prompt + mark).ids)
    return found


def documents(folder: Path, tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Beginnings of stretches of held-out documents, 96 tokens each."""
    pool, bos = read_pool(folder, f"{DOCS}-held-out"), tokenizer.token_to_id("<|bos|>")
    places = random.Random(SEED).sample(range(len(pool.tokens) - 96), count)
    return [[bos, *pool.tokens[at : at + 95].tolist()] for at in places]


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="work folder")
    parser.add_argument("--pools", default="pools", help="folder below it with the held-out documents")
    parser.add_argument("--data", type=Path, default=Path("src/isthmus/data"), help="where the models' folders are")
    results = Path("benchmarks/results/embedded_model.json")
    parser.add_argument("--out", type=Path, default=results, help="the evaluation's JSON")
    parser.add_argument("--count", type=int, default=20, help="prompts of each kind")
    parser.add_argument("--most", type=int, default=48, help="tokens of an answer at most")
    parser.add_argument("--k", type=int, default=4, help="tokens guessed at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of computation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {name: load_exported(options.data / KINDS[name].folder) for name in ("main", "draft")}
    tokenizer = Tokenizer.from_file(str(options.data / KINDS["main"].folder / "tokenizer.json"))
    stops = {tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|eos|>")}
    kinds = {DOCS: documents(options.work / options.pools, tokenizer, options.count)}
    kinds |= conversations(options.work, tokenizer, options.count)
    found: dict[str, Any] = {"k": options.k, "prompts_each": options.count, "seed": SEED}
    for kind, prompts in kinds.items():
        found[kind] = asdict(measure(models["main"], models["draft"], prompts, options.most, options.k, stops))
        print(kind, found[kind], flush=True)
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    report.setdefault("models", {}).setdefault("draft", {})["acceptance"] = found
    options.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
