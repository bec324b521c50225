"""Made-up and everyday tools: their descriptions, requests for them, and what they answer.

Names, parameters and values are drawn anew, so a call can only be written by reading the description and the
request. `chat_calls.py` makes conversations of these.
"""

from __future__ import annotations

import functools
import json
import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.embedded.chat_passages import make
from training.embedded.chat_render import Tool
from training.embedded.world import World, article, listing

Value = str | int | float | bool
_ENUMS = (
    ("low", "normal", "high"),
    ("small", "medium", "large"),
    ("fast", "slow"),
    ("first", "second", "third"),
    ("left", "right"),
    ("plain", "fancy"),
    ("soft", "hard"),
    ("basic", "full", "extra"),
)
_GENERIC = ("with {p} {v}", "with {p} {v}", "{p} {v}", "{p}: {v}", "the {p} is {v}", "{p} = {v}")
_CURRENCIES = ("euros", "dollars", "pounds", "crowns", "francs", "yen", "rupees", "pesos")
_ANY = (
    ("string", "common"),
    ("string", "NUMBER"),
    ("integer", "COUNT"),
    ("number", "AMOUNT"),
    ("boolean", "BOOLEAN"),
)
_WHAT_IS = re.compile(r"What is the ([^?]+)\?$")
_DONE = ("done", "ok", "sent", "ready", "accepted")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a tool: its JSON type, the choices of an enumeration, and how a request gives a value.

    ``meant`` is the first name of an everyday tool's parameter, by which requests speak of it.
    """

    name: str
    kind: str
    values: str
    choices: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    about: str = ""
    optional: bool = False
    meant: str = ""

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        found: dict[str, Any] = {"type": "string" if self.choices else self.kind}
        if self.choices:
            found["enum"] = list(self.choices)
        if self.about:
            found["description"] = self.about
        return found


@dataclass(frozen=True)
class Kind:
    """A tool, how it is asked for (a pattern, or words that the parameters' phrases follow), and what it returns."""

    name: str
    about: str
    parameters: tuple[Parameter, ...]
    asks: tuple[str, ...]
    pattern: bool
    result: tuple[tuple[str, str], ...]

    def tool(self) -> Tool:
        """The tool in OpenAI's shape."""
        parameters = {
            "type": "object",
            "properties": {p.name: p.schema() for p in self.parameters},
            "required": [p.name for p in self.parameters if not p.optional],
        }
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.about, "parameters": parameters},
        }


@dataclass(frozen=True)
class Request:
    """A request in words and the call that it means."""

    kind: Kind
    text: str
    arguments: dict[str, Value]

    def call(self) -> dict[str, Any]:
        """The call in OpenAI's shape."""
        return {"type": "function", "function": {"name": self.kind.name, "arguments": self.arguments}}


@functools.cache
def _toml() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("tools.toml").read_text())


def _title(world: World, rng: random.Random) -> str:
    return " ".join(
        world.pick(rng, group) for group in rng.choice([("adjectives", "objects"), ("projects",), ("common", "common")])
    )


def _text(world: World, rng: random.Random) -> str:
    return rng.choice(
        [
            f"see you on {world.pick(rng, 'days')}",
            f"the {world.pick(rng, 'objects')} is {world.pick(rng, 'adjectives')}",
            f"meet me in the {world.pick(rng, 'places')}",
            f"please bring {world.pick(rng, 'foods')}",
            " ".join(world.pick(rng, "common") for _ in range(rng.randint(1, 4))),
        ]
    )


def _amount(_world: World, rng: random.Random) -> str:
    whole = str(rng.randint(1, 99))
    return whole if rng.random() < 0.4 else f"{whole}.{rng.randint(1, 9)}"


_MAKERS: dict[str, Callable[[World, random.Random], str]] = {
    "TITLE": _title,
    "TEXT": _text,
    "AMOUNT": _amount,
    "SMALL": lambda _, rng: str(rng.randint(2, 60)),
    "DEGREES": lambda _, rng: str(rng.randint(-9, 38)),
    "CURRENCY": lambda _, rng: rng.choice(_CURRENCIES),
    "CODE": lambda _, rng: "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ0123456789") for _ in range(rng.randint(4, 6))),
    "ROOM": lambda world, rng: world.pick(rng, "places"),
    "DONE": lambda _, rng: rng.choice(_DONE),
    "NAMED": lambda world, rng: world.pick(rng, rng.choice(["projects", "surnames", "names"])),
    "COINED": lambda world, rng: world.coin(rng),
}


def draw(world: World, rng: random.Random, what: str) -> str:
    """Something of a kind, as text."""
    return _MAKERS[what](world, rng) if what in _MAKERS else make(world, rng, what)


def _typed(kind: str, text: str) -> Value:
    if kind == "integer":
        return int(text)
    if kind == "number":
        return float(text) if "." in text else int(text)
    return text


def offer(rng: random.Random, called: str | None = None) -> Kind:
    """An everyday tool under one of its names; ``called`` asks for the first tool with that first name."""
    offers = _toml()["offer"]
    one = rng.choice(offers) if called is None else next(o for o in offers if o["names"][0] == called)
    parameters, renamed = [], {}
    for line in one["parameters"]:
        names, kind, values = (part.strip() for part in line.split(":"))
        first, *others = names.split("|")
        renamed[first] = rng.choice([first, first, *others])
        choices = tuple(kind.split("/")) if values == "ENUM" else ()
        kind = "string" if choices else kind
        parameters.append(Parameter(renamed[first], kind, values, choices, meant=first))
    result = tuple((field.split(":")[0], field.split(":")[1].strip()) for field in one["result"])
    return Kind(rng.choice(one["names"]), rng.choice(one["about"]), tuple(parameters), tuple(one["asks"]), True, result)


@dataclass(frozen=True)
class Chain:
    """A request for two tools, the second of which needs a field of what the first returns."""

    first: Request
    second: Kind
    text: str
    field: str
    into: str
    given: dict[str, Value]

    def then(self, found: Outcome) -> Request:
        """The second call, once the first has returned."""
        value = str(found.fields[self.field])
        arguments = {p.name: value if p.meant == self.into else self.given[p.name] for p in self.second.parameters}
        return Request(self.second, "", arguments)


def chain(world: World, rng: random.Random) -> Chain:
    """One of the requests that need two tools."""
    one = rng.choice(_toml()["chain"])
    first, second = offer(rng, one["first"]), offer(rng, one["second"])
    shown, given = _values(world, rng, first)
    shown_too, given_too = _values(world, rng, second)
    text = str(rng.choice(one["asks"])).format(**{**shown_too, **shown})
    return Chain(Request(first, text, given), second, text, one["field"], one["into"], given_too)


def _choices(world: World, rng: random.Random) -> tuple[str, ...]:
    if rng.random() < 0.5:
        return rng.choice(_ENUMS)
    return tuple(dict.fromkeys(world.pick(rng, rng.choice(["common", "adjectives"])) for _ in range(rng.randint(2, 4))))


def _parameter(world: World, rng: random.Random, taken: set[str]) -> Parameter:
    """A parameter whose name is not taken."""
    while True:
        one = rng.choice(_toml()["parameter"])
        name, kind, values = rng.choice(one["names"]), one["type"], one["values"]
        if kind == "any":
            name = world.coin(rng) if rng.random() < 0.4 else world.pick(rng, rng.choice(["objects", "common"]))
            kind, values = rng.choice(_ANY)
        if name in taken:
            continue
        choices = _choices(world, rng) if kind == "enum" else ()
        about = f"the {name} of it" if rng.random() < 0.1 else ""
        return Parameter(name, kind, values, choices, tuple(one["phrases"]), about, rng.random() < 0.15)


def _tool_name(world: World, rng: random.Random, verb: str, noun: str) -> str:
    """A name of the verb and the noun, or one that says nothing."""
    kind = rng.random()
    if kind < 0.6:
        return f"{verb}_{noun}"
    if kind < 0.7:
        return f"{noun}_{verb}"
    if kind < 0.8:
        return verb + noun.capitalize()
    if kind < 0.9:
        return f"{world.coin(rng)}_{world.pick(rng, 'objects')}"
    return f"tool_{rng.randint(1, 99)}"


def made_up(world: World, rng: random.Random) -> Kind:
    """A tool that does something to a thing, or tells something about it."""
    noun = world.pick(rng, "objects")
    if rng.random() < 0.65:
        verb = world.pick(rng, "verbs")
        about = rng.choice(
            [f"{verb.capitalize()} {article(noun)}", f"Use this to {verb} {article(noun)}", f"To {verb} the {noun}"]
        )
        what = rng.choice([f"the {noun}", article(noun)])
        asks = tuple(lead + f"{verb} {what}" for lead in ("", "", "Please ", "Can you ", "I want to "))
        result = rng.choice([("status", "DONE"), (_field(rng), "ANY")])
    else:
        verb = rng.choice(["get", "get", "find", "show", "read"])
        attribute = rng.choice(_toml()["attributes"].split(", "))
        about = rng.choice(
            [
                f"The {attribute} of {article(noun)}",
                f"Get the {attribute} of {article(noun)}",
                f"Tells the {attribute} of the {noun}",
            ]
        )
        asks = tuple(f"{lead} the {attribute} of the {noun}" for lead in ("What is", "Tell me", "Show me", "Find"))
        noun, result = f"{noun}_{attribute}", (attribute, "ANY")
    taken: set[str] = set()
    parameters = []
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        parameters.append(_parameter(world, rng, taken))
        taken.add(parameters[-1].name)
    if all(p.optional for p in parameters):
        parameters[0] = replace(parameters[0], optional=False)
    more = [(_field(rng), "ANY") for _ in range(rng.choice([0, 0, 1, 2]))]
    fields = dict([result, *more])
    return Kind(_tool_name(world, rng, verb, noun), about, tuple(parameters), asks, False, tuple(fields.items()))


def _field(rng: random.Random) -> str:
    return str(rng.choice(_toml()["fields"].split(", ")))


def _said(world: World, rng: random.Random, parameter: Parameter) -> tuple[str, Value]:
    """How a request gives a value, and the value."""
    name = parameter.name
    if parameter.values == "BOOLEAN":
        yes = rng.random() < 0.5
        shown = rng.choice(
            [
                ("with {p}", "without {p}"),
                ("{p}: yes", "{p}: no"),
                ("{p} on", "{p} off"),
                ("{p} is true", "{p} is false"),
            ]
        )
        return shown[0 if yes else 1].format(p=name), yes
    text = rng.choice(parameter.choices) if parameter.choices else draw(world, rng, parameter.values)
    phrase = rng.choice(parameter.phrases) if parameter.phrases and rng.random() < 0.5 else rng.choice(_GENERIC)
    if parameter.values == "TEXT" and "say" not in phrase:
        phrase = "{p} '{v}'"
    return phrase.format(p=name.replace("_", " "), v=text), _typed(parameter.kind, text)


def request(world: World, rng: random.Random, kind: Kind) -> Request:
    """A request for a tool with new values."""
    return _from_pattern(world, rng, kind) if kind.pattern else _from_phrases(world, rng, kind)


def _values(world: World, rng: random.Random, kind: Kind) -> tuple[dict[str, str], dict[str, Value]]:
    """Values for an everyday tool: as a request says them, by their first names, and as arguments."""
    arguments: dict[str, Value] = {}
    shown: dict[str, str] = {}
    for parameter in kind.parameters:
        name, values = parameter.name, parameter.values
        if values == "ONOFF":
            arguments[name] = rng.random() < 0.5
            text = "on" if arguments[name] else "off"
        elif values.startswith("WITHOUT"):
            arguments[name] = rng.random() < 0.5
            text = ("with" if arguments[name] else "without") + values.removeprefix("WITHOUT")
        else:
            text = rng.choice(parameter.choices) if parameter.choices else draw(world, rng, values)
            while text in shown.values():
                text = draw(world, rng, values)
            arguments[name] = _typed(parameter.kind, text)
        shown[parameter.meant] = text
    return shown, arguments


def _from_pattern(world: World, rng: random.Random, kind: Kind) -> Request:
    shown, arguments = _values(world, rng, kind)
    text = rng.choice(kind.asks).format(**shown)
    if rng.random() < 0.15:
        text = rng.choice(["Please tell me: ", "Hello! ", "Now: ", "One more question: ", "Please. "]) + text
    return Request(kind, text, arguments)


def _from_phrases(world: World, rng: random.Random, kind: Kind) -> Request:
    given: dict[str, Value] = {}
    phrases = []
    for parameter in kind.parameters:
        if parameter.optional and rng.random() < 0.5:
            continue
        phrase, given[parameter.name] = _said(world, rng, parameter)
        phrases.append(phrase)
    if rng.random() < 0.4:
        rng.shuffle(phrases)
    joint = rng.choice([", ", ", ", " and "])
    ask = rng.choice(kind.asks)
    end = "?" if ask.startswith(("What", "Can")) else "."
    text = f"{ask}{rng.choice([' ', ' ', ', ', ': '])}{joint.join(phrases)}{end}"
    return Request(kind, text[0].upper() + text[1:], given)


@dataclass(frozen=True)
class Outcome:
    """What a tool returned, as its message says it, and what the assistant makes of it.

    ``fields`` are those of a JSON object, for a second call to use; ``values`` is what the answer has to tell.
    """

    content: str
    answer: str
    fields: dict[str, Value] = field(default_factory=dict)
    values: tuple[str, ...] = ()


def _field_value(world: World, rng: random.Random, values: str) -> Value:
    if values == "ANY":
        values = rng.choice(
            ["NUMBER", "COUNT", "common", "PERSON", "cities", "colours", "AMOUNT", "CODE", "days", "COINED"]
        )
    text = draw(world, rng, values)
    if values in ("COUNT", "SMALL", "DEGREES", "AMOUNT") or (values == "NUMBER" and rng.random() < 0.5):
        return _typed("number", text)
    return text


def outcome(world: World, rng: random.Random, asked: Request, *, plain: bool = False) -> Outcome:
    """A result and the answer that uses it, by fixed rules; a plain one is an object without an error.

    A JSON object is told field by field; a sentence is told as it stands; "What is X?" is answered with "X is ...".
    """
    kind = 0.5 if plain else rng.random()
    if kind < 0.05:
        reason = (
            f"{rng.choice(['no', 'unknown', 'missing', 'wrong'])} {rng.choice(list(asked.arguments)).replace('_', ' ')}"
        )
        return Outcome(json.dumps({"error": reason}), f"I am sorry, the tool failed: {reason}.", values=(reason,))
    fields = {name: _field_value(world, rng, values) for name, values in asked.kind.result}
    values = tuple(str(value) for value in fields.values())
    if kind < 0.65:
        told = listing([f"the {name.replace('_', ' ')} is {value}" for name, value in fields.items()])
        return Outcome(json.dumps(fields, ensure_ascii=False), told[0].upper() + told[1:] + ".", fields, values)
    first = next(iter(fields.values()))
    if first in _DONE:
        return Outcome(str(first), "It is done.")
    if kind < 0.8:
        told = f"The {next(iter(fields)).replace('_', ' ')} is {first}"
        told += rng.choice([".", f" since {world.pick(rng, 'days')}.", f", says {world.pick(rng, 'names')}."])
        return Outcome(told, told, values=values[:1])
    text = ", ".join(values)
    asks = _WHAT_IS.search(asked.text) if asked.kind.pattern and not plain else None
    if asks:
        return Outcome(text, f"The {asks.group(1)} is {text}.", values=values)
    return Outcome(text, f"The result is {text}.", values=values)
