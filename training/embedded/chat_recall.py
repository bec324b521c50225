"""Conversations that are dense in recall: a table or many facts, and question upon question about them.

One long context gives many lessons, each over a long distance: that is what the first edition lacked.
"""

from __future__ import annotations

import random
import re

from training.embedded.chat_render import Message, Renderer
from training.embedded.recall import digits, keys, value
from training.embedded.world import World, spin

_FORMS = (
    "{k}: {v}",
    "{k}: {v}",
    "{k} = {v}",
    "The code for {k} is {v}.",
    "The value of {k} is {v}.",
    "{k} -> {v}",
    "{k} has {v}.",
    "- {k}, {v}",
)
_QUESTIONS = (
    ("What is the value of {k}?", "The value of {k} is {v}."),
    ("What is the value of {k}?", "The value of {k} is {v}."),
    ("What is the code for {k}?", "The code for {k} is {v}."),
    ("What is {k}?", "{k} is {v}."),
    ("{k}?", "{v}"),
    ("Answer with the value only: {k}", "{v}"),
    ("Look up {k}.", "{k}: {v}"),
)
_ACKS = ("I will remember that.", "I will remember that.", "Thank you, I will remember that.", "I have read it.")
_SECRETS = ("pass key", "pass key", "pass key", "password", "secret number", "access code", "locker number", "pin")
_PIECE = re.compile(r"\d| ?[A-Za-z]+|[^\sA-Za-z\d]+|\n")


def tokens_about(text: str) -> int:
    """Roughly how many tokens a text has; a little more rather than less."""
    return int(1.12 * len(_PIECE.findall(text))) + 2


def _ask_all(rng: random.Random, table: dict[str, str], messages: list[Message], room: int) -> None:
    """Question after question, in any order, until there is no room. Now and then for a key that is not there."""
    mixed, form = rng.random() < 0.5, rng.choice(_QUESTIONS)
    for key in rng.sample(list(table), len(table)):
        question, answer = rng.choice(_QUESTIONS) if mixed else form
        turn = question.format(k=key), answer.format(k=key, v=table[key])
        room -= tokens_about(turn[0] + turn[1]) + 4
        if room < 0 and len(messages) > 2:
            return
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]


def table_talk(world: World, rng: random.Random, room: int) -> list[Message]:
    """A table of pairs, prose before or after it, and then a question for each pair."""
    most = max(3, min(24, room // 34))
    count = 8 if room > 220 and rng.random() < 0.3 else rng.randint(min(3, most), most)
    plain = rng.random() < 0.5
    table = {k: digits(rng, 4, 5) if plain else value(world, rng) for k in keys(world, rng, count)}
    form = rng.choice(_FORMS)
    between = rng.choice(["\n", "\n", "\n", " ", " " if form.endswith(".") else ", "])
    text = between.join(form.format(k=k, v=v) for k, v in table.items())
    asked = min(count, rng.randint(3, 12)) if room > 500 else count
    left = room - tokens_about(text) - 22 * asked
    messages: list[Message] = []
    if left > 40 and rng.random() < 0.85:
        prose = world.fill(rng, int(left * 3.6))
        text = f"{text}\n\n{prose}" if rng.random() < 0.75 else f"{prose}\n\n{text}"
    where = rng.random()
    if where < 0.2:
        messages.append({"role": "system", "content": text})
    else:
        text = rng.choice(["", "", "Remember these: ", "Here is a table:\n", "Please remember:\n"]) + text
        if where < 0.85:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": rng.choice(_ACKS)}]
    _ask_all(rng, table, messages, room - sum(tokens_about(m["content"]) + 2 for m in messages))
    if where >= 0.85:
        messages[0] = {"role": "user", "content": f"{text}\n{messages[0]['content']}"}
    return messages


def secrets_talk(world: World, rng: random.Random, room: int) -> list[Message]:
    """One or several secrets hidden in prose, each asked for at the end."""
    count = rng.choice([1, 1, 2, 3]) if room < 400 else rng.choice([1, 2, 3, 4])
    names = rng.sample(sorted(set(_SECRETS)), count) if count > 1 else [rng.choice(_SECRETS)]
    table = {name: digits(rng, 4, 6) for name in names}
    parts, left = [], max(0, room - 45 * count - 20)
    cuts = sorted(rng.random() for _ in range(count))
    for (name, number), cut, before in zip(table.items(), cuts, [0.0, *cuts], strict=False):
        if (cut - before) * left > 12:
            parts.append(world.fill(rng, int((cut - before) * left * 3.7)))
        told = f"{{The {name} is {number}.|The {name} is {number}. Remember it.|Remember that the {name} is {number}.}}"
        parts.append(spin(told, rng))
    if (1 - cuts[-1]) * left > 12:
        parts.append(world.fill(rng, int((1 - cuts[-1]) * left * 3.7)))
    turns = [(f"What is the {name}?", f"The {name} is {table[name]}.") for name in rng.sample(names, count)]
    text, messages = " ".join(parts), []
    if rng.random() < 0.5:
        turns[0] = (f"{text}\n{turns[0][0]}", turns[0][1])
    elif rng.random() < 0.3:
        messages.append({"role": "system", "content": text})
    else:
        turns.insert(0, (text, rng.choice(_ACKS)))
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def copy_talk(world: World, rng: random.Random, room: int) -> list[Message]:
    """Texts that are given and wanted back word for word, at once or after others."""
    count = rng.randint(1, max(1, min(4, room // 120)))
    texts = {}
    for number in range(count):
        size = rng.randint(3, max(4, min(40, room // (4 * count))))
        kind = rng.random()
        if kind < 0.5:
            text = " ".join(world.pick(rng, "common") for _ in range(size))
        elif kind < 0.7:
            text = " ".join(world.coin(rng) for _ in range(max(2, size // 3)))
        else:
            text = world.fill(rng, 4 * size)
        texts[f"{rng.choice(['note', 'text', 'line'])} {number + 1}"] = text
    messages: list[Message] = [
        {"role": "user", "content": "\n".join(f"{name}: {text}" for name, text in texts.items())},
        {"role": "assistant", "content": rng.choice(_ACKS)},
    ]
    for name in rng.sample(list(texts), count):
        ask = spin(f"{{Repeat {name}.|What does {name} say?|Copy {name}.|Read {name} to me.}}", rng)
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": texts[name]}]
    return messages


def lesson(world: World, rng: random.Random, renderer: Renderer, room: int) -> str:
    """One such conversation of about ``room`` tokens, as marked text."""
    make = rng.choices((table_talk, secrets_talk, copy_talk), (0.68, 0.22, 0.10))[0]
    return renderer.lesson(make(world, rng, room))
