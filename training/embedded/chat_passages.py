"""Passages of a few sentences and questions about them; what a passage lacks is politely refused.

A passage tells facts of one or a few subjects; a question is answered with a sentence that tells the fact, in the
passage's words or in other ones. (A bare value would be a leap: which of all the names and numbers? A sentence gets
there word by word.) Names, values and figures are drawn anew, so nothing can be answered by heart.
"""

from __future__ import annotations

import functools
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.embedded.chat_recall import tokens_about
from training.embedded.chat_render import Message, Renderer
from training.embedded.recall import digits
from training.embedded.world import World

# It begins like no answer does: to refuse is one choice, made at the first token.
REFUSAL = "I cannot find that in the passage."
OTHER_WORDS = 0.25  # how often a passage says something in other words than the answer does
_INSTRUCTIONS = (
    "Answer from the passage.",
    "Answer the questions with the passage.",
    "Answer only from the passage. If it does not say, tell so.",
    "Read the passage and answer.",
    "Use the passage to answer.",
)
_HEADS = ("", "", "Passage: ", "Passage:\n", "Here is a passage: ", "Read this passage: ", "Context:\n", "Text: ")
_ASIDES = (
    "It rained all day.",
    "Nobody knows why.",
    "That is well known in the region.",
    "Many people find this strange.",
    "The newspapers wrote about it.",
    "Some say otherwise, but without proof.",
    "The weather was fine.",
    "This has not changed for a long time.",
    "There is more to tell, but not here.",
    "A neighbour told us so.",
    "The records are kept in good order.",
    "Visitors often ask about it.",
)


@dataclass(frozen=True)
class Kind:
    """What a passage may be about: how a subject is made, and its facts."""

    subjects: str
    facts: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Told:
    """A fact that a passage tells: of which subject, of which kind, which value, in which sentence, and the answer."""

    subject: str
    fact: int
    value: str
    sentence: str
    answer: str


@functools.cache
def kinds() -> tuple[Kind, ...]:
    """The kinds of subjects in ``passages.toml``."""
    found = tomllib.loads(Path(__file__).with_name("passages.toml").read_text())["kind"]
    return tuple(Kind(one["subjects"], tuple(one["fact"])) for one in found)


def person(world: World, rng: random.Random) -> str:
    """A first name, often with a surname."""
    name = world.pick(rng, "names")
    return f"{name} {world.pick(rng, 'surnames')}" if rng.random() < 0.5 else name


def _company(world: World, rng: random.Random) -> str:
    root = rng.choice([world.pick(rng, "surnames"), world.pick(rng, "projects"), world.coin(rng).capitalize()])
    return root + rng.choice(["", " Works", " and Sons", " Limited", " Foods", " Systems", " Trading"])


def _building(world: World, rng: random.Random) -> str:
    root = rng.choice([world.pick(rng, "surnames"), world.pick(rng, "projects"), world.pick(rng, "names")])
    return f"{root} {rng.choice(['Tower', 'Hall', 'Bridge', 'House', 'Museum', 'Library', 'Palace', 'Theatre'])}"


def _event(world: World, rng: random.Random) -> str:
    what = rng.choice(["dinner", "concert", "meeting", "market", "lecture", "party", "race", "exhibition", "course"])
    which = world.pick(rng, rng.choice(["projects", "adjectives", "hobbies", "months"]))
    return f"the {which} {what}"


def _money(_world: World, rng: random.Random) -> str:
    return f"{rng.randint(2, 990)} {rng.choice(['euros', 'dollars', 'pounds', 'crowns', 'francs'])}"


_MAKERS: dict[str, Callable[[World, random.Random], str]] = {
    "PERSON": person,
    "COMPANY": _company,
    "BUILDING": _building,
    "EVENT": _event,
    "THING": lambda world, rng: f"the {world.pick(rng, 'adjectives')} {world.pick(rng, 'objects')}",
    "PROJECT": lambda world, rng: rng.choice(["project {}", "Project {}", "{}"]).format(world.pick(rng, "projects")),
    "SHIP": lambda world, rng: f"the {rng.choice([world.pick(rng, 'projects'), world.pick(rng, 'names')])}",
    "PLACE": lambda world, rng: f"the {world.pick(rng, 'places')}",
    "LANGUAGE": lambda world, rng: world.pick(rng, "languages"),
    "YEAR": lambda _, rng: str(rng.randint(1400, 2049)),
    "NUMBER": lambda _, rng: digits(rng, 2, 5).lstrip("0") or "7",
    "COUNT": lambda _, rng: str(rng.randint(3, 999)),
    "TIME": lambda _, rng: f"{rng.randint(0, 23)}:{rng.choice(['00', '15', '30', '45', '10', '05'])}",
    "MONEY": _money,
    "COINED": lambda world, rng: world.coin(rng),
}


def make(world: World, rng: random.Random, what: str) -> str:
    """Something of a kind: a maker's name in capitals, or that of a word list."""
    return _MAKERS[what](world, rng) if what in _MAKERS else world.pick(rng, what)


def _told(rng: random.Random, fact: dict[str, Any], subject: str, value: str) -> tuple[str, str]:
    """A fact as a passage says it, and as an answer does: in the first of its wordings."""
    first, *others = fact["tell"]
    wording = rng.choice(others) if others and rng.random() < OTHER_WORDS else first
    sentence, answer = (capital(_articles(text.format(e=subject, v=value))) for text in (wording, first))
    return sentence, answer


def _articles(text: str) -> str:
    """``a`` before a vowel becomes ``an``."""
    words = text.split(" ")
    for at in range(len(words) - 1):
        if words[at] in ("a", "A") and words[at + 1][:1].lower() in tuple("aeiou"):
            words[at] += "n"
    return " ".join(words)


def _joined(first: str, second: str, subject: str, rng: random.Random) -> str | None:
    """Two sentences of one subject as one, if both begin with it: X lives in Rome and works as a baker."""
    start = subject[0].upper() + subject[1:] + " "
    if not (first.startswith(start) and second.startswith(start)) or rng.random() < 0.4:
        return None
    return f"{first[:-1]} and {second[len(start) :]}"


@dataclass(frozen=True)
class Passage:
    """A passage's text, what it tells, and the kind of its subjects."""

    text: str
    told: tuple[Told, ...]
    kind: Kind

    def subjects(self) -> list[str]:
        """The subjects it tells of."""
        return list(dict.fromkeys(told.subject for told in self.told))

    def question(self, rng: random.Random, told: Told) -> str:
        """One of the questions for a fact."""
        return capital(str(rng.choice(self.kind.facts[told.fact]["ask"])).format(e=told.subject))


def capital(text: str) -> str:
    """The text with a capital first."""
    return text[0].upper() + text[1:]


def open_kind(world: World, rng: random.Random) -> Kind:
    """A kind whose facts are made up: ``the harvest of project Comet is 914``."""
    facts = []
    for word in dict.fromkeys(world.pick(rng, rng.choice(["common", "objects"])) for _ in range(6)):
        tell = ["The {r} of {e} is {v}.", "{e} has the {r} {v}.", "For {e}, the {r} is {v}."]
        ask = ["What is the {r} of {e}?", "Which {r} does {e} have?"]
        values = rng.choice(["NUMBER", "common", "PERSON", "cities", "COINED", "colours", "YEAR"])
        facts.append(
            {
                "values": values,
                "tell": [t.replace("{r}", word) for t in tell],
                "ask": [a.replace("{r}", word) for a in ask],
            }
        )
    return Kind(rng.choice(["PERSON", "COMPANY", "THING", "PROJECT", "SHIP"]), tuple(facts))


def passage(world: World, rng: random.Random, sentences: int, kind: Kind | None = None) -> Passage:
    """A passage of about so many sentences about subjects of one kind, most often one of `passages.toml`."""
    kind = kind or (rng.choice(kinds()) if rng.random() < 0.85 else open_kind(world, rng))
    count = rng.choice([1, 1, 2, 2, 3, 4]) if sentences > 2 else 1
    subjects: dict[str, None] = {}
    while len(subjects) < count:
        candidate = make(world, rng, kind.subjects)
        # A name within another would make "Where does Anna live?" ambiguous.
        words = set(candidate.lower().split()) - {"the", "project"}
        if not any(words & set(other.lower().split()) for other in subjects):
            subjects[candidate] = None
    told: list[Told] = []
    for subject in subjects:
        facts = rng.sample(range(len(kind.facts)), min(max(1, len(kind.facts) - 2), max(1, round(sentences / count))))
        for at in facts:
            value = make(world, rng, kind.facts[at]["values"])
            told.append(Told(subject, at, value, *_told(rng, kind.facts[at], subject, value)))
    if rng.random() < 0.4:
        rng.shuffle(told)
    return Passage(_written(rng, told), tuple(told), kind)


def _written(rng: random.Random, told: list[Told]) -> str:
    """The sentences one after another, some of them joined, at times with a remark between."""
    parts: list[str] = []
    at = 0
    while at < len(told):
        here, following = told[at], told[at + 1] if at + 1 < len(told) else None
        both = following and here.subject == following.subject
        text = _joined(here.sentence, following.sentence, here.subject, rng) if both and following else None
        parts.append(text or here.sentence)
        at += 2 if text else 1
        if rng.random() < 0.15:
            parts.append(rng.choice(_ASIDES))
    return " ".join(parts)


def missing(world: World, rng: random.Random, given: Passage) -> str:
    """A question that the passage does not answer: of another subject, or of a fact it does not tell."""
    known = {(told.subject, told.fact) for told in given.told}
    asks = {ask for told in given.told for ask in given.kind.facts[told.fact]["ask"]}
    for _ in range(20):
        stranger = rng.random() < 0.35
        subject = make(world, rng, given.kind.subjects) if stranger else rng.choice(given.subjects())
        words = set(subject.lower().split()) - {"the", "project"}
        if stranger and any(words & set(other.lower().split()) for other in given.subjects()):
            continue
        at = rng.choice([t.fact for t in given.told]) if stranger else rng.randrange(len(given.kind.facts))
        ask = str(rng.choice(given.kind.facts[at]["ask"]))
        if (subject, at) not in known and (stranger or ask not in asks or len(given.subjects()) > 1):
            if not stranger and any(ask in given.kind.facts[t.fact]["ask"] for t in given.told if t.subject == subject):
                continue
            return capital(ask.format(e=subject))
    return capital(
        f"what is the {world.pick(rng, 'adjectives')} {world.pick(rng, 'objects')} of {given.subjects()[0]}?"
    )


def turns_about(world: World, rng: random.Random, given: Passage, most: int) -> list[tuple[str, str, str]]:
    """Questions, answers and the reasons for them, in any order; a quarter of them cannot be answered."""
    found = []
    for told in rng.sample(given.told, min(most, len(given.told))):
        found.append((given.question(rng, told), told.answer, f"The passage tells of {told.subject}."))
        if rng.random() < 0.38:
            found.append((missing(world, rng, given), REFUSAL, "The passage does not say it."))
    rng.shuffle(found)
    return list({question: (question, answer, reason) for question, answer, reason in found[:most]}.values())


def conversation(world: World, rng: random.Random, room: int) -> list[Message]:
    """A passage, in the system's or the user's words, and questions about it: about ``room`` tokens."""
    sentences = rng.randint(2, 4) if room < 170 else rng.randint(2, 8) if room < 500 else rng.randint(4, 12)
    given = passage(world, rng, sentences)
    text, instruction = given.text, rng.choice(_INSTRUCTIONS)
    turns = turns_about(world, rng, given, 12)
    left = room - tokens_about(text) - 24 * len(turns) - 20
    if left > 60 and rng.random() < 0.7:
        prose = world.fill(rng, int(left * 3.6 * rng.choice([1.0, 1.0, rng.random()])) + 30)
        text = rng.choice([f"{prose}\n{text}", f"{text}\n{prose}", f"{text} {prose}"])
    text = rng.choice(_HEADS) + text
    where = rng.random()
    messages: list[Message] = []
    if where < 0.35:
        messages.append(
            {"role": "system", "content": rng.choice([f"{instruction}\n{text}", f"{text}\n{instruction}", text])}
        )
    elif where < 0.55:
        messages.append({"role": "system", "content": instruction})
    thinking = rng.random() < 0.2
    for number, (question, answer, reason) in enumerate(turns):
        asked = question
        if number == 0 and 0.35 <= where < 0.8:
            asked = rng.choice([f"{text}\n{question}", f"{text}\nQuestion: {question}", f"{text}\n\n{question}"])
        elif number == 0 and where >= 0.8:
            asked = rng.choice([f"{instruction} {question}\n{text}", f"{question}\n{text}"])
        reply: Message = {"role": "assistant", "content": answer}
        if thinking and rng.random() < 0.8:
            reply["reasoning_content"] = reason
        messages += [{"role": "user", "content": asked}, reply]
    return messages


def lesson(world: World, rng: random.Random, renderer: Renderer, room: int) -> str:
    """One such conversation as marked text."""
    return renderer.lesson(conversation(world, rng, room))
