"""Random JSON Schemas from a seed: what people write for structured output, and now and then what nobody supports.

The kinds and keywords are those of the JSON Schema Test Suite and of published collections of schemas (JSONSchemaBench,
Geng et al. 2025), without any text of theirs.
"""

import random
from typing import Any

Schema = dict[str, Any]

NAMES = ("id", "name", "tags", "size", "kind", "items", "note", "x", "is ok", "käse", 'a"b', "$v")
WORDS = ("red", "green", "blue", "a b", "x/y", "naïve", "日本", "", "true", 'quo"te', "back\\slash")
PATTERNS = (
    "^[a-z]{1,8}$",
    r"^\d{3}-\d{4}$",
    "^(ab|cd)+$",
    "[0-9]",
    "^[A-Z][a-z]*( [A-Z][a-z]*)?$",
    "^.{0,5}$",
    "^x?y?z$",
)
FORMATS = ("date", "time", "date-time", "uuid", "email", "ipv4", "ipv6", "hostname", "duration")
UNSUPPORTED: tuple[Schema, ...] = (
    {"not": {"type": "integer"}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"type": "integer"}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"if": {"type": "integer"}, "then": {"minimum": 3}},
    {"type": "string", "format": "no-such-format"},
    {"type": "string", "pattern": "^(?=a)"},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"$ref": "https://example.com/other.json"},
)


def random_schema(seed: int) -> Schema:
    """The schema of `seed`; an object at the top in most of them."""
    rng = random.Random(f"schema/{seed}")
    maker = _Maker(rng)
    top = maker.object(3) if rng.random() < 0.7 else maker.any(3)
    if maker.definitions:
        top = {**top, "$defs": maker.definitions}
    if rng.random() < 0.3:
        top = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "made up", **top}
    return top


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Schema] = {}

    def any(self, depth: int) -> Schema:
        rng = self.rng
        if rng.random() < 0.02:
            return dict(rng.choice(UNSUPPORTED))
        flat = [self.string, self.string, self.integer, self.number, self.enum, self.const, self.plain]
        nested = [self.object, self.object, self.array, self.array, self.any_of, self.all_of, self.one_of, self.ref]
        if depth > 0 and rng.random() < 0.55:
            return rng.choice(nested)(depth)
        return rng.choice(flat)()

    def plain(self) -> Schema:
        choices: tuple[Schema, ...] = ({"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]})
        return dict(self.rng.choice(choices))

    def string(self) -> Schema:
        rng = self.rng
        roll = rng.random()
        if roll < 0.25:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        if roll < 0.4:
            return {"type": "string", "format": rng.choice(FORMATS)}
        if roll < 0.5:
            return {"type": "string"}
        low = rng.randint(0, 4)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 10)}

    def integer(self) -> Schema:
        rng = self.rng
        schema: Schema = {"type": "integer"}
        low = rng.randint(-1000, 1000)
        if rng.random() < 0.6:
            schema[rng.choice(("minimum", "exclusiveMinimum"))] = low
        if rng.random() < 0.6:
            schema[rng.choice(("maximum", "exclusiveMaximum"))] = low + rng.randint(2, 5000)
        if rng.random() < 0.15:
            schema["multipleOf"] = rng.choice((2, 5, 7))
        return schema

    def number(self) -> Schema:
        rng = self.rng
        low = round(rng.uniform(-50, 50), rng.randint(0, 2))
        bounds: tuple[Schema, ...] = (
            {},
            {"minimum": low},
            {"minimum": low, "maximum": low + 10.5},
            {"exclusiveMaximum": low},
        )
        return {"type": "number", **rng.choice(bounds)}

    def enum(self) -> Schema:
        rng = self.rng
        values: list[Any] = rng.sample(WORDS, rng.randint(1, 4))
        if rng.random() < 0.3:
            values.append(rng.choice((None, 7, True, 1.5, [1, 2], {"k": "v"})))
        return {"enum": values}

    def const(self) -> Schema:
        return {"const": self.rng.choice((1, "fixed", None, False, -2.5, [1, "a"], {"a": {"b": []}}))}

    def object(self, depth: int) -> Schema:
        rng = self.rng
        names = rng.sample(NAMES, rng.randint(0, 4))
        schema: Schema = {"type": "object", "properties": {name: self.any(depth - 1) for name in names}}
        if names and rng.random() < 0.8:
            schema["required"] = rng.sample(names, rng.randint(1, len(names)))
        roll = rng.random()
        if roll < 0.7:
            schema["additionalProperties"] = False
        elif roll < 0.8:
            schema["additionalProperties"] = self.any(0)
        if rng.random() < 0.06:
            schema["patternProperties"] = {"^p_": self.any(0)}
        if rng.random() < 0.06:
            schema["minProperties"] = rng.randint(0, len(names))
        if rng.random() < 0.06:
            schema["maxProperties"] = rng.randint(len(schema.get("required", [])), 5)
        if rng.random() < 0.2:
            schema["description"] = "something"
        return schema

    def array(self, depth: int) -> Schema:
        rng = self.rng
        schema: Schema = {"type": "array"}
        if rng.random() < 0.9:
            schema["items"] = self.any(depth - 1)
        if rng.random() < 0.15:
            schema["prefixItems"] = [self.any(0) for _ in range(rng.randint(1, 3))]
        low = rng.randint(0, 2)
        if rng.random() < 0.5:
            schema["minItems"] = low
        if rng.random() < 0.8:
            schema["maxItems"] = low + rng.randint(0, 3)
        return schema

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth - 1) for _ in range(self.rng.randint(1, 3))]}

    def one_of(self, depth: int) -> Schema:
        kinds = [self.string(), self.integer(), {"type": "boolean"}, self.array(depth - 1)]
        return {"oneOf": self.rng.sample(kinds, 2)}

    def all_of(self, depth: int) -> Schema:
        first = self.object(depth - 1)
        if self.rng.random() < 0.5:
            return {"allOf": [self.integer(), {"minimum": -5000}]}
        first.pop("additionalProperties", None)
        return {"allOf": [first, {"type": "object", "properties": {"also": self.integer()}, "required": ["also"]}]}

    def ref(self, depth: int) -> Schema:
        rng = self.rng
        if self.definitions and rng.random() < 0.4:
            return {"$ref": f"#/$defs/{rng.choice(list(self.definitions))}"}
        name = f"d{len(self.definitions)}"
        self.definitions[name] = {}
        if rng.random() < 0.3:
            # A tree: refers to itself, with an end within reach.
            self.definitions[name] = {
                "type": "object",
                "properties": {
                    "v": self.any(0),
                    "next": {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 2},
                },
                "required": ["v"],
                "additionalProperties": False,
            }
        else:
            self.definitions[name] = self.any(depth - 1)
        return {"$ref": f"#/$defs/{name}"}
