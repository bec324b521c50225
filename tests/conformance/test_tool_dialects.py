"""Every dialect keeps the same contract: what its template writes, its grammar accepts and its parser reads back."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tests.unit.prompting.families import CHATML_TOKENS, LLAMA_TOKENS, MISTRAL_TOKENS, Family, families

from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import Unsupported
from isthmus.contracts.prompting import (
    PROMPT_TAIL_TOKENS,
    ChatMessage,
    ChatOptions,
    ToolCall,
    ToolChoice,
    ToolDefinition,
    ToolMode,
)
from isthmus.contracts.sampling import TextParams
from isthmus.execution.prompting.dialects import Dialect, ReasoningDialect, detect
from isthmus.execution.prompting.grammar import chat_constraint

NAMES = list(families())
USER = ChatMessage("user", "go")
MARKS = (*CHATML_TOKENS, *LLAMA_TOKENS, *MISTRAL_TOKENS, "<|")
RESPONSE = Constraint(
    ConstraintKind.JSON_SCHEMA,
    '{"type": "object", "properties": {"z": {"type": "integer"}}, "additionalProperties": false}',
)
REQUIRED, ONLY = ToolMode.REQUIRED, ToolMode.NAMED


class Matcher:
    """What llguidance makes of a grammar."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._tokenizer = LLTokenizer(family.tokenizer.to_str())

    def accepts(self, constraint: Constraint | None, ids: list[int]) -> bool:
        assert constraint is not None
        assert constraint.kind is ConstraintKind.GRAMMAR
        matcher = LLMatcher(self._tokenizer, constraint.text, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def accepts_text(self, constraint: Constraint | None, text: str) -> bool:
        return self.accepts(constraint, self._family.tokenizer.encode(text, add_special_tokens=False).ids)


MATCHERS: dict[str, Matcher] = {}


def matcher(family: Family) -> Matcher:
    if family.name not in MATCHERS:
        MATCHERS[family.name] = Matcher(family)
    return MATCHERS[family.name]


def demand(
    family: Family, options: ChatOptions, response: Constraint | None = None, prompt: list[int] | None = None
) -> Constraint | None:
    tail = (prompt or [])[-PROMPT_TAIL_TOKENS:]
    return chat_constraint(family.dialect, family.vocabulary, options, response, tail)


def collect(pieces: list[Any]) -> tuple[str, str, list[list[str]]]:
    calls: list[list[str]] = []
    for delta in (delta for piece in pieces for delta in piece.calls):
        if delta.name is not None:
            calls.append([delta.name, ""])
        calls[delta.index][1] += delta.arguments
    return "".join(p.text for p in pieces), "".join(p.reasoning for p in pieces), calls


def read(family: Family, prompt: list[int], parts: list[list[int]], names: tuple[str, ...] = ()) -> Any:
    assembler = family.assembler(prompt, names=names)
    return collect([*(assembler.feed(part) for part in parts), assembler.finish()])


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12).filter(
    lambda text: not any(mark in text for mark in MARKS)
)
NAME = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_-]{0,11}", fullmatch=True)
SCALARS: list[tuple[dict[str, Any], st.SearchStrategy[Any]]] = [
    ({"type": "string"}, TEXT),
    ({"type": "integer"}, st.integers(-(10**6), 10**6)),
    ({"type": "number"}, st.integers(-400, 400).map(lambda n: n / 4)),
    ({"type": "boolean"}, st.booleans()),
    ({"enum": ["red", "blue", 3]}, st.sampled_from(["red", "blue", 3])),
    ({"type": ["string", "null"]}, st.none() | TEXT),
    ({"type": "array", "items": {"type": "string"}}, st.lists(TEXT, max_size=3)),
    (
        {"type": "object", "additionalProperties": {"type": "integer"}},
        st.dictionaries(TEXT, st.integers(0, 9), max_size=2),
    ),
]


@st.composite
def tools_and_calls(draw: st.DrawFn, most: int) -> tuple[tuple[ToolDefinition, ...], list[list[str]]]:
    """Tools, and calls of them that keep their schemas."""
    tools, calls = [], []
    shapes: list[list[tuple[str, tuple[dict[str, Any], st.SearchStrategy[Any]]]]] = []
    for name in draw(st.lists(NAME, min_size=1, max_size=3, unique=True)):
        keys = draw(st.lists(NAME, max_size=3, unique=True))
        shape = [(key, draw(st.sampled_from(SCALARS))) for key in keys]
        schema = {
            "type": "object",
            "properties": {key: kind for key, (kind, _) in shape},
            "required": keys,
            "additionalProperties": False,
        }
        tools.append(ToolDefinition(name, draw(TEXT), json.dumps(schema)))
        shapes.append(shape)
    for _ in range(draw(st.integers(1, most))):
        which = draw(st.integers(0, len(tools) - 1))
        values = {key: draw(values) for key, (_, values) in shapes[which]}
        calls.append([tools[which].name, json.dumps(values, ensure_ascii=False)])
    return tuple(tools), calls


def assistant(calls: list[list[str]], content: str = "", reasoning: str | None = None) -> ChatMessage:
    made = tuple(ToolCall(f"call_{index}", name, arguments) for index, (name, arguments) in enumerate(calls))
    return ChatMessage("assistant", content, tool_calls=made, reasoning=reasoning)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_what_the_template_writes_is_accepted_and_read_back(name: str, data: st.DataObject) -> None:
    family = families()[name]
    tools, calls = data.draw(tools_and_calls(3 if family.parallel else 1))
    named = len(calls) == 1 and data.draw(st.booleans())
    choice = ToolChoice(ONLY, calls[0][0]) if named else ToolChoice(REQUIRED)
    options = ChatOptions(tools, choice, thinking=False)
    prompt, answer = family.answer_ids([USER, assistant(calls)], options)
    assert matcher(family).accepts(demand(family, options, None, prompt), answer)
    names = tuple(tool.name for tool in tools)
    assert read(family, prompt, [answer], names) == ("", "", calls)
    assert read(family, prompt, [[one] for one in answer], names) == ("", "", calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=4)))
    parts = [answer[start:end] for start, end in itertools.pairwise([0, *cuts, len(answer)])]
    assert read(family, prompt, parts, names) == ("", "", calls)


ADD = ToolDefinition("add", "", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
FREE = ToolDefinition("free")
CALL = assistant([["add", '{"a": 1}']])
WRONG = assistant([["add", '{"a": "1"}']])
OTHER = assistant([["free", '{"a": "1"}']])
UNKNOWN = assistant([["sub", '{"a": 1}']])


def answer(family: Family, message: ChatMessage, options: ChatOptions) -> list[int]:
    return family.answer_ids([USER, message], options)[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_demanded_call_is_of_an_offered_tool_and_keeps_its_schema(name: str) -> None:
    family = families()[name]
    options = ChatOptions((ADD, FREE), ToolChoice(REQUIRED), thinking=False)
    wanted = demand(family, options)
    found = {m: matcher(family).accepts(wanted, answer(family, m, options)) for m in (CALL, WRONG, OTHER, UNKNOWN)}
    assert found == {CALL: True, WRONG: False, OTHER: True, UNKNOWN: False}
    assert not matcher(family).accepts(wanted, [])
    assert not matcher(family).accepts_text(wanted, "It is 1.")
    only = demand(family, ChatOptions((ADD, FREE), ToolChoice(ONLY, "add"), thinking=False))
    assert matcher(family).accepts(only, answer(family, CALL, options))
    assert not matcher(family).accepts(only, answer(family, OTHER, options))


@pytest.mark.parametrize("name", [name for name in NAMES if families()[name].parallel])
def test_one_call_when_several_are_not_allowed(name: str) -> None:
    family = families()[name]
    two = assistant([["add", '{"a": 1}'], ["add", '{"a": 2}']])
    for mode in (REQUIRED, ToolMode.AUTO):
        for parallel in (True, False):
            options = ChatOptions((ADD,), ToolChoice(mode, parallel=parallel), thinking=False)
            wanted = demand(family, options)
            if mode is ToolMode.AUTO and parallel:
                assert wanted is None
            else:
                assert matcher(family).accepts(wanted, answer(family, two, options)) == parallel
                assert matcher(family).accepts(wanted, answer(family, CALL, options))


@pytest.mark.parametrize("name", NAMES)
def test_strict_tools_hold_the_model_to_their_schema_when_it_calls_by_itself(name: str) -> None:
    family = families()[name]
    strict = ToolDefinition(ADD.name, "", ADD.parameters, strict=True)
    options = ChatOptions((strict, FREE), thinking=False)
    wanted = demand(family, options)
    found = {m: matcher(family).accepts(wanted, answer(family, m, options)) for m in (CALL, WRONG, OTHER, UNKNOWN)}
    assert found == {CALL: True, WRONG: False, OTHER: True, UNKNOWN: False}
    for text in ("", "It is 1.", "a < b [x] {}", "\nIt is\n"):
        assert matcher(family).accepts_text(wanted, text), text
    if family.name != "llama":
        said = answer(family, assistant([["add", '{"a": 1}']], "Let me see."), options)
        assert matcher(family).accepts(wanted, said)


@pytest.mark.parametrize("name", NAMES)
def test_calls_or_the_response_that_was_asked_for(name: str) -> None:
    family = families()[name]
    options = ChatOptions((ADD,), thinking=False)
    wanted = demand(family, options, RESPONSE)
    check = matcher(family)
    assert check.accepts(wanted, answer(family, CALL, options))
    assert not check.accepts(wanted, answer(family, WRONG, options))
    assert check.accepts_text(wanted, '{"z": 1}')
    assert not check.accepts_text(wanted, '{"z": "1"}')
    assert not check.accepts_text(wanted, "no")
    # A demanded call leaves no other answer; no tools leave the response as it is.
    assert not check.accepts_text(demand(family, ChatOptions((ADD,), ToolChoice(REQUIRED)), RESPONSE), '{"z": 1}')
    if family.dialect.reasoning is None:
        assert demand(family, ChatOptions((ADD,), ToolChoice(ToolMode.NONE)), RESPONSE) is RESPONSE


RESPONSES = {
    "schema": (RESPONSE, ['{"z": 1}', "{}"], ['{"z": 1.5}', "x"]),
    "regex": (Constraint(ConstraintKind.REGEX, "a/\\d+\\/\n?"), ["a/12/", "a/1/\n"], ["a/", "b"]),
    "choice": (Constraint(ConstraintKind.CHOICE, '["yes", "\\"né\\"\\n"]'), ["yes", '"né"\n'], ["no", "ye"]),
    "grammar": (
        Constraint(ConstraintKind.GRAMMAR, 'start: "{" item* "}"\nitem: /[ab]/'),
        ["{}", "{ab}"],
        ["{c}", "ab"],
    ),
}
THINKERS = [name for name in NAMES if families()[name].dialect.reasoning is not None]


@pytest.mark.parametrize("kind", RESPONSES)
@pytest.mark.parametrize("name", THINKERS)
def test_reasoning_comes_before_a_response(name: str, kind: str) -> None:
    family = families()[name]
    check = matcher(family)
    response, right, wrong = RESPONSES[kind]
    opening, closing = family.dialect.reasoning_marks or ("", "")
    may = demand(family, ChatOptions(), response)
    opened = demand(family, ChatOptions(), response, family.tokenizer.encode(f"x{opening}\n").ids)
    closed = demand(family, ChatOptions(), response, family.tokenizer.encode(f"{opening}\n\n{closing}\n\n").ids)
    assert closed is response
    assert demand(family, ChatOptions(thinking=False), response) is response
    thought = 'So {"z":\n\n[1]. '
    for text in right:
        assert check.accepts_text(may, text)
        assert check.accepts_text(may, f"{opening}\n{thought}\n{closing}\n\n{text}")
        assert check.accepts_text(opened, f"{thought}{closing}{text}")
        assert not check.accepts_text(opened, text)
    for text in wrong:
        assert not check.accepts_text(may, text)
        assert not check.accepts_text(may, f"{opening}{thought}{closing}{text}")
        assert not check.accepts_text(opened, f"{thought}{closing}{text}")


@pytest.mark.parametrize("name", THINKERS)
def test_reasoning_text_and_calls_together(name: str) -> None:
    family = families()[name]
    options = ChatOptions((ADD,), ToolChoice(parallel=False))
    message = assistant([["add", '{"a": 1}']], "Now:", "First\n\nthis.")
    if name == "embedded":  # its template leaves earlier reasoning out
        message = assistant([["add", '{"a": 1}']], "Now:")
    prompt, ids = family.answer_ids([USER, message], options)
    assert matcher(family).accepts(demand(family, options, None, prompt), ids)
    expected = ("Now:", message.reasoning or "", [["add", '{"a": 1}']])
    assert read(family, prompt, [[one] for one in ids]) == expected
    assert read(family, prompt, [ids]) == expected


@pytest.mark.parametrize("name", NAMES)
def test_marks_are_seen_and_never_shown(name: str) -> None:
    """Special tokens are left out of text, but a parser sees them; stop strings are not looked for in calls."""
    family = families()[name]
    options = ChatOptions((ADD,))
    prompt, ids = family.answer_ids([USER, CALL], options)
    assembler = family.assembler(prompt, TextParams(stop=("add", "a", "{", "}")), ("add",))
    pieces = [*(assembler.feed([one]) for one in ids), assembler.finish()]
    assert collect(pieces) == ("", "", [["add", '{"a": 1}']])
    assert not any(piece.stopped for piece in pieces)


def test_a_model_without_a_dialect_cannot_be_made_to_call() -> None:
    family = families()["llama"]
    none = detect("{{ messages }}")
    assert none == Dialect()
    for mode in (ToolChoice(REQUIRED), ToolChoice(ONLY, "add")):
        with pytest.raises(Unsupported):
            chat_constraint(none, family.vocabulary, ChatOptions((ADD,), mode), None, ())
    strict = ToolDefinition("add", "", "{}", strict=True)
    assert chat_constraint(none, family.vocabulary, ChatOptions((strict,)), None, ()) is None
    assert chat_constraint(none, family.vocabulary, ChatOptions((strict,)), RESPONSE, ()) is RESPONSE


def test_references_within_a_schema_stay_right() -> None:
    schema = {"properties": {"p": {"$ref": "#/$defs/q"}}, "required": ["p"], "$defs": {"q": {"type": "integer"}}}
    tools = (ToolDefinition("f", "", json.dumps(schema)), ToolDefinition("g", "", json.dumps(schema)))
    for family in families().values():
        options = ChatOptions(tools, ToolChoice(REQUIRED), thinking=False)
        wanted = demand(family, options)
        assert matcher(family).accepts(wanted, answer(family, assistant([["g", '{"p": 1}']]), options))
        assert not matcher(family).accepts(wanted, answer(family, assistant([["g", '{"p": "x"}']]), options))


def test_reasoning_of_mistral_is_known() -> None:
    assert families()["mistral named"].dialect.reasoning is ReasoningDialect.MISTRAL
