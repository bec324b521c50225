"""Plain-text exercises in recall: key-value pairs, passkeys and copying.

Each function returns one exercise of about ``size`` characters at most, with
the parts to be learned marked. What is to be recalled is random, so it can only
be found by looking back: that is what makes the model a probe for lost state.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from training.embedded.world import World, mark, spin

Exercise = Callable[[World, random.Random, int], str]

_LAYOUTS = (
    ("{k}: {v}", "{k}:", " {v}", "\n"),
    ("{k} = {v}", "{k} =", " {v}", "\n"),
    ("{k} -> {v}", "{k} ->", " {v}", "\n"),
    ('"{k}": "{v}"', '"{k}": "', '{v}"', ", "),
    ("The code for {k} is {v}.", "The code for {k} is", " {v}.", " "),
    ("The value of {k} is {v}.", "The value of {k} is", " {v}.", "\n"),
    ("{k} has the number {v}.", "{k} has the number", " {v}.", " "),
    ("{k} is in {v}.", "{k} is in", " {v}.", " "),
    ("{k} likes {v}.", "{k} likes", " {v}.", " "),
    ("- {k}, {v}", "- {k},", " {v}", "\n"),
    ("{k}: {v}", "Question: What is {k}?\nAnswer:", " {v}", "\n"),
    ("The secret of {k} is {v}.", "Q: What is the secret of {k}?\nA:", " {v}.", " "),
)


def digits(rng: random.Random, least: int = 3, most: int = 6) -> str:
    """A number of so many digits."""
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(least, most)))


def value(world: World, rng: random.Random) -> str:
    """Something to remember: a number, a word or two, or a short code."""
    kind = rng.random()
    if kind < 0.45:
        return digits(rng)
    if kind < 0.62:
        return world.pick(rng, "common")
    if kind < 0.7:
        return world.coin(rng)
    if kind < 0.82:
        return world.pick(rng, rng.choice(["cities", "foods", "animals", "colours", "places"]))
    if kind < 0.92:
        return f"{world.pick(rng, 'colours')} {world.pick(rng, 'animals')}"
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789") for _ in range(rng.randint(4, 6)))


def keys(world: World, rng: random.Random, count: int) -> list[str]:
    """So many different keys, all of one kind."""
    kind = rng.choice(["names", "projects", "common", "common", "thing", "numbered"])
    found: dict[str, None] = {}
    while len(found) < count:
        if kind == "thing":
            key = f"the {world.pick(rng, 'adjectives')} {world.pick(rng, 'objects')}"
        elif kind == "numbered":
            key = f"{rng.choice(['room', 'key', 'box', 'user', 'item'])} {rng.randint(1, 99)}"
        elif count > 20:
            key = world.pick(rng, "common")
        else:
            key = world.pick(rng, kind)
        found[key] = None
    return list(found)


def key_values(world: World, rng: random.Random, size: int) -> str:
    """Pairs, filler, then questions about some of the pairs in any order."""
    count = min(rng.randint(2, 12) if rng.random() < 0.6 else rng.randint(8, 30), max(2, size // 60))
    statement, question, answer, separator = rng.choice(_LAYOUTS)
    plain = rng.random() < 0.4
    table = {k: digits(rng, 4, 5) if plain else value(world, rng) for k in keys(world, rng, count)}
    lines = [statement.format(k=k, v=v) for k, v in table.items()]
    asked = rng.sample(list(table), count if rng.random() < 0.8 else max(1, count // 2))
    tail = ""
    for key in asked:
        tail += separator.replace(", ", ",\n") + question.format(k=key) + mark(answer.format(v=table[key]))
    room = size - len(tail) - sum(len(line) + 1 for line in lines)
    if room > 100 and rng.random() < 0.85:
        between = room if rng.random() < 0.6 else rng.randint(50, room)
        return separator.join(lines) + "\n\n" + world.fill(rng, between) + "\n" + tail
    return separator.join(lines) + "\n" + tail


def scattered(world: World, rng: random.Random, size: int) -> str:
    """Facts scattered through filler, asked for at the end."""
    statement, question, answer, _ = rng.choice([lay for lay in _LAYOUTS if lay[0].endswith(".")])
    count = rng.randint(1, max(1, min(6, size // 200)))
    table = {k: value(world, rng) for k in keys(world, rng, count)}
    room = max(0, size - 110 * count)
    parts = []
    for key, val in table.items():
        parts += [world.fill(rng, max(40, room // (count + 1))), statement.format(k=key, v=val)]
    parts.append(world.fill(rng, max(40, room // (count + 1))))
    asked = rng.sample(list(table), count)
    return " ".join(parts) + "".join("\n" + question.format(k=k) + mark(answer.format(v=table[k])) for k in asked)


def passkey(world: World, rng: random.Random, size: int) -> str:
    """A number hidden in filler and asked for at the end."""
    number, name = digits(rng, 4, 6), rng.choice(["pass key", "passkey", "pass key", "secret number", "password"])
    told = spin(
        f"{{The {name} is {number}.|The {name} is {number}. Remember it.|Remember that the {name} is {number}.|"
        f"The {name} is {number}. Remember it. {number} is the {name}.}}",
        rng,
    )
    asked = spin(
        f"{{What is the {name}?|Now, what is the {name}?|What was the {name}?}}"
        f"{{ The {name} is|\nThe {name} is|\nAnswer: the {name} is}}",
        rng,
    )
    before = int(max(0, size - 150) * rng.random())
    after = max(0, size - 150 - before)
    parts = [world.fill(rng, before)] if before > 30 else []
    parts += [told] + ([world.fill(rng, after)] if after > 30 else [])
    return f"{' '.join(parts)}\n{asked}" + mark(f" {number}.")


def copying(world: World, rng: random.Random, size: int) -> str:
    """A string of words, numbers or prose, and the same again."""
    kind, room = rng.random(), max(30, size // 2 - 40)
    if kind < 0.4:
        length = rng.randint(4, max(5, min(80, room // 8)))
        text = " ".join(world.pick(rng, "common") for _ in range(length))
    elif kind < 0.6:
        text = " ".join(digits(rng, 1, 5) for _ in range(rng.randint(2, max(3, min(30, room // 5)))))
    else:
        text = world.fill(rng, rng.randint(30, min(room, 600)))
    between = rng.choice(["\n", "\n\n", " | ", "\nAgain: ", "\nCopy: ", "\nRepeat: "])
    if rng.random() < 0.3 and size > 2 * len(text) + 300:
        between = "\n" + world.fill(rng, size - 2 * len(text) - 200) + "\n" + text[: text.find(" ", 12)]
        return text + between + mark(text[text.find(" ", 12) :])
    return text + between + mark(text)


def rows_again(world: World, rng: random.Random, size: int) -> str:
    """Rows of words, prose, and then the beginning of each row, to be ended as it was."""
    count = rng.randint(1, max(1, min(6, size // 350)))
    longest = max(5, min(20, size // (16 * count)))
    group = rng.choice(["common", "common", "common", "names", "objects"])
    rows = [[world.pick(rng, group) for _ in range(rng.randint(5, longest))] for _ in range(count)]
    lines = [" ".join(row) for row in rows]
    room = size - 2 * sum(len(line) for line in lines)
    prose = world.fill(rng, room if rng.random() < 0.7 else rng.randint(40, max(41, room))) + "\n" if room > 60 else ""
    again = [" ".join(row[:3]) + mark(" " + " ".join(row[3:])) for row in rng.sample(rows, count)]
    return "\n".join(lines) + "\n" + prose + "\n".join(again)


EXERCISES: tuple[tuple[Exercise, float], ...] = (
    (key_values, 0.5),
    (scattered, 0.14),
    (passkey, 0.14),
    (copying, 0.08),
    (rows_again, 0.14),
)


def exercise(world: World, rng: random.Random, size: int) -> str:
    """One exercise of a kind drawn by its share."""
    kinds, shares = zip(*EXERCISES, strict=True)
    chosen: Exercise = rng.choices(kinds, shares)[0]
    return chosen(world, rng, size)
