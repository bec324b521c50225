"""From a constraint to a matcher of llguidance, in the grammar process.

Accepted of JSON Schema: what llguidance enforces; a keyword that it knows but does not enforce is refused by name,
never ignored (its option `lenient` is off, also against the schema's own `x-guidance`). White space between lexemes is
bounded, so that a model cannot go on with it for ever. Source: llguidance 1.x, docs/json_schema.md and docs/syntax.md.
"""

import json
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import InvalidInput, TooLarge, Unsupported

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # in the library's stubs only

MAX_JSON_DEPTH = 64
MAX_BRACKETS = 200
MAX_REASON_CHARS = 240
FIELD = "constraint"

JSON_OPTIONS: "JsonCompileOptions" = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ ]|\n[ ]{0,16}",
    "item_separator": ",",
    "key_separator": ":",
}
_UNSUPPORTED = ("Unimplemented keys", "Unknown format", "not supported", "not present in a registry")
_TOO_COMPLEX = ("ParserTooComplex", "LexerTooComplex")
_LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)


def compile_constraint(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """A matcher at the start of `constraint`. Raises `InvalidInput` and its kinds, field `constraint`."""
    matcher = LLMatcher(tokenizer, _grammar(constraint), log_level=0, limits=_LIMITS)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raise what is wrong with `matcher`, if anything. Reasons are short and quote keywords, not whole texts."""
    if not matcher.is_error():
        return
    reason, stop = _brief(matcher.get_error()), matcher.stop_reason()
    if stop in _TOO_COMPLEX:
        raise TooLarge(f"the constraint is too complex ({stop})", FIELD)
    if reason.startswith("NoExtension"):
        raise InvalidInput("no output can satisfy the constraint", FIELD)
    kind = Unsupported if any(sign in reason for sign in _UNSUPPORTED) else InvalidInput
    raise kind(f"the constraint is not accepted: {reason}", FIELD)


def _grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own form."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return _from_schema(constraint.text)
        case ConstraintKind.REGEX:
            _check_nesting(constraint.text)
            return LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.GRAMMAR:
            _check_nesting(constraint.text)
            return LLMatcher.grammar_from_lark(constraint.text)
        case ConstraintKind.CHOICE:
            # One terminal: several would make a choice that begins another one ambiguous for the lexer.
            words = " | ".join(json.dumps(one, ensure_ascii=False) for one in constraint.choices())
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {words}\n")


def _from_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("the schema is not JSON, or is nested too deeply", FIELD) from error
    if schema is False:
        raise InvalidInput("no output can satisfy the schema", FIELD)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidInput("a schema is a JSON object", FIELD)
    if depth(schema) > MAX_JSON_DEPTH:
        raise TooLarge(f"the schema is nested deeper than {MAX_JSON_DEPTH} levels", FIELD)
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
    except ValueError as error:
        raise InvalidInput(f"the schema is not accepted: {_brief(str(error))}", FIELD) from error


def depth(value: Any) -> int:
    """How deeply objects and arrays nest; a plain value has 0."""
    level, deepest = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        deepest += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return deepest


def _check_nesting(text: str) -> None:
    """Parsers of the library recurse. Brackets in literals count too: the bound is far above what people write."""
    open_now = 0
    for char in text:
        if char in "([{":
            open_now += 1
            if open_now > MAX_BRACKETS:
                raise TooLarge(f"the constraint has over {MAX_BRACKETS} open brackets at once", FIELD)
        elif char in ")]}":
            open_now = max(0, open_now - 1)


def _brief(message: str) -> str:
    """The reason without the source that the library quotes below it."""
    lines = [line.strip() for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith("<") and line.strip("^ ")]
    chosen = next((line for line in kept if line.startswith("error:")), kept[0] if kept else "unknown reason")
    return chosen[:MAX_REASON_CHARS]
