"""Readers that turn the files of a documentation package into plain English paragraphs."""

from __future__ import annotations

import gzip
import html.parser
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCKS = frozenset({"p", "li", "dd", "h1", "h2", "h3", "h4", "blockquote"})
_SKIPPED = frozenset({"script", "style", "pre", "table", "nav", "footer", "header", "svg", "head", "aside"})
_SPACES = re.compile(r"\s+")
_ARTICLES = ("a ", "an ", "the ", "any ", "someone ", "something ")


@dataclass(frozen=True)
class Gloss:
    """One dictionary sense: a word, what it means, and how often it was tagged in running text."""

    word: str
    part: str
    meaning: str
    count: int


class _Paragraphs(html.parser.HTMLParser):
    """Collects the text of block elements; tables, code and navigation are dropped."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._text: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 (the base's name)
        if tag in _SKIPPED:
            self._skipping += 1
        elif tag in _BLOCKS:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED:
            self._skipping = max(0, self._skipping - 1)
        elif tag in _BLOCKS:
            self._flush()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)

    def _flush(self) -> None:
        text = _SPACES.sub(" ", "".join(self._text)).replace("¶", "").strip()
        self._text.clear()
        if text:
            self.found.append(text)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English: long enough, mostly letters, ends as a sentence does."""
    if len(paragraph) < 40 or paragraph[-1] not in ".:!?)\"'":
        return False
    plain = sum(c.isalpha() or c == " " for c in paragraph)
    ascii_only = sum(ord(c) < 128 for c in paragraph)
    return plain > 0.86 * len(paragraph) and ascii_only > 0.98 * len(paragraph)


def read_html(path: Path) -> Iterator[str]:
    """The prose of one HTML page, as one document; nothing if there is hardly any."""
    parser = _Paragraphs()
    parser.feed(path.read_text("utf-8", errors="replace"))
    parser.close()
    kept = [p for p in parser.found if is_prose(p)]
    if sum(map(len, kept)) > 200:
        yield "\n".join(kept)


def read_plain(path: Path) -> Iterator[str]:
    """Paragraphs of a (compressed) text file that separates them by blank lines, ten to a document."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    paragraphs = (_SPACES.sub(" ", p).strip() for p in re.split(r"\n\s*\n", text))
    kept = [p for p in paragraphs if is_prose(p)]
    for start in range(0, len(kept), 10):
        yield "\n".join(kept[start : start + 10])


def _sentence(word: str, part: str, meaning: str) -> str:
    """A dictionary sense as a full sentence."""
    if part == "noun" and meaning.startswith(("a ", "an ")):
        article = "An" if word[0].lower() in "aeiou" else "A"
        return f"{article} {word} is {meaning}."
    if part == "verb":
        return f"To {word} is to {meaning}."
    return f"The word {word} means {meaning}."


def read_wordnet(path: Path) -> Iterator[str]:
    """Glosses and their examples as sentences, forty neighbouring senses to a document."""
    part = path.suffix[1:]
    sentences: list[str] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if line.startswith("  ") or " | " not in line:
            continue
        fields, gloss = line.split(" | ", 1)
        word = fields.split(" ")[4].split("(")[0].replace("_", " ")
        meaning, *examples = [g.strip() for g in gloss.strip().split('; "')]
        text = _sentence(word, part, meaning.split("; ")[0])
        text += "".join(f" {e.rstrip(chr(34)).capitalize()}." for e in examples if len(e) > 20)
        if word[0].islower() and text.isascii():
            sentences.append(text)
    for start in range(0, len(sentences), 40):
        yield "\n".join(sentences[start : start + 40])


def common_glosses(folder: Path, least: int = 3) -> Iterator[Gloss]:
    """First senses of nouns, verbs and adjectives that were tagged at least ``least`` times."""
    counts: dict[tuple[str, str], int] = {}
    kinds = {"1": "noun", "2": "verb", "3": "adj", "5": "adj"}
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, sense, count = line.split(" ")
        word, kind = key.split("%")
        if sense == "1" and kind[0] in kinds:
            counts[word, kinds[kind[0]]] = int(count)
    for part in ("noun", "verb", "adj"):
        yield from _first_senses(folder, part, {w: c for (w, p), c in counts.items() if p == part and c >= least})


def _first_senses(folder: Path, part: str, counts: dict[str, int]) -> Iterator[Gloss]:
    glosses: dict[str, str] = {}
    for line in (folder / f"data.{part}").read_text("utf-8", errors="replace").splitlines():
        if not line.startswith("  ") and " | " in line:
            glosses[line[:8]] = line.split(" | ", 1)[1]
    for line in (folder / f"index.{part}").read_text().splitlines():
        fields = line.split()
        if line.startswith("  ") or fields[0] not in counts or "_" in fields[0]:
            continue
        pointers = int(fields[3])
        meaning = re.sub(r"\s*\([^)]*\)", "", glosses[fields[6 + pointers]].split(";")[0]).strip()
        usable = meaning.isascii() and 12 <= len(meaning) <= 100 and fields[0].isalpha()
        if usable and (part != "noun" or meaning.startswith(_ARTICLES)):
            yield Gloss(fields[0], part, meaning, counts[fields[0]])
