"""Whole conversations: facts told and asked for over turns, tables, documents and small talk."""

from __future__ import annotations

import functools
import random
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.embedded.chat_render import Message, Renderer
from training.embedded.chat_tasks import SYSTEMS, Turn, small_talk, task
from training.embedded.recall import digits, keys, value
from training.embedded.world import World

_TABLE_FORMS = (
    "{k}: {v}",
    "{k} = {v}",
    "The code for {k} is {v}.",
    "The value of {k} is {v}.",
    "{k} -> {v}",
    "{k} has {v}.",
)
_TABLE_QUESTIONS = (
    ("What is the value of {k}?", "The value of {k} is {v}."),
    ("What is the code for {k}?", "The code for {k} is {v}."),
    ("What is {k}?", "{k} is {v}."),
    ("Which value belongs to {k}?", "The value of {k} is {v}."),
    ("{k}?", "{v}"),
    ("Answer with the value only: {k}", "{v}"),
    ("Look up {k}.", "{k}: {v}"),
)


@dataclass
class Conversation:
    """A conversation while it is made up, and what has been told in it."""

    messages: list[Message] = field(default_factory=list)
    told: dict[int, str] = field(default_factory=dict)
    table: dict[str, str] = field(default_factory=dict)

    def add(self, turn: Turn) -> None:
        """One exchange."""
        self.messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]

    def size(self) -> int:
        """Characters so far."""
        return sum(len(m["content"]) + 10 for m in self.messages)


@functools.cache
def load_facts() -> list[dict[str, Any]]:
    """The kinds of facts that a user may tell."""
    found: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("facts.toml").read_text())["fact"]
    return found


def _roughen(text: str, rng: random.Random) -> str:
    """How people type: now and then without capitals or the last stop."""
    if rng.random() < 0.12:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    return text


def _tell(world: World, rng: random.Random, talk: Conversation, facts: list[dict[str, Any]], room: int) -> None:
    """The user tells one or more facts, at times within a longer text."""
    sentences, ack = [], "I will remember that."
    for at in rng.sample(range(len(facts)), rng.choice([1, 1, 2, 3])):
        fact = facts[at]
        known = digits(rng, 3, 6) if fact["values"] == "number" else world.pick(rng, fact["values"])
        talk.told[at] = known
        sentences.append(rng.choice(fact["tell"]).format(v=known))
        ack = rng.choice(fact["ack"]).format(v=known)
    if len(sentences) > 1:
        ack = rng.choice(["I will remember that.", "Thank you, I will remember that.", ack])
    text = _joined(sentences, rng)
    if room > 300 and rng.random() < 0.35:
        text = f"{world.fill(rng, rng.randint(40, room // 2))} {text} {world.fill(rng, rng.randint(40, room // 2))}"
        ack = rng.choice(["I have read it.", "Thank you, I have read it.", "I will remember that."])
    if rng.random() < 0.2:
        at = rng.choice(list(talk.told))
        text += rng.choice([" ", "\n"]) + rng.choice(facts[at]["ask"])
        ack = rng.choice(facts[at]["answer"]).format(v=talk.told[at])
    talk.add((text, ack))


def _joined(sentences: list[str], rng: random.Random) -> str:
    """Several statements as people run them together."""
    if len(sentences) > 1 and rng.random() < 0.4 and all(s.endswith(".") and s.count(".") == 1 for s in sentences[:2]):
        first, second, *rest = sentences
        second = second if second.startswith(("I ", "I'm")) else second[0].lower() + second[1:]
        sentences = [f"{first[:-1]} and {second}", *rest]
    return rng.choice(["", "", "", "", "Remember this: ", "Please remember this: "]) + " ".join(sentences)


def _ask(rng: random.Random, talk: Conversation, facts: list[dict[str, Any]]) -> None:
    """The user asks for a fact; one that was not told is not made up."""
    if talk.told and rng.random() < 0.93:
        at = rng.choice(list(talk.told))
        answer = rng.choice(facts[at]["answer"]).format(v=talk.told[at])
    else:
        at = rng.randrange(len(facts))
        shared = {facts[told]["unknown"] for told in talk.told}
        if at in talk.told or facts[at]["unknown"] in shared:
            return
        answer = facts[at]["unknown"]
    talk.add((_roughen(rng.choice(facts[at]["ask"]), rng), answer))


def _give_table(world: World, rng: random.Random, talk: Conversation, room: int) -> None:
    """The user gives pairs to remember, at times with a text after them, and may ask at once."""
    count = rng.randint(2, max(2, min(12, room // 40)))
    talk.table = {k: value(world, rng) for k in keys(world, rng, count)}
    form = rng.choice(_TABLE_FORMS)
    between = rng.choice(["\n", "\n", " ", " " if form.endswith(".") else ", "])
    text = between.join(form.format(k=k, v=v) for k, v in talk.table.items())
    text = rng.choice(["", "", "Remember these: ", "Here is a table:\n", "Please remember:\n", "Context:\n"]) + text
    if room > 400 and rng.random() < 0.4:
        text += "\n\n" + world.fill(rng, rng.randint(60, room - 200))
    if rng.random() < 0.5:
        question, answer = _table_question(rng, talk)
        talk.add((f"{text}\n{question}", answer))
    else:
        talk.add((text, rng.choice(["I will remember that.", "Thank you, I will remember that.", "I have read it."])))


def _table_question(rng: random.Random, talk: Conversation) -> Turn:
    question, answer = rng.choice(_TABLE_QUESTIONS)
    key = rng.choice(list(talk.table))
    return question.format(k=key), answer.format(k=key, v=talk.table[key])


def _read(world: World, rng: random.Random, talk: Conversation, room: int) -> None:
    """The user gives a text to read."""
    text = world.fill(rng, rng.randint(60, max(80, room)))
    ask = rng.choice(["Read this: ", "Here is a text: ", "Please read this text:\n", "", "Context: "])
    talk.add((ask + text, rng.choice(["I have read it.", "Thank you, I have read it.", "I have read the text."])))


def _system(world: World, rng: random.Random, talk: Conversation, facts: list[dict[str, Any]], room: int) -> None:
    """A system message, which may hold facts, a table or a document."""
    text = rng.choice(SYSTEMS)
    if rng.random() < 0.2:
        at = rng.choice([n for n, fact in enumerate(facts) if fact["tell"][0].startswith("The ")])
        talk.told[at] = digits(rng, 3, 6) if facts[at]["values"] == "number" else world.pick(rng, facts[at]["values"])
        text += rng.choice([" ", "\n"]) + facts[at]["tell"][0].format(v=talk.told[at])
    if rng.random() < 0.3:
        talk.table = {k: value(world, rng) for k in keys(world, rng, rng.randint(1, 6))}
        form = rng.choice(_TABLE_FORMS)
        text += "\n" + "\n".join(form.format(k=k, v=v) for k, v in talk.table.items())
    if room > 500 and rng.random() < 0.3:
        text += "\n" + world.fill(rng, rng.randint(60, room // 2))
    talk.messages.append({"role": "system", "content": text})


def conversation(world: World, rng: random.Random, facts: list[dict[str, Any]], size: int) -> list[Message]:
    """One conversation of about ``size`` characters; the longer ones lean on recall."""
    talk = Conversation()
    if rng.random() < 0.3:
        _system(world, rng, talk, facts, size)
    recall = rng.random() < 0.6
    for _ in range(rng.choice([1, 1, 2, 3, 4, 6, 8, 12])):
        room = size - talk.size()
        if room < 60:
            break
        move = rng.random() if recall else 1.0
        if move < 0.25 or (recall and not talk.told and not talk.table):
            if rng.random() < 0.6:
                _tell(world, rng, talk, facts, room)
            else:
                _give_table(world, rng, talk, room)
        elif move < 0.6:
            if talk.table and rng.random() < 0.6:
                talk.add(_table_question(rng, talk))
            else:
                _ask(rng, talk, facts)
        elif move < 0.7 and room > 200:
            _read(world, rng, talk, min(room - 100, 2500))
        else:
            question, answer = small_talk(world, rng) if rng.random() < 0.25 else task(world, rng)
            talk.add((_roughen(question, rng) if len(question) < 60 else question, answer))
    if recall and talk.table:
        talk.add(_table_question(rng, talk))
    if recall and talk.told:
        _ask(rng, talk, facts)
    return talk.messages


def lesson(world: World, rng: random.Random, facts: list[dict[str, Any]], renderer: Renderer, size: int) -> str:
    """One conversation as marked text."""
    return renderer.lesson(conversation(world, rng, facts, size))
