"""What the synthetic exercises draw from: word lists, knowledge, glosses and filler text."""

from __future__ import annotations

import json
import random
import re
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.embedded.extract import Gloss

MARK_OPEN, MARK_CLOSE = "\x01", "\x02"
_CHOICE = re.compile(r"\{([^{}]*)\}")
_ONSETS = (*"bcdfghjklmnprstvwz", "br", "cr", "dr", "fl", "gr", "pl", "qu", "st", "tr")
_NUCLEI = (*"aeiou", "ai", "ea", "oo")
_CODAS = ("", "", "", "l", "m", "n", "r", "s", "t", "x", "nd", "rk", "st")
_COINED_HELD_OUT = 5  # one coined word in so many is for evaluation only
# The lists are short: a model that sees nothing else learns their words by heart instead of copying what it reads, and
# fails at any other. So in training a word of a list often gives way to any word of the prose, or to a coined one.
OPENNESS = 0.6
_CLOSED = frozenset({"days", "months", "weather", "subjects", "spelled", "drinks"})
_WORD = re.compile(r"[A-Za-z]{3,12}")


@dataclass(frozen=True)
class World:
    """Everything an exercise may mention: of one split, words and documents for training or for evaluation only.

    ``prose`` is every word of the documents, ``entries`` those that the tokenizer knows as one token after a space and
    ``endings`` its other tokens of letters (of either split: to spell is not to know); all for training alone.
    """

    words: dict[str, list[str]]
    knowledge: dict[str, Any]
    intents: list[dict[str, list[str]]]
    glosses: list[Gloss]
    filler: list[str]
    held_out: bool = False
    prose: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()

    def coin(self, rng: random.Random) -> str:
        """A word that does not exist, of one split: `travex`, `mondirk`."""
        while True:
            count = rng.choice([2, 2, 3])
            word = "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) for _ in range(count)) + rng.choice(_CODAS)
            if (zlib.crc32(word.encode()) % _COINED_HELD_OUT == 0) == self.held_out:
                return word

    def spelled(self, rng: random.Random) -> str:
        """A word to copy letter by letter: an entry of the tokenizer, at times with an ending, or any other word.

        So no token of letters goes without practice: one that was never to be written would never be.
        """
        kind = rng.random()
        if not self.entries or kind > 0.85:
            return self.coin(rng) if rng.random() < 0.4 else self.pick(rng, "common")
        word = rng.choice(self.entries)
        return word if kind < 0.5 else word.rstrip("s") + rng.choice(self.endings)

    def pick(self, rng: random.Random, group: str) -> str:
        """One word of a named list, or in training often another in its place, written alike."""
        word = rng.choice(self.words[group])
        if not self.prose or group in _CLOSED or rng.random() >= OPENNESS:
            return word
        other = rng.choice(self.prose) if rng.random() < 0.7 else self.coin(rng)
        other += "s" if group == "foods" and not other.endswith("s") else ""
        return other.capitalize() if word[0].isupper() else other

    def fill(self, rng: random.Random, characters: int) -> str:
        """About that many characters of consecutive prose, cut at a sentence."""
        parts: list[str] = []
        at = rng.randrange(len(self.filler))
        while characters > 0:
            sentence = self.filler[at % len(self.filler)]
            if parts and len(sentence) > characters + 80:
                break
            parts.append(sentence)
            characters -= len(sentence) + 1
            at += 1
        return " ".join(parts)


def mark(answer: str) -> str:
    """Marks the part of an exercise that is to be learned; the rest is only its setting."""
    return f"{MARK_OPEN}{answer}{MARK_CLOSE}"


def spin(pattern: str, rng: random.Random) -> str:
    """One reading of a pattern in which ``{a|b}`` stands for a choice."""
    return _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), pattern)


def article(word: str) -> str:
    """A noun with its indefinite article."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def listing(words: list[str]) -> str:
    """Words as an English list: ``a, b and c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def pairs(text: str) -> list[tuple[str, str]]:
    """Reads ``a: b, c: d``."""
    return [(a.strip(), b.strip()) for a, b in (item.split(":") for item in text.split(","))]


def _sentences(texts: list[str]) -> list[str]:
    found = []
    for text in texts:
        for paragraph in text.split("\n"):
            found += [s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph) if 20 < len(s) < 400]
    return found


def _lists(path: Path) -> dict[str, list[str]]:
    return {name: [w.strip() for w in line.split(",")] for name, line in tomllib.loads(path.read_text()).items()}


def word_lists(glosses: list[Gloss], held_out: bool) -> dict[str, list[str]]:
    """The word lists of one split. No word of a list that has a held-out part is in both (whatever its case)."""
    here = Path(__file__).parent
    words, kept = _lists(here / "lexicon.toml"), _lists(here / "held_out.toml")
    words["common"] = sorted({g.word for g in glosses if 3 <= len(g.word) <= 10})
    if held_out:
        return {**words, **kept}
    withheld = {word.lower() for group in kept.values() for word in group}
    return {name: [w for w in group if w.lower() not in withheld] for name, group in words.items()}


def prose_words(texts: list[str]) -> tuple[str, ...]:
    """The words of some texts in lower case, but for those that are kept for evaluation, and their plurals."""
    kept = {word.lower() for group in _lists(Path(__file__).parent / "held_out.toml").values() for word in group}
    kept |= {f"{word}s" for word in kept}
    found = {word.lower() for text in texts for word in _WORD.findall(text)}
    return tuple(sorted(found - kept))


def load_world(work: Path, held_out: bool) -> World:
    """Reads the lists beside this file, and glosses and filler from the work folder."""
    here = Path(__file__).parent
    knowledge = tomllib.loads((here / "knowledge.toml").read_text())
    intents = tomllib.loads((here / "smalltalk.toml").read_text())["intent"]
    glosses = [Gloss(**json.loads(line)) for line in (work / "glosses.jsonl").read_text().splitlines()]
    documents = [json.loads(line) for line in (work / "docs.jsonl").read_text().splitlines()]
    filler = _sentences([d["text"] for d in documents if d["held_out"] == held_out])
    prose = () if held_out else prose_words(filler)
    return World(word_lists(glosses, held_out), knowledge, intents, glosses, filler, held_out, prose)
