"""The bytes of every token: from a `tokenizer.json`, without the tokenizer itself.

Promise: a token's bytes do not depend on its neighbours, and the text of a sequence is the UTF-8 decoding (invalid
bytes replaced by U+FFFD, by maximal subparts, as Unicode 15 section 3.9 recommends) of the concatenated bytes, after
the lead rule of the decoder: SentencePiece models mark a word's start with U+2581 and drop the first one. So text can
be built a token at a time at constant cost, and equals the decoding of the whole.

Known decoders: ByteLevel (GPT-2, Llama 3, Qwen), and Metaspace or Replace + ByteFallback + Fuse + Strip (SentencePiece:
Llama 2, Mistral). Any other is refused by name.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from isthmus.contracts.errors import InvalidInput, ModelInvalid

MAX_TOKEN_ID = 4 * 1024 * 1024
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _TokenizerFile(msgspec.Struct):
    """The part of `tokenizer.json` that decoding needs; merges and normalisers are skipped over."""

    model: _Model
    added_tokens: list[_Added] = []
    decoder: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """How token strings become bytes.

    `byte_level`: the string is in GPT-2's alphabet of bytes. `byte_tokens`: `<0xXX>` is one byte. `replacements` are
    made in every token, in order. `strip`: up to so many leading spaces of the whole text are dropped. `bare_first`:
    the first token loses all its `marker`s (the Metaspace decoder).
    """

    byte_level: bool = False
    byte_tokens: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip: int = 0
    bare_first: bool = False
    marker: str = "\u2581"


def byte_alphabet() -> dict[str, int]:
    """GPT-2's reversible alphabet: each byte is a printable character (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    shifted = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + index): byte for index, byte in enumerate(shifted)})
    return table


_ALPHABET = byte_alphabet()


class Vocabulary:
    """Token ids to bytes. Immutable after it is built."""

    def __init__(self, tokens: dict[int, str], added: dict[int, str], special: Iterable[int], rule: DecodeRule) -> None:
        size = 1 + max(max(tokens, default=-1), max(added, default=-1))
        self.size = size
        self.rule = rule
        self._tokens: list[str | None] = [None] * size
        for token_id, text in tokens.items():
            self._tokens[token_id] = text
        self._added = added
        self._added_ids = {text: token_id for token_id, text in added.items()}
        self._special = frozenset(special)

    @classmethod
    def from_json(cls, data: bytes, source: str) -> "Vocabulary":
        """Parse `tokenizer.json`. Raises `ModelInvalid` naming `source` and the entry."""
        try:
            parsed = msgspec.json.decode(data, type=_TokenizerFile)
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
            raise ModelInvalid(f"{source} is not a tokenizer of the tokenizers library: {error}") from error
        if isinstance(parsed.model.vocab, dict):
            tokens = {token_id: text for text, token_id in parsed.model.vocab.items()}
        else:
            tokens = {token_id: text for token_id, (text, _) in enumerate(parsed.model.vocab)}
        added = {entry.id: entry.content for entry in parsed.added_tokens}
        for token_id in (*tokens, *added):
            if not 0 <= token_id <= MAX_TOKEN_ID:
                raise ModelInvalid(f"{source}: token id {token_id} is not within 0 to {MAX_TOKEN_ID}")
        if not tokens and not added:
            raise ModelInvalid(f"{source} has no tokens")
        special = (entry.id for entry in parsed.added_tokens if entry.special)
        return cls(tokens, added, special, decode_rule(parsed.decoder, source))

    def added_id(self, text: str) -> int | None:
        """The id of the added token whose text this is; None when it is not a token of its own."""
        return self._added_ids.get(text)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special

    def has(self, token_id: int) -> bool:
        """Whether a token has this id. Models may have more rows than their tokenizer has tokens."""
        return 0 <= token_id < self.size and (token_id in self._added or self._tokens[token_id] is not None)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token; nothing for an id that no token has."""
        added = self._added.get(token_id)
        if added is not None:
            return added.encode(errors="replace")
        text = self._tokens[token_id] if 0 <= token_id < self.size else None
        return b"" if text is None else self._convert(text)

    def first_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that is the first of its text (differs under `bare_first` only)."""
        text = self._tokens[token_id] if 0 <= token_id < self.size and token_id not in self._added else None
        if not self.rule.bare_first or text is None:
            return self.token_bytes(token_id)
        return self._convert(text.replace(self.rule.marker, ""))

    def check(self, token_ids: Sequence[int]) -> None:
        """Raises `InvalidInput` when an id is outside the vocabulary."""
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.size:
                raise InvalidInput(f"token id {token_id} at {index} is not within 0 to {self.size - 1}", "tokens")

    def _convert(self, text: str) -> bytes:
        rule = self.rule
        if rule.byte_level:
            try:
                return bytes([_ALPHABET[char] for char in text])
            except KeyError:
                # Not in the alphabet of bytes: the token is its own text, as the tokenizers library has it.
                return text.encode(errors="replace")
        if rule.byte_tokens and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match.group(1), 16)])
        for old, new in rule.replacements:
            text = text.replace(old, new)
        return text.encode(errors="replace")


def decode_rule(decoder: dict[str, Any] | None, source: str) -> DecodeRule:
    """Read the entry `decoder` of `tokenizer.json`. Raises `ModelInvalid` naming a decoder that is not known."""
    steps = list(_flatten(decoder, source))
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return DecodeRule(byte_level=True)
    byte_tokens, fused, strip, bare_first, marker = False, False, 0, False, "\u2581"
    replacements: list[tuple[str, str]] = []
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
                replacements.append((old, new))
            case {"type": "ByteFallback"}:
                byte_tokens = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if start == 0 or fused:
                strip = start
            case {"type": "Metaspace", "replacement": str(marker)}:
                replacements.append((marker, " "))
                bare_first = step.get("prepend_scheme", "always") != "never"
            case _:
                raise ModelInvalid(f"{source}: the decoder {_describe(step)} is not known to Isthmus")
    return DecodeRule(False, byte_tokens, tuple(replacements), strip, bare_first, marker)


def _flatten(decoder: dict[str, Any] | None, source: str) -> Iterable[dict[str, Any]]:
    """The steps of a decoder, a `Sequence` opened one level (no known tokenizer nests them deeper)."""
    if decoder is None or not isinstance(decoder.get("type"), str):
        raise ModelInvalid(f"{source}: decoder is missing or has no type")
    steps = decoder.get("decoders") if decoder["type"] == "Sequence" else [decoder]
    if not isinstance(steps, list) or not all(isinstance(s, dict) and isinstance(s.get("type"), str) for s in steps):
        raise ModelInvalid(f"{source}: decoder is a Sequence without a list of decoders")
    return steps


def _describe(step: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}={value!r}" for key, value in step.items() if key != "type")
    return f"{step['type']}({settings})"[:200]
