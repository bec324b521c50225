"""Drills: short, dense exercises that teach a young model to look back at all.

Nothing but repetition helps in them, and almost every token is a lesson. They
come before the exercises in ``recall.py``, which are what is really wanted.
"""

from __future__ import annotations

import random

from training.embedded.recall import Exercise, digits
from training.embedded.world import World, mark


def echo(world: World, rng: random.Random, size: int) -> str:
    """A row of random words, again and again."""
    joint = rng.choice([" ", " ", ", ", "\n"])
    row = joint.join(world.spelled(rng) for _ in range(rng.randint(3, max(4, min(40, size // 18)))))
    again = max(1, size // (len(row) + 1) - 1)
    return row + "".join("\n" + mark(row) for _ in range(again))


def pairs_again(world: World, rng: random.Random, size: int) -> str:
    """The same pairs round after round, each time in another order."""
    numbers = rng.random() < 0.3
    table = {
        world.pick(rng, "common"): digits(rng, 1, 4) if numbers else world.pick(rng, "common")
        for _ in range(rng.randint(2, 10))
    }
    form = rng.choice(["{} {}", "{}: {}", "{} = {}", "{} is {}", "{} has {}"])
    joint = rng.choice(["\n", ". ", ", ", "; "])
    rounds = max(2, size // sum(len(k) + len(v) + 5 for k, v in table.items()))
    lines = [form.format(k, v) for k, v in table.items()]
    for _ in range(rounds - 1):
        order = rng.sample(list(table.items()), len(table))
        lines += [form.format(k, "\0").replace(" \0", mark(f" {v}")) for k, v in order]
    return joint.join(lines)


def numbers_again(_world: World, rng: random.Random, size: int) -> str:
    """A few numbers, again and again."""
    row = " ".join(digits(rng, 2, 6) for _ in range(rng.randint(1, max(2, min(8, size // 24)))))
    again = max(1, min(6, size // (len(row) * 3) - 1))
    return row + "".join("\n" + mark(row) for _ in range(again))


def respelled(world: World, rng: random.Random, size: int) -> str:
    """Words in a sentence, and the same words in quotes, in names or on lines, or the other way round.

    A word after a space and a word after a quote are different tokens: to copy from a request into JSON is to spell
    anew, which takes practice with every token that there is. So most words are entries of the tokenizer.
    """
    parts: list[str] = []
    while sum(map(len, parts)) < size - 40:
        words = list(dict.fromkeys(world.spelled(rng) for _ in range(rng.randint(2, 8))))
        if rng.random() < 0.25:
            words = [word.capitalize() for word in words]
        if rng.random() < 0.2:
            words = [f"{one} {other}" for one, other in zip(words[::2], words[1::2], strict=False)] or words
        spaced, quoted = " ".join(words), ", ".join(f'"{word}"' for word in words)
        kind = rng.random()
        if kind < 0.4:
            parts.append(f"Words: {spaced}\n[{mark(quoted)}]")
        elif kind < 0.65:
            names = [rng.choice(world.words["objects"]) for _ in words]
            said = "; ".join(f"{name} {word}" for name, word in zip(names, words, strict=True))
            pairs = ", ".join(
                f'"{name}": {mark(chr(34) + word + chr(34))}' for name, word in zip(names, words, strict=True)
            )
            parts.append(f"With {said}.\n{{{pairs}}}")
        elif kind < 0.75:
            parts.append("Words: " + spaced + "".join("\n" + mark(word) for word in words))
        elif kind < 0.85:
            parts.append(f"Words: {spaced}\n{mark('_'.join(words))}")
        else:
            parts.append(f"[{quoted}]\nWords:{mark(' ' + spaced)}")
    return "\n".join(parts)


DRILLS: tuple[tuple[Exercise, float], ...] = (
    (echo, 0.15),
    (pairs_again, 0.1),
    (numbers_again, 0.05),
    (respelled, 0.7),
)


def drill(world: World, rng: random.Random, size: int) -> str:
    """One drill of a kind drawn by its share."""
    kinds, shares = zip(*DRILLS, strict=True)
    chosen: Exercise = rng.choices(kinds, shares)[0]
    return chosen(world, rng, size)
