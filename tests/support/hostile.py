"""Constraints that somebody might send to hurt: each must be refused, or followed, within the limits."""

import json
from typing import Any

from isthmus.contracts.constraints import ConstraintKind

JSON, REGEX, GRAMMAR = ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX, ConstraintKind.GRAMMAR


def _nested(levels: int) -> str:
    return '{"type":"array","items":' * levels + "{}" + "}" * levels


def _doubling(levels: int, word: str) -> str:
    """Each definition refers twice to the one before: 2 ** levels when written out."""
    definitions: dict[str, Any] = {"d0": {"type": "integer"}}
    for level in range(1, levels):
        ref = {"$ref": f"#/$defs/d{level - 1}"}
        if word == "properties":
            definitions[f"d{level}"] = {"type": "object", "properties": {"a": ref, "b": ref}, "required": ["a", "b"]}
        else:
            definitions[f"d{level}"] = {word: [ref, ref]}
    return json.dumps({"$ref": f"#/$defs/d{levels - 1}", "$defs": definitions})


HOSTILE: dict[str, tuple[ConstraintKind, str]] = {
    "nested 60": (JSON, _nested(60)),
    "nested 9000": (JSON, _nested(9000)),
    "doubling properties": (JSON, _doubling(60, "properties")),
    "doubling allOf": (JSON, _doubling(24, "allOf")),
    "doubling anyOf": (JSON, _doubling(24, "anyOf")),
    "doubling oneOf": (JSON, _doubling(24, "oneOf")),
    "endless ref": (JSON, '{"$ref":"#"}'),
    "ref to itself in a ring": (
        JSON,
        '{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}',
    ),
    "endless required tree": (
        JSON,
        '{"type":"object","properties":{"n":{"$ref":"#"}},"required":["n"],"additionalProperties":false}',
    ),
    "enormous enum": (JSON, json.dumps({"enum": [f"value number {n}" for n in range(10_000)]})),
    "enormous properties": (
        JSON,
        json.dumps({"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(6000)}}),
    ),
    "enormous required": (
        JSON,
        json.dumps(
            {
                "type": "object",
                "properties": {f"p{n}": {} for n in range(5000)},
                "required": [f"p{n}" for n in range(5000)],
            }
        ),
    ),
    "huge minLength": (JSON, '{"type":"string","minLength":1000000000,"maxLength":2000000000}'),
    "huge minItems": (JSON, '{"type":"array","items":{"type":"integer"},"minItems":1000000000}'),
    "huge bounds": (JSON, '{"type":"integer","minimum":-1e300,"maximum":1e300}'),
    "tiny multipleOf": (JSON, '{"type":"number","multipleOf":1e-300,"minimum":0,"maximum":1}'),
    "multipleOf of a large prime": (JSON, '{"type":"integer","multipleOf":999983}'),
    "many multiplesOf": (
        JSON,
        json.dumps({"allOf": [{"type": "integer", "multipleOf": n} for n in (7, 11, 13, 17, 19, 23)]}),
    ),
    "patterns that cross": (
        JSON,
        json.dumps({"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(3, 12)]}),
    ),
    "pattern properties that cross": (
        JSON,
        json.dumps({"type": "object", "patternProperties": {f"a.{{{n}}}b": {"type": "integer"} for n in range(20)}}),
    ),
    "keyword of another type": (JSON, '{"type":17,"properties":[],"required":"x","enum":{}}'),
    "not JSON": (JSON, '{"type": '),
    "a list": (JSON, "[1, 2]"),
    "own options": (JSON, '{"x-guidance":{"lenient":true,"whitespace_pattern":"(a+)+"},"not":{}}'),
    "regex (a+)+": (REGEX, "(a+)+$"),
    "regex (a|aa)+": (REGEX, "(a|aa)+b"),
    "regex (.*a){30}": (REGEX, "(.*a){30}"),
    "regex exponential subset": (REGEX, "[ab]*a[ab]{24}c"),
    "regex repeat tower": (REGEX, "a{1000}{1000}{1000}{1000}"),
    "regex optional tower": (REGEX, "(?:(?:(?:a?){100}){100}){100}"),
    "regex (x+x+)+y": (REGEX, "(x+x+)+y"),
    "regex wide": (REGEX, "|".join(f"word{n}[a-z]*{n}" for n in range(8000))),
    "regex brackets": (REGEX, "(" * 5000 + "a" + ")" * 5000),
    "regex look-behind": (REGEX, "(?<=a)b"),
    "regex nothing": (REGEX, "[^\\s\\S]"),
    "regex unicode classes": (REGEX, "(\\p{L}|\\p{N}|[^\\p{Z}]){1,5000}"),
    "grammar ambiguous": (GRAMMAR, 'start: a\na: a a | "x"'),
    "grammar left recursion": (GRAMMAR, 'start: start "x" | "y"'),
    "grammar empty loop": (GRAMMAR, "start: a\na: b\nb: a |"),
    "grammar without an end": (GRAMMAR, 'start: "a" start'),
    "grammar repeat": (GRAMMAR, 'start: ("ab" | "cd"){1,1000000}'),
    "grammar repeat tower": (GRAMMAR, 'start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x" | "y"'),
    "grammar brackets": (GRAMMAR, "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "grammar doubling": (
        GRAMMAR,
        "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(40)) + 'r40: "x" | "y"\nstart: r0\n',
    ),
    "grammar unknown rule": (GRAMMAR, "start: nowhere"),
    "grammar overlapping lexemes": (GRAMMAR, "start: " + " ".join("/[a-z]*x[a-z]*/" for _ in range(50))),
    "grammar schema inside": (GRAMMAR, 'start: %json {"type":"array","uniqueItems":true}'),
    "grammar no token": (GRAMMAR, "start: <[999999]>"),
}
