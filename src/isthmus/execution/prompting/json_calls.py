"""Reads JSON a character at a time: a value, and the object that describes a call.

Values are followed by their brackets and strings only: arguments are handed on as the model wrote them, and judged by
whoever calls the tool. The object around them is read by the grammar of JSON (RFC 8259), its own keys decoded.
"""

import enum
import json
from collections.abc import Callable, Collection

from isthmus.contracts.prompting import MAX_TOOL_NAME_CHARS
from isthmus.execution.prompting.findings import Findings

MAX_DEPTH = 512
MAX_HELD_CHARS = 32 * 1024
_WHITE = " \t\n\r"
_SCALAR = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-.")
_BETWEEN = _SCALAR | frozenset(" \t\n\r,:")
_CLOSES = {"{": "}", "[": "]"}


class Step(enum.Enum):
    """What became of one more character. BROKEN: it does not fit, and was not taken."""

    MORE = enum.auto()
    LAST = enum.auto()
    BROKEN = enum.auto()


class _Into(enum.Enum):
    """What is done with the characters of a value."""

    NOTHING = enum.auto()
    NAME = enum.auto()
    HELD = enum.auto()
    GIVEN = enum.auto()


class JsonValue:
    """Follows an object, an array or a string to its end. Scalars have none of their own: see `is_scalar`."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._string = False
        self._escaped = False

    @staticmethod
    def is_scalar(first: str) -> bool:
        """Whether a value that starts so is a number or a literal, which ends before what cannot be part of it."""
        return first in _SCALAR

    def push(self, char: str) -> Step:
        """Take one more character."""
        if self._string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._string = False
                return Step.MORE if self._open else Step.LAST
            return Step.MORE
        if char == '"':
            self._string = True
        elif char in _CLOSES:
            if len(self._open) >= MAX_DEPTH:
                return Step.BROKEN
            self._open.append(_CLOSES[char])
        elif self._open and char == self._open[-1]:
            self._open.pop()
            return Step.MORE if self._open else Step.LAST
        elif not self._open or char not in _BETWEEN:
            return Step.BROKEN
        return Step.MORE


def decode_string(text: str) -> str | None:
    """The string that a JSON string literal stands for; None when it is none or has half a surrogate pair.

    Raw control characters are let pass.
    """
    try:
        value = json.loads(text, strict=False)
        str(value).encode()
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def is_tool_name(name: str) -> bool:
    """Whether a tool can have this name."""
    return 1 <= len(name) <= MAX_TOOL_NAME_CHARS and name.isprintable()


class CallObject:
    """One object with `name` and `arguments` (or `parameters`), given to `found` as a call as it comes.

    `early`: the call is announced when its name is known; else when its arguments have begun too, so that an object
    which merely has a name stays text. `names`: if given, other names are no call. Until the call is announced `raw`
    holds what was read, at most `MAX_HELD_CHARS`. Keys other than those two are skipped; of keys that come twice, the
    first counts. Arguments written as a string of JSON are unpacked; missing ones, and null, are `{}`.
    """

    def __init__(self, found: Findings, *, early: bool, names: Collection[str] = ()) -> None:
        self._found = found
        self._early = early
        self._names = names
        self.announced = False
        self._raw: list[str] = []
        self._name: str | None = None
        self._begun = False
        self._pending: list[str] = []
        self._key = ""
        self._text: list[str] = []
        self._value = JsonValue()
        self._into = _Into.NOTHING
        self._state: Callable[[str], Step] = self._start

    @property
    def raw(self) -> str:
        """What was read of a call that is not announced."""
        return "".join(self._raw)

    def push(self, char: str) -> Step:
        """Take one more character. LAST: the object is complete and was a call."""
        if not self.announced and len(self._raw) >= MAX_HELD_CHARS:
            return Step.BROKEN
        step = self._state(char)
        if step is Step.BROKEN:
            self.finish()
        elif not self.announced:
            self._raw.append(char)
        return step

    def finish(self) -> None:
        """Nothing more comes, or nothing that fits: arguments that were held to be unpacked are given as they are."""
        if self.announced and self._into is _Into.HELD:
            self._found.arguments("".join(self._text))
            self._into = _Into.NOTHING

    def _start(self, char: str) -> Step:
        self._state = self._first_key
        return Step.MORE if char == "{" else Step.BROKEN

    def _first_key(self, char: str) -> Step:
        return self._end() if char == "}" else self._next_key(char)

    def _next_key(self, char: str) -> Step:
        if char == '"':
            self._text = [char]
            self._value = JsonValue()
            self._value.push(char)
            self._state = self._in_key
            return Step.MORE
        return Step.MORE if char in _WHITE else Step.BROKEN

    def _in_key(self, char: str) -> Step:
        self._text.append(char)
        if self._value.push(char) is Step.LAST:
            key = decode_string("".join(self._text))
            if key is None:
                return Step.BROKEN
            self._key = key
            self._state = self._colon
        elif len(self._text) > MAX_HELD_CHARS:
            return Step.BROKEN
        return Step.MORE

    def _colon(self, char: str) -> Step:
        if char == ":":
            self._state = self._before_value
            return Step.MORE
        return Step.MORE if char in _WHITE else Step.BROKEN

    def _before_value(self, char: str) -> Step:
        if char in _WHITE:
            return Step.MORE
        self._text = []
        self._value = JsonValue()
        is_name = self._key == "name" and self._name is None
        is_arguments = self._key in ("arguments", "parameters") and not self._begun
        if is_name and char != '"':
            return Step.BROKEN
        self._into = _Into.NAME if is_name else _Into.NOTHING
        if is_arguments:
            self._begun = True
            # A string is held until it is complete and can be unpacked; null becomes an empty object.
            self._into = _Into.HELD if char in '"n' else _Into.GIVEN
            if self._into is _Into.GIVEN and (char in _CLOSES or JsonValue.is_scalar(char)):
                self._announce()
        self._state = self._in_scalar if JsonValue.is_scalar(char) else self._in_value
        return self._state(char)

    def _in_scalar(self, char: str) -> Step:
        if JsonValue.is_scalar(char):
            return self._taken(char, Step.MORE)
        self._end_value()
        return self._after_value(char)

    def _in_value(self, char: str) -> Step:
        step = self._taken(char, self._value.push(char))
        if step is not Step.LAST:
            return step
        return Step.MORE if self._end_value() else Step.BROKEN

    def _taken(self, char: str, step: Step) -> Step:
        """Keep or give `char` if it fits."""
        if step is Step.BROKEN or len(self._text) >= MAX_HELD_CHARS:
            return Step.BROKEN
        if self._into is _Into.GIVEN:
            self._give(char)
        elif self._into is not _Into.NOTHING:
            self._text.append(char)
        return step

    def _end_value(self) -> bool:
        """Use a complete value. False when it cannot be what it should."""
        self._state = self._after_value
        text, into = "".join(self._text), self._into
        self._into = _Into.NOTHING
        if into is _Into.NAME:
            name = decode_string(text)
            if name is None or not is_tool_name(name) or (self._names and name not in self._names):
                return False
            self._name = name
            self._announce()
        elif into is _Into.HELD:
            unpacked = decode_string(text) if text.startswith('"') else "{}" if text == "null" else text
            self._give(text if unpacked is None else unpacked)
            self._announce()
        return True

    def _after_value(self, char: str) -> Step:
        self._state = self._after_value
        if char == ",":
            self._state = self._next_key
            return Step.MORE
        if char == "}":
            return self._end()
        return Step.MORE if char in _WHITE else Step.BROKEN

    def _end(self) -> Step:
        """The object is closed."""
        if self._name is None or not (self.announced or self._early or self._names):
            return Step.BROKEN
        if not self._begun:
            self._give("{}")
            self._begun = True
        self._announce()
        return Step.LAST

    def _give(self, text: str) -> None:
        if self.announced:
            self._found.arguments(text)
        else:
            self._pending.append(text)

    def _announce(self) -> None:
        """Give the call away once it is certain to be one."""
        if self.announced or self._name is None or not (self._early or self._begun):
            return
        self.announced = True
        self._raw.clear()
        self._found.call(self._name)
        self._found.arguments("".join(self._pending))
        self._pending.clear()
