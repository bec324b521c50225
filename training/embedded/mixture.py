"""Tokenises the documents and the exercises into pools for training.

Exercises come in several sizes, for the lengths of context that training goes through; every one is made from a
seed, so the pools can always be made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from training.embedded import chat_calls, chat_data, chat_passages, chat_recall
from training.embedded.chat_render import Renderer
from training.embedded.drills import drill
from training.embedded.pools import DOCS, WEIGHT_UNIT, write_pool
from training.embedded.recall import exercise
from training.embedded.world import World, load_world

# Tokens of an exercise at most, and the least share of that; with bos and eos the longest still fits its context.
SIZES = {"short": (240, 0.2), "medium": (490, 0.25), "long": (800, 0.4), "far": (1000, 0.8)}
_CHARACTERS = 3.4  # of a token, in exercises
# What passages and tools ask for is a choice among things that stand near, so most of them are short: a long one has
# fewer choices for its tokens, and its later calls may be copied from the earlier ones.
BRIEF = 0.85
_SPACE = "\u0120"  # as byte-level vocabularies write it
_DOCS_WEIGHTS = (WEIGHT_UNIT // 2, WEIGHT_UNIT // 2)

Make = Callable[[World, random.Random, Renderer, int], str]


def _chat(world: World, rng: random.Random, renderer: Renderer, room: int) -> str:
    facts = chat_data.load_facts()
    return chat_data.lesson(world, rng, facts, renderer, int(room * _CHARACTERS))


# What each kind is made by, the weights (in sixteenths) of what is to be learned and of its setting, and its part of
# the text.
KINDS: dict[str, tuple[Make, tuple[int, int], float]] = {
    "chat": (_chat, (32, 0), 1.0),
    "table": (chat_recall.lesson, (36, 0), 1.4),
    "passage": (chat_passages.lesson, (36, 0), 1.4),
    "tools": (chat_calls.lesson, (32, 0), 1.6),
    "recall": (lambda world, rng, _, room: exercise(world, rng, int(room * _CHARACTERS)), (40, 0), 1.0),
    "drill": (lambda world, rng, _, room: drill(world, rng, int(room * _CHARACTERS * 0.75)), (24, 0), 0.5),
}


def lessons(
    make: Make, world: World, seed: int, size: tuple[int, float], characters: int, brief: float = 0.0
) -> Iterator[str]:
    """Marked exercises of one kind and size, so many characters in all; a share of them brief, whatever the size."""
    rng, renderer = random.Random(seed), Renderer()
    while characters > 0:
        most, least = SIZES[rng.choice(["short", "short", "medium"])] if rng.random() < brief else size
        text = make(world, rng, renderer, int(most * (least + (1 - least) * rng.random())))
        characters -= len(text)
        yield text


def with_tokens(world: World, tokenizer: Tokenizer) -> World:
    """The world with the tokens of letters, three or more: those that begin a word after a space, and the others."""
    words = [entry.removeprefix(_SPACE) for entry in tokenizer.get_vocab() if entry.startswith(_SPACE)]
    others = [entry for entry in tokenizer.get_vocab() if entry.islower()]
    entries, endings = (
        sorted(w for w in found if len(w) > 2 and w.isascii() and w.isalpha()) for found in (words, others)
    )
    return dataclasses.replace(world, entries=tuple(entries), endings=tuple(endings))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="work folder (default: %(default)s)")
    parser.add_argument("--pools", default="pools", help="folder for the pools below it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the exercises (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=2.0, help="text per kind and size (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="make these kinds alone (default: all)")
    options = parser.parse_args()
    work: Path = options.work
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    pools = work / options.pools
    world = with_tokens(load_world(work, held_out=False), tokenizer)
    for name, held_out in ((DOCS, False), (f"{DOCS}-held-out", True)):
        if not options.only or DOCS in options.only:
            documents = [json.loads(line) for line in (work / "docs.jsonl").read_text().splitlines()]
            texts = [d["text"] for d in documents if d["held_out"] == held_out]
            print(name, write_pool(pools, name, tokenizer, texts, _DOCS_WEIGHTS), flush=True)
    for number, (kind, (make, weights, part)) in enumerate(KINDS.items()):
        for step, (size, room) in enumerate(SIZES.items()):
            if options.only and kind not in options.only:
                continue
            seed, amount = options.seed * 1000 + number * 10 + step, int(options.megabytes * 1e6 * part)
            texts = list(lessons(make, world, seed, room, amount, BRIEF if kind in ("passage", "tools") else 0.0))
            # A sample that is a little longer than meant still fits, as long as it leaves room for bos and eos.
            most = room[0] + 20
            print(kind, size, write_pool(pools, f"{kind}-{size}", tokenizer, texts, weights, most), flush=True)


if __name__ == "__main__":
    main()
