"""Conversations in which tools are called: one call, two at once, one after another, or none where none is needed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from training.embedded.chat_recall import tokens_about
from training.embedded.chat_render import Message, Renderer, Tool
from training.embedded.chat_tasks import SYSTEMS, known_fact, small_talk
from training.embedded.chat_tools import Kind, Outcome, Request, chain, made_up, offer, outcome, request
from training.embedded.recall import digits
from training.embedded.world import World

NO_TOOL = "I have no tool for that."
_THENS = ("Then", "Then", "After that,", "And then")
_USES = ("with {p} set to that {f}", "with that {f} as the {p}", "using its {f} as {p}", "with the {f} you got as {p}")


@dataclass
class Talk:
    """A conversation while it is made up: what was said, what is offered, and whether the assistant thinks."""

    kinds: list[Kind]
    thinking: bool
    messages: list[Message] = field(default_factory=list)

    def user(self, text: str) -> None:
        """The user speaks."""
        self.messages.append({"role": "user", "content": text})

    def assistant(self, text: str, reason: str, calls: tuple[Request, ...] = ()) -> None:
        """The assistant speaks, or calls tools."""
        message: Message = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [asked.call() for asked in calls]
        if self.thinking:
            message["reasoning_content"] = reason
        self.messages.append(message)

    def tool(self, found: Outcome) -> None:
        """A tool answers."""
        self.messages.append({"role": "tool", "content": found.content})

    def call(self, *asked: Request) -> None:
        """The assistant calls tools, all at once."""
        kind = asked[0].kind
        self.assistant("", f"The user asks for this: {kind.about}. The tool {kind.name} can do it.", asked)

    def tools(self) -> list[Tool]:
        """The tools that are offered."""
        return [kind.tool() for kind in self.kinds]


def offered(world: World, rng: random.Random, count: int) -> list[Kind]:
    """So many tools that cannot be taken for one another: no two share a name, a description or their results."""
    found: list[Kind] = []
    while len(found) < count:
        kind = offer(rng) if rng.random() < 0.5 else made_up(world, rng)
        words = set(kind.about.lower().split())
        # Two tools about one city and one person differ; two that do the same to the same do not.
        alike = any(
            len(words & set(k.about.lower().split()) - _PLAIN) > 1 or k.result[0] == kind.result[0] != "ANY"
            for k in found
            if k.pattern == kind.pattern
        )
        if not alike and kind.name not in {k.name for k in found}:
            found.append(kind)
    return found


_PLAIN = {"a", "an", "the", "of", "use", "this", "to", "get", "tells", "in", "so", "many"}


def one_call(world: World, rng: random.Random, talk: Talk) -> None:
    """A request, a call, its result, an answer."""
    asked = request(world, rng, rng.choice(talk.kinds))
    found = outcome(world, rng, asked)
    talk.user(asked.text)
    talk.call(asked)
    talk.tool(found)
    talk.assistant(found.answer, "The tool has answered.")


def two_at_once(world: World, rng: random.Random, talk: Talk) -> None:
    """One tool asked for twice in a request: both calls in one message."""
    kind = rng.choice(talk.kinds)
    first, second = request(world, rng, kind), request(world, rng, kind)
    if first.arguments == second.arguments:
        return
    results = outcome(world, rng, first), outcome(world, rng, second)
    talk.user(f"{first.text} {rng.choice(['Also:', 'And:', 'Also,'])} {second.text}")
    talk.call(first, second)
    for found in results:
        talk.tool(found)
    talk.assistant(f"{results[0].answer} {results[1].answer}", "The tools have answered.")


def one_after_another(world: World, rng: random.Random, talk: Talk) -> None:
    """Two tools for one request; often the second needs what the first returned."""
    if len(talk.kinds) < 2:
        return one_call(world, rng, talk)
    one, other = rng.sample(talk.kinds, 2)
    first = request(world, rng, one)
    found = outcome(world, rng, first)
    second = _using(rng, found, request(world, rng, other)) if rng.random() < 0.6 else request(world, rng, other)
    last = outcome(world, rng, second)
    text = second.text if second.text.startswith("I ") else second.text[0].lower() + second.text[1:]
    talk.user(f"{first.text} {rng.choice(_THENS)} {text}")
    talk.call(first)
    talk.tool(found)
    if found.content.startswith('{"error"'):
        return talk.assistant(found.answer, "The tool has failed.")
    talk.call(second)
    talk.tool(last)
    talk.assistant(f"{found.answer} {last.answer}", "The tools have answered.")
    return None


def chained(world: World, rng: random.Random) -> Talk:
    """A new conversation about a request that needs two everyday tools, others perhaps offered with them."""
    given = chain(world, rng)
    talk = Talk([given.first.kind, given.second], rng.random() < 0.2)
    more = offered(world, rng, 1)
    taken = {kind.name for kind in talk.kinds}
    about = {kind.about for kind in talk.kinds}
    if rng.random() < 0.3 and more[0].name not in taken and more[0].about not in about and not more[0].pattern:
        talk.kinds += more
    rng.shuffle(talk.kinds)
    found = outcome(world, rng, given.first, plain=True)
    talk.user(given.text)
    talk.call(given.first)
    talk.tool(found)
    second = given.then(found)
    last = outcome(world, rng, second)
    talk.call(second)
    talk.tool(last)
    talk.assistant(f"{found.answer} {last.answer}", "The tools have answered.")
    return talk


def _using(rng: random.Random, found: Outcome, plain: Request) -> Request:
    """The request again, a value of it replaced by one that the first tool returned."""
    texts = [p for p in plain.kind.parameters if p.kind == "string" and not p.choices and p.name in plain.arguments]
    fields = [name for name, value in found.fields.items() if isinstance(value, str)]
    if plain.kind.pattern or not texts or not fields:
        return plain
    chosen, name = rng.choice(texts), rng.choice(fields)
    others = {p for p in plain.arguments if p != chosen.name}
    if others:
        return plain
    use = rng.choice(_USES).format(p=chosen.name, f=name.replace("_", " "))
    ask = rng.choice(plain.kind.asks)
    end = "?" if ask.startswith(("What", "Can")) else "."
    return Request(plain.kind, f"{ask} {use}{end}", {chosen.name: found.fields[name]})


def no_call(world: World, rng: random.Random, talk: Talk) -> None:
    """Something that needs no tool, or for which there is none."""
    kind = rng.random()
    if kind < 0.35:
        question, answer = small_talk(world, rng)
    elif kind < 0.6:
        question, answer = known_fact(world, rng)
    elif kind < 0.75:
        number = digits(rng, 3, 5)
        question, answer = f"The pass key is {number}. Remember it.", f"I will remember that the pass key is {number}."
    else:
        strange = offered(world, rng, 1)[0]
        words = set(strange.about.lower().split()) - _PLAIN
        if any(words & set(known.about.lower().split()) for known in talk.kinds):
            return
        talk.user(request(world, rng, strange).text)
        talk.assistant(NO_TOOL, "No tool can do that.")
        return
    talk.user(question)
    talk.assistant(answer, "No tool is needed.")


def conversation(world: World, rng: random.Random, room: int) -> Talk:
    """One conversation of about ``room`` tokens."""
    if rng.random() < 0.08:
        return chained(world, rng)
    most = 2 if room < 130 else 3 if room < 500 else 5
    talk = Talk(offered(world, rng, rng.choice([1, most, most, rng.randint(1, most)])), rng.random() < 0.2)
    if rng.random() < 0.3:
        talk.messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    left = room - sum(48 + 8 * len(kind.parameters) for kind in talk.kinds)
    if left > 300 and rng.random() < 0.5:
        text = world.fill(rng, int(rng.random() * (left - 200) * 3.6) + 60)
        talk.user(f"Read this: {text}")
        talk.assistant("I have read it.", "No tool is needed.")
        left -= tokens_about(text)
    moves = (one_call, one_after_another, two_at_once, no_call)
    while True:
        before = len(talk.messages)
        rng.choices(moves, (0.64, 0.12, 0.05, 0.19))[0](world, rng, talk)
        left -= sum(tokens_about(m["content"]) + 12 + 16 * len(m.get("tool_calls", ())) for m in talk.messages[before:])
        if left < 90 and any(m["role"] == "assistant" for m in talk.messages):
            return talk


def lesson(world: World, rng: random.Random, renderer: Renderer, room: int) -> str:
    """One such conversation as marked text."""
    talk = conversation(world, rng, room)
    return renderer.lesson(talk.messages, talk.tools())
