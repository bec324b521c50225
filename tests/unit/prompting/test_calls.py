"""Tool calls told from text: right ones, broken ones, and never anything taken back."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.prompting.parsing import parse, whole

from isthmus.contracts.prompting import MAX_TOOL_CALLS, ToolDelta
from isthmus.execution.prompting.calls import MAX_BLANKS
from isthmus.execution.prompting.dialects import ToolDialect
from isthmus.execution.prompting.findings import Content
from isthmus.execution.prompting.json_calls import MAX_DEPTH, MAX_HELD_CHARS, CallObject, Step

H, L, M = ToolDialect.HERMES, ToolDialect.LLAMA, ToolDialect.MISTRAL
F = '{"name": "f", "arguments": {"a": 1}}'
G = '{"name": "g", "arguments": {}}'
ONE = [["f", '{"a": 1}']]
TWO = [["f", '{"a": 1}'], ["g", "{}"]]

HERMES: dict[str, tuple[str, str, list[list[str]]]] = {
    "one": (f"<tool_call>\n{F}\n</tool_call>", "", ONE),
    "without line breaks": (f"<tool_call>{F}</tool_call>", "", ONE),
    "two": (f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>", "", TWO),
    "two in one pair": (f"<tool_call>\n{F}\n{G}\n</tool_call>", "", TWO),
    "text before": (f"Let me see.\n<tool_call>{F}</tool_call>", "Let me see.", ONE),
    "text before, two breaks": (f"Let me see.\n\n<tool_call>{F}</tool_call>", "Let me see.\n", ONE),
    "white space before and after": (f" \n\n <tool_call>{F}</tool_call> \n\n", "", ONE),
    "text between": (f"<tool_call>{F}</tool_call> and <tool_call>{G}</tool_call>", " and ", TWO),
    "text after": (f"<tool_call>{F}</tool_call>\nDone.", "\nDone.", ONE),
    "no closing mark": (f"<tool_call>{F}", "", ONE),
    "half a closing mark": (f"<tool_call>{F}</tool_", "", ONE),
    "no closing mark, then another": (f"<tool_call>{F}<tool_call>{G}</tool_call>", "", TWO),
    "text without calls": ("a < b <tool> <tool_calls> \n", "a < b <tool> <tool_calls> \n", []),
    "only white space": (" \n ", " \n ", []),
    "other key first": (
        '<tool_call>{"id": [1, {"name": "x"}], "name": "f", "arguments": {"a": 1}}</tool_call>',
        "",
        ONE,
    ),
    "arguments first": ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", ONE),
    "parameters for arguments": ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", ONE),
    "no arguments": ('<tool_call>{"name": "g"}</tool_call>', "", [["g", "{}"]]),
    "null arguments": ('<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [["g", "{}"]]),
    "arguments as a string": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\u00e9\\"}"}</tool_call>',
        "",
        [["f", '{"a": "é"}']],
    ),
    "keys twice": (
        '<tool_call>{"name": "f", "name": "g", "arguments": {"a": 1}, "arguments": 2}</tool_call>',
        "",
        ONE,
    ),
    "closing mark within a string": (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>{[\\"}"}}</tool_call>',
        "",
        [["f", '{"a": "</tool_call>{[\\"}"}']],
    ),
    "nested": (
        '<tool_call>{"name": "f", "arguments": {"a": {"b": [{}, [1, "]"]]}}}</tool_call>x',
        "x",
        [["f", '{"a": {"b": [{}, [1, "]"]]}}']],
    ),
    "escaped name": ('<tool_call>{"name": "f\\u00e9\\n", "x": 1}</tool_call>', None, []),  # a line break in a name
    "name in letters of another script": ('<tool_call>{"name": "\\u00e9日"}</tool_call>', "", [["é日", "{}"]]),
    # What is no call is text, mark included.
    "not JSON": ("<tool_call>f(1)</tool_call>", None, []),
    "array": ("<tool_call>[1]</tool_call>", None, []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', None, []),
    "empty name": ('<tool_call>{"name": "", "arguments": {}}</tool_call>', None, []),
    "name is no string": ('<tool_call>{"name": 7, "arguments": {}}</tool_call>', None, []),
    "no colon": ('<tool_call>{"name" "f"}</tool_call>', None, []),
    "bad key": ('<tool_call>{name: "f"}</tool_call>', None, []),
    "bad escape in a key": ('<tool_call>{"na\\me": "f"}</tool_call>', None, []),
    "long name": ('<tool_call>{"name": "' + "f" * 129 + '"}</tool_call>', None, []),
    "doubled braces": ('<tool_call>{{"name": "f"}}</tool_call>', None, []),
    "cut before the name": ('<tool_call>\n{"nam', None, []),
    "white space before what is no call": ("\n <tool_call>no", None, []),
    "mark only": ("so <tool_call>", None, []),
    "half a mark": ("so <tool_", None, []),
    "broken, then right": (f"<tool_call>no<tool_call>{F}</tool_call>", "<tool_call>no", ONE),
    "lots of white space": ("<tool_call>" + " " * 200 + F, None, []),
    # Once the name was given, what follows is the arguments, however they are.
    "cut within the arguments": ('<tool_call>{"name": "f", "arguments": {"a": "x', "", [["f", '{"a": "x']]),
    "arguments that are no JSON": (
        '<tool_call>{"name": "f", "arguments": {"a": <b>}}</tool_call>done',
        "done",
        [["f", '{"a": <b>}}']],
    ),
    "brackets that do not match": (
        '<tool_call>{"name": "f", "arguments": {"a": [1}}</tool_call>',
        "",
        [["f", '{"a": [1}}']],
    ),
    "comma at the end": ('<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>', "", [["f", '{"a": 1,}']]),
    "no JSON after the name": ('<tool_call>{"name": "f" (1)</tool_call>x', "x", [["f", "(1)"]]),
    "scalar arguments": ('<tool_call>{"name": "f", "arguments": 12 }</tool_call>', "", [["f", "12"]]),
    "arguments as half a string": ('<tool_call>{"name": "f", "arguments": "{\\"a', "", [["f", '"{\\"a']]),
    "half a surrogate in a string of arguments": (
        '<tool_call>{"name": "f", "arguments": "\\ud800"}</tool_call>',
        "",
        [["f", '"\\ud800"']],
    ),
}
P = '{"name": "f", "parameters": {"a": 1}}'
LLAMA: dict[str, tuple[str, str | None, list[list[str]]]] = {
    "bare": (P, "", ONE),
    "white space around": (f"\n {P} \n", "", ONE),
    "after the mark": (f"<|python_tag|>{P}", "", ONE),
    "two": (P + '; {"name": "g", "parameters": {}}', "", TWO),
    "two with a comma": (P + ', {"name": "g", "parameters": {}}', "", TWO),
    "with a type": ('{"type": "function", "name": "f", "parameters": {"a": 1}}', "", ONE),
    "arguments for parameters": (F, "", ONE),
    "text after": (f"{P} is it", " is it", ONE),
    "semicolon and text": (f"{P}; no", "; no", ONE),
    "offered, no parameters": ('{"name": "g"}', "", [["g", "{}"]]),
    "JSON that is no call": ('{"title": "f", "n": [1]} x', None, []),
    "a name that is not offered": ('{"name": "Bob", "parameters": {}}', None, []),
    "not at the start": (f"Like so: {P}", None, []),
    "code of a built-in tool": ('<|python_tag|>search.call(query="x")', None, []),
    "broken": ('{"name": "f", "parameters": {"a": ~}}', "", [["f", '{"a": ~}}']]),
    "cut": ('{"name": "f", "parameters": {"a', "", [["f", '{"a']]),
    "cut before the parameters": ('{"name": "f", "par', None, []),
    "braces": ("{}", None, []),
}
MISTRAL: dict[str, tuple[str, str | None, list[list[str]]]] = {
    "one": (f"[TOOL_CALLS][{F}]", "", ONE),
    "space after the mark": (f"[TOOL_CALLS] [{F}]", "", ONE),
    "two": (f"[TOOL_CALLS] [{F}, {G}]", "", TWO),
    "with an id": ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "x12345678"}]', "", ONE),
    "text before": (f"Hm.[TOOL_CALLS][{F}]", "Hm.", ONE),
    "text after": (f"[TOOL_CALLS][{F}] so", " so", ONE),
    "no closing bracket": (f"[TOOL_CALLS][{F}", "", ONE),
    "object without a list": (f"[TOOL_CALLS]{F}", "", ONE),
    "named": ('[TOOL_CALLS]f[ARGS]{"a": 1}', "", ONE),
    "two named": ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', "", TWO),
    "named with an id": ('[TOOL_CALLS]f[CALL_ID]x12345678[ARGS]{"a": 1}', "", ONE),
    "named without a mark": ('[TOOL_CALLS]f{"a": 1}', "", ONE),
    "named, space before the arguments": ('[TOOL_CALLS]f[ARGS] {"a": 1}', "", ONE),
    "named, brackets in strings": ('[TOOL_CALLS]f[ARGS]{"a": "}]["}', "", [["f", '{"a": "}]["}']]),
    "named, broken": ("[TOOL_CALLS]f[ARGS]a=1[TOOL_CALLS]g[ARGS]{}", "", [["f", "a=1"], ["g", "{}"]]),
    "named, cut": ('[TOOL_CALLS]f[ARGS]{"a', "", [["f", '{"a']]),
    "other brackets": ("[TOOL] [TOOL_CALL] [x]", None, []),
    "not JSON": ("[TOOL_CALLS][f(1)]", None, []),
    "empty list": ("[TOOL_CALLS][]", None, []),
    "a sentence": ("[TOOL_CALLS]I will call it.", None, []),
    "cut within the name": ("[TOOL_CALLS]get_wea", None, []),
    "cut within the second mark": ("[TOOL_CALLS]f[AR", None, []),
    "wrong second mark": ("[TOOL_CALLS]f[ARGH]{}", None, []),
    "no name": ("[TOOL_CALLS][ARGS]{}", None, []),
    "long id": ("[TOOL_CALLS]f[CALL_ID]" + "x" * 99 + "[ARGS]{}", None, []),
    "second is broken": (f"[TOOL_CALLS][{F}, no]", ", no]", ONE),
}
CASES = [
    *((H, name, *case) for name, case in HERMES.items()),
    *((L, name, *case) for name, case in LLAMA.items()),
    *((M, name, *case) for name, case in MISTRAL.items()),
]
NAMES = ("f", "g")


@pytest.mark.parametrize(
    ("dialect", "text", "content", "calls"),
    [(d, *rest) for d, _, *rest in CASES],
    ids=[f"{c[0]}-{c[1]}" for c in CASES],
)
def test_what_is_read(dialect: ToolDialect, text: str, content: str | None, calls: list[list[str]]) -> None:
    outcome = whole(dialect, text, NAMES)
    assert outcome.calls == calls
    assert outcome.content == (text if content is None else content)
    assert parse(dialect, list(text), names=NAMES)[0] == outcome


PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "{", "}", "[", "]", '"'),
    *('"name"', '"arguments"', '"parameters"', '"f"', ":", ",", ";", " ", "\n", "\\", "<", "x", "é日👍", "12", "null"),
    *(F, G, P),
]


@given(
    st.sampled_from(ToolDialect),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14),
    st.lists(st.integers(0, 200), max_size=12),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
@example(H, ["<tool_call>", F, "</tool_call>"], [3, 14], False)
def test_any_split_gives_the_same(dialect: ToolDialect, pieces: list[str], cuts: list[int], named: bool) -> None:
    text = "".join(pieces)
    names = NAMES if named else ()
    outcome = whole(dialect, text, names)
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(places)]
    assert parse(dialect, parts, names=names)[0] == outcome
    assert parse(dialect, list(text), names=names)[0] == outcome
    # Nothing is invented, and without calls nothing is lost.
    if not outcome.calls:
        assert outcome.content == text


def test_names_and_arguments_come_as_early_as_can_be() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"city": "Ber"}}'
    _, steps = parse(H, list(text))
    seen = {}
    for position, step in enumerate(steps[:-1]):
        for finding in step:
            assert isinstance(finding, ToolDelta)
            seen[position] = finding
    name_at = text.index('"f"') + 2
    assert seen.pop(name_at) == ToolDelta(0, "f")
    start = text.index('{"city')
    assert seen == {start + i: ToolDelta(0, None, char) for i, char in enumerate('{"city": "Ber"}')}


def test_text_is_not_held_longer_than_it_could_be_a_mark() -> None:
    _, steps = parse(H, list("a <b>\nc"))
    assert [[f.text for f in step if isinstance(f, Content)] for step in steps] == [
        *(["a"], [" "], [], ["<b"], [">"], [], ["\nc"]),
        [],
    ]


def test_marks_that_are_hidden_are_in_no_text() -> None:
    hidden = ("[TOOL_CALLS]", "[ARGS]")
    assert whole(M, "[TOOL_CALLS]no call", hidden=hidden).content == "no call"
    assert whole(M, "a [ARGS]b", hidden=hidden).content == "a b"
    assert whole(M, '[TOOL_CALLS]f[ARGS]{"a": "[ARGS]"}', hidden=hidden).calls == [["f", '{"a": "[ARGS]"}']]


@pytest.mark.parametrize("dialect", [H, L, M])
def test_calls_beyond_the_limit_are_text(dialect: ToolDialect) -> None:
    one = {H: f"<tool_call>{G}</tool_call>", L: G + ";", M: "[TOOL_CALLS]g[ARGS]{}"}[dialect]
    outcome = whole(dialect, one * (MAX_TOOL_CALLS + 1))
    assert len(outcome.calls) == MAX_TOOL_CALLS
    assert outcome.content.strip(";") == one.strip(";")


@pytest.mark.parametrize(
    "endless",
    ['{"name": "' + "x" * 9, '{"name' + "x" * 9, '{"arguments": {"a": "' + "x" * 9, '{"other": [' + "1," * 9],
    ids=["name", "key", "arguments first", "other value"],
)
def test_what_is_held_of_a_call_without_a_name_is_bounded(endless: str) -> None:
    text = "<tool_call>" + endless + endless[-2:] * MAX_HELD_CHARS
    outcome, steps = parse(H, [text[i : i + 64] for i in range(0, len(text), 64)])
    assert outcome.content == text
    first = next(index for index, step in enumerate(steps) if step)
    assert first * 64 <= MAX_HELD_CHARS + 128


def test_arguments_in_a_string_that_does_not_end_are_given_at_the_limit() -> None:
    text = '<tool_call>{"name": "f", "arguments": "' + "x" * (2 * MAX_HELD_CHARS)
    outcome, steps = parse(H, [text[i : i + 64] for i in range(0, len(text), 64)])
    assert outcome.calls == [["f", text[text.index('"x') :]]]
    assert not steps[-1]


def test_long_arguments_are_not_held() -> None:
    found_first = parse(H, ['<tool_call>{"name": "f", "arguments": {"a": "', *["x" * 1000] * 99])[1]
    assert all(found_first[:-1])


def test_white_space_held_is_bounded() -> None:
    outcome, steps = parse(H, [" "] * (MAX_BLANKS + 9) + ["x"])
    assert outcome.content == " " * (MAX_BLANKS + 9) + "x"
    assert not any(steps[:MAX_BLANKS])
    assert all(steps[MAX_BLANKS:-1])


def test_depth_is_bounded() -> None:
    from isthmus.execution.prompting.findings import Findings

    found = Findings()
    reader = CallObject(found, early=True)
    steps = [reader.push(char) for char in '{"name": "f", "arguments": ' + "[" * (MAX_DEPTH + 1)]
    assert steps[-2:] == [Step.MORE, Step.BROKEN]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4), st.sampled_from(ToolDialect), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_arguments_come_back_as_they_were(values: dict[str, object], dialect: ToolDialect, ascii_: bool) -> None:
    written = json.dumps(values, ensure_ascii=ascii_)
    if not ascii_:
        written = written.encode(errors="replace").decode()
    text = {
        H: f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>',
        L: f'{{"name": "f", "parameters": {written}}}',
        M: f"[TOOL_CALLS]f[ARGS]{written}",
    }[dialect]
    outcome = parse(dialect, list(text))[0]
    assert outcome.calls == [["f", written]]
    assert outcome.content == ""
