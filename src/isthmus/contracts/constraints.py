"""Constraints: what an output must look like, decided before the first token and kept at every one.

A constraint travels with the request to the engine, whose grammar process turns it into masks over the vocabulary. The
text is bounded here; what it costs to compile and to follow is bounded there.
"""

import enum
import json

import msgspec

from isthmus.contracts.errors import InvalidInput, TooLarge

MAX_CONSTRAINT_BYTES = 256 * 1024
MAX_CHOICES = 1024


class ConstraintKind(enum.StrEnum):
    """The language that a constraint is written in."""

    JSON_SCHEMA = "json_schema"
    """A JSON Schema, as JSON text. `{}` allows any JSON value."""
    REGEX = "regex"
    """A regular expression that the whole output matches."""
    GRAMMAR = "grammar"
    """A context-free grammar in the Lark notation of llguidance (start rule: `start`)."""
    CHOICE = "choice"
    """A JSON array of strings; the output is one of them."""


class Constraint(msgspec.Struct, frozen=True):
    """What the output must look like. Raises `TooLarge` over `MAX_CONSTRAINT_BYTES`, `InvalidInput` for bad choices."""

    kind: ConstraintKind
    text: str

    def __post_init__(self) -> None:
        size = len(self.text.encode("utf-8", "surrogatepass"))
        if size > MAX_CONSTRAINT_BYTES:
            raise TooLarge(f"a constraint has {size} bytes, limit {MAX_CONSTRAINT_BYTES}", "constraint")
        if self.kind is ConstraintKind.CHOICE:
            self.choices()

    def choices(self) -> list[str]:
        """The strings of a CHOICE. Raises `InvalidInput`."""
        try:
            found = json.loads(self.text)
        except ValueError as error:
            raise InvalidInput("a choice is a JSON array of strings", "constraint") from error
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            raise InvalidInput("a choice is a JSON array of strings that are not empty", "constraint")
        if not 1 <= len(found) <= MAX_CHOICES:
            raise InvalidInput(f"choice has {len(found)} entries, accepted: 1 to {MAX_CHOICES}", "constraint")
        return found
