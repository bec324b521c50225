"""Held-out probes: recall, passkeys and copying at fixed lengths, and bits per byte.

A probe is answered if every token of its answer is the model's first choice, which
is what greedy decoding would write.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from training.embedded.chat_render import Renderer
from training.embedded.pools import Pool, parse_marks, weigh
from training.embedded.recall import digits, keys
from training.embedded.world import World, mark

Probe = Callable[[World, random.Random, Renderer, int], str]
Logits = Callable[[Tensor], Tensor]


def key_value(world: World, rng: random.Random, _renderer: Renderer, filler: int) -> str:
    """Eight pairs, filler, and one question in plain text."""
    table = {k: digits(rng, 4, 5) for k in keys(world, rng, 8)}
    asked = rng.choice(list(table))
    lines = "\n".join(f"The code for {k} is {v}." for k, v in table.items())
    return f"{lines}\n\n{world.fill(rng, filler)}\nThe code for {asked} is{mark(f' {table[asked]}.')}"


def key_value_chat(world: World, rng: random.Random, renderer: Renderer, filler: int) -> str:
    """The same in a conversation."""
    table = {k: digits(rng, 4, 5) for k in keys(world, rng, 8)}
    asked = rng.choice(list(table))
    lines = "\n".join(f"{k}: {v}" for k, v in table.items())
    messages = [
        {"role": "user", "content": f"{lines}\n\n{world.fill(rng, filler)}"},
        {"role": "assistant", "content": "I will remember that."},
        {"role": "user", "content": f"What is the value of {asked}?"},
    ]
    return renderer.prompt(messages).removeprefix("<|bos|>") + mark(f"The value of {asked} is {table[asked]}.")


def passkey(world: World, rng: random.Random, _renderer: Renderer, filler: int) -> str:
    """A passkey somewhere in filler, asked for in plain text."""
    number, before = digits(rng, 5, 5), int(filler * rng.random())
    text = f"{world.fill(rng, before)} The pass key is {number}. Remember it. {world.fill(rng, filler - before)}"
    return f"{text}\nWhat is the pass key? The pass key is{mark(f' {number}.')}"


def passkey_chat(world: World, rng: random.Random, renderer: Renderer, filler: int) -> str:
    """The same in a conversation."""
    number, before = digits(rng, 5, 5), int(filler * rng.random())
    text = f"{world.fill(rng, before)} The pass key is {number}. Remember it. {world.fill(rng, filler - before)}"
    prompt = renderer.prompt([{"role": "user", "content": f"{text}\nWhat is the pass key?"}])
    return prompt.removeprefix("<|bos|>") + mark(f"The pass key is {number}.")


def copying(world: World, rng: random.Random, _renderer: Renderer, filler: int) -> str:
    """Sixteen random words, filler, the first three words, and then the other thirteen."""
    words = [world.pick(rng, "common") for _ in range(16)]
    return f"{' '.join(words)}\n{world.fill(rng, filler)}\n{' '.join(words[:3])}{mark(' ' + ' '.join(words[3:]))}"


PROBES: dict[str, Probe] = {
    "recall": key_value,
    "recall_chat": key_value_chat,
    "passkey": passkey,
    "passkey_chat": passkey_chat,
    "copying": copying,
}


@dataclass(frozen=True)
class Answered:
    """How a probe went: exact answers and right tokens, out of how many."""

    exact: float
    tokens: float
    count: int


def _fit(
    probe: Probe, world: World, rng: random.Random, tokenizer: Tokenizer, length: int
) -> tuple[list[int], list[int]]:
    """One probe of at most ``length`` tokens and close to it: ids and the positions of the answer."""
    renderer, filler, state = Renderer(), length * 4, rng.getstate()
    while True:
        rng.setstate(state)
        text, spans = parse_marks("<|bos|>" + probe(world, rng, renderer, max(0, filler)))
        encoding = tokenizer.encode(text)
        if len(encoding.ids) <= length or filler < 0:
            weights = weigh(encoding.offsets, spans, 1, 0)
            return encoding.ids, np.flatnonzero(weights).tolist()
        filler -= (len(encoding.ids) - length) * 3 + 20


@torch.no_grad()
def ask(
    probe: Probe, world: World, tokenizer: Tokenizer, logits: Logits, length: int, count: int, seed: int
) -> Answered:
    """Asks ``count`` probes of ``length`` tokens, four at a time."""
    rng = random.Random(seed * 100_003 + length)
    made = [_fit(probe, world, rng, tokenizer, length) for _ in range(count)]
    exact = right = total = 0
    for at in range(0, count, 4):
        chunk = made[at : at + 4]
        tokens = torch.zeros(len(chunk), length, dtype=torch.long)
        for row, (ids, _) in enumerate(chunk):
            tokens[row, : len(ids)] = torch.tensor(ids[:length])
        best = logits(tokens).argmax(-1)
        for row, (ids, answer) in enumerate(chunk):
            hits = [int(best[row, p - 1]) == ids[p] for p in answer]
            exact, right, total = exact + all(hits), right + sum(hits), total + len(hits)
    return Answered(exact / count, right / max(1, total), count)


@torch.no_grad()
def bits_per_byte(pool: Pool, tokenizer: Tokenizer, logits: Logits, length: int, windows: int) -> float:
    """Held-out documents in windows of ``length`` tokens: bits for each byte of text."""
    bos, bits, size = tokenizer.token_to_id("<|bos|>"), 0.0, 0
    for at in range(0, min(windows * length, len(pool.tokens) - length), length):
        ids = pool.tokens[at : at + length].astype(np.int64)
        tokens = torch.from_numpy(ids)[None]
        inputs = torch.cat((torch.tensor([[bos]]), tokens[:, :-1]), 1)
        loss = torch.nn.functional.cross_entropy(logits(inputs)[0].float(), tokens[0], reduction="sum")
        bits += float(loss) / np.log(2)
        size += len(tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode())
    return bits / size
