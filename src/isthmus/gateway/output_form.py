"""What a request demands of the form of its output, as constraints and tool definitions. Pure.

Promise: what is handed on is within limits, and a refusal names the field as the client wrote it. Whether a schema can
be kept at all is the engine's to say; its refusals come back under the same names.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import InvalidInput, TooLarge
from isthmus.contracts.prompting import OutputParse, ToolChoice, ToolDefinition, ToolMode
from isthmus.gateway.schema_requests import SamplingFields
from isthmus.gateway.schema_tools import JsonFormat, JsonSchemaFormat, NamedTool, Schema, Tool

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
"""Nesting of objects and arrays within one schema."""

_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What one output must look like, and what is looked for in it. `field` is where the client demanded it."""

    constraint: Constraint | None = None
    parse: OutputParse | None = None
    field: str = ""


FREE = OutputForm()
"""Any text."""


@contextmanager
def refusing_as(field: str) -> Iterator[None]:
    """Errors about what was built within are about `field` of the request."""
    try:
        yield
    except InvalidInput as error:
        raise type(error)(str(error), field) from None


def schema_text(schema: Schema, field: str) -> str:
    """A JSON Schema as text. Raises `TooLarge` over the limits on bytes and nesting.

    What is far too large is refused before it is written: each value takes at least a byte, each character of a string
    or a key too.
    """
    level: list[Any] = [schema]
    least = 0
    for _ in range(MAX_SCHEMA_DEPTH):
        least += len(level) + sum(map(_characters, level))
        if least > MAX_SCHEMA_BYTES:
            raise _too_large(field)
        level = [inner for value in level for inner in _inside(value)]
    if any(isinstance(value, dict | list) for value in level):
        raise TooLarge(f"{field} is nested over {MAX_SCHEMA_DEPTH} levels deep", field)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode("utf-8")) > MAX_SCHEMA_BYTES:
        raise _too_large(field)
    return text


def _too_large(field: str) -> TooLarge:
    return TooLarge(f"{field} has over {MAX_SCHEMA_BYTES} bytes", field)


def _characters(value: Any) -> int:
    """Of a string, or of the keys of an object."""
    if isinstance(value, dict):
        return sum(map(len, value))
    return len(value) if isinstance(value, str) else 0


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def tool_definition(
    name: str, description: str | None, schema: Schema | None, field: str, *, strict: bool = False
) -> ToolDefinition:
    """A tool as the prompting plane takes it. `field` names its schema. Raises `InvalidInput`."""
    text = "{}" if schema is None else schema_text(schema, field)
    if schema is not None and schema.get("type", "object") != "object":
        raise InvalidInput(f"{field} is of another type than object, which arguments are", field)
    with refusing_as(field):
        return ToolDefinition(name, description or "", text, strict)


def tool_definitions(tools: Sequence[Tool] | None) -> tuple[ToolDefinition, ...]:
    """The tools of an OpenAI body."""
    return tuple(
        tool_definition(
            tool.function.name,
            tool.function.description,
            tool.function.parameters,
            f"tools[{index}].function.parameters",
            strict=bool(tool.function.strict),
        )
        for index, tool in enumerate(tools or ())
    )


def tool_choice(choice: str | NamedTool | None, parallel: bool | None) -> ToolChoice:
    """The choice of an OpenAI body."""
    several = parallel is not False
    if isinstance(choice, NamedTool):
        return ToolChoice(ToolMode.NAMED, choice.function.name, several)
    return ToolChoice(ToolMode(choice or "auto"), None, several)


def response_constraint(body: SamplingFields) -> tuple[Constraint | None, str]:
    """The form that a body demands of its answer, and the field that demands it. Raises `InvalidInput`.

    Only one field may demand a form: an output that keeps two at a time is rarely what was meant.
    """
    demands = [*_response_format(body), *_structured(body), *_guided(body)]
    if len(demands) > 1:
        first, second = demands[0].field, demands[1].field
        raise InvalidInput(f"{second} cannot be used together with {first}", second)
    if not demands:
        return None, ""
    return demands[0].constraint(), demands[0].field


@dataclass(frozen=True, slots=True)
class _Demand:
    """One field's demand: a JSON Schema (or its text), or the text or the strings of another kind."""

    field: str
    kind: ConstraintKind
    value: Schema | str | list[str]

    def constraint(self) -> Constraint:
        if self.kind is ConstraintKind.JSON_SCHEMA:
            text = schema_text(_parsed(self.value, self.field), self.field)
        else:
            text = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        with refusing_as(self.field):
            return Constraint(self.kind, text)


def _parsed(value: Schema | str | list[str], field: str) -> Schema:
    """A schema that was sent as an object or as its text. Raises `InvalidInput`."""
    if isinstance(value, dict):
        return value
    if len(value) > MAX_SCHEMA_BYTES:
        raise _too_large(field)
    try:
        return msgspec.json.decode(value if isinstance(value, str) else "", type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{field} is neither a JSON Schema nor the text of one", field) from error


def _response_format(body: SamplingFields) -> Iterator[_Demand]:
    match body.response_format:
        case JsonFormat():
            yield _Demand("response_format", ConstraintKind.JSON_SCHEMA, _ANY_OBJECT)
        case JsonSchemaFormat() as asked:
            schema = asked.json_schema.schema
            yield _Demand("response_format", ConstraintKind.JSON_SCHEMA, _ANY_OBJECT if schema is None else schema)


def _structured(body: SamplingFields) -> Iterator[_Demand]:
    forms = body.structured_outputs
    if forms is None:
        return
    yield from _forms("structured_outputs.", forms.json, forms.regex, forms.choice, forms.grammar)
    if forms.json_object:
        yield _Demand("structured_outputs.json_object", ConstraintKind.JSON_SCHEMA, _ANY_OBJECT)


def _guided(body: SamplingFields) -> Iterator[_Demand]:
    yield from _forms("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)


def _forms(
    prefix: str, schema: Schema | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[_Demand]:
    if schema is not None:
        yield _Demand(prefix + "json", ConstraintKind.JSON_SCHEMA, schema)
    if regex is not None:
        yield _Demand(prefix + "regex", ConstraintKind.REGEX, regex)
    if choice is not None:
        yield _Demand(prefix + "choice", ConstraintKind.CHOICE, choice)
    if grammar is not None:
        yield _Demand(prefix + "grammar", ConstraintKind.GRAMMAR, grammar)
