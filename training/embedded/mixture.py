"""Tokenises the documents and the exercises into pools for training.

Exercises come in three sizes, one for each length of context that training goes
through; every one is made from a seed, so the pools can always be made again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer
from training.embedded import chat_data
from training.embedded.chat_render import Renderer
from training.embedded.drills import drill
from training.embedded.pools import DOCS, WEIGHT_UNIT, write_pool
from training.embedded.recall import Exercise, exercise
from training.embedded.world import World, load_world

SIZES = {"short": 650, "medium": 1400, "long": 3000, "full": 6400, "far": 3500}
_CHAT_WEIGHTS = (2 * WEIGHT_UNIT, 3)
_RECALL_WEIGHTS = (40, 2)
_DRILL_WEIGHTS = (24, 1)


def _size(rng: random.Random, most: int) -> int:
    least = 0.85 if most == SIZES["far"] else 0.15
    return int(most * (least + (1 - least) * rng.random()))


def chats(world: World, seed: int, most: int, characters: int) -> Iterator[str]:
    """Conversations of up to ``most`` characters each, so many characters in all."""
    rng, facts, renderer = random.Random(seed), chat_data.load_facts(), Renderer()
    while characters > 0:
        text = chat_data.lesson(world, rng, facts, renderer, _size(rng, most))
        characters -= len(text)
        yield text


def exercises(make: Exercise, world: World, seed: int, most: int, characters: int) -> Iterator[str]:
    """Exercises of up to ``most`` characters each, so many characters in all."""
    rng = random.Random(seed)
    while characters > 0:
        text = make(world, rng, _size(rng, most))
        characters -= len(text)
        yield text


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="work folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the exercises (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=10.0, help="text per kind and size (default: %(default)s)")
    options = parser.parse_args()
    work: Path = options.work
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    pools, world = work / "pools", load_world(work, held_out=False)
    documents = [json.loads(line) for line in (work / "docs.jsonl").read_text().splitlines()]
    for name, held_out in ((DOCS, False), (f"{DOCS}-held-out", True)):
        texts = [d["text"] for d in documents if d["held_out"] == held_out]
        print(name, write_pool(pools, name, tokenizer, texts, WEIGHT_UNIT, WEIGHT_UNIT), flush=True)
    for number, (size, most) in enumerate(SIZES.items()):
        seed, amount = options.seed * 1000 + number * 10, int(options.megabytes * 1e6)
        texts = list(chats(world, seed + 1, most, amount))
        print("chat", size, write_pool(pools, f"chat-{size}", tokenizer, texts, *_CHAT_WEIGHTS), flush=True)
        texts = list(exercises(exercise, world, seed + 2, most, amount))
        print("recall", size, write_pool(pools, f"recall-{size}", tokenizer, texts, *_RECALL_WEIGHTS), flush=True)
        texts = list(exercises(drill, world, seed + 3, most, amount))
        print("drill", size, write_pool(pools, f"drill-{size}", tokenizer, texts, *_DRILL_WEIGHTS), flush=True)


if __name__ == "__main__":
    main()
