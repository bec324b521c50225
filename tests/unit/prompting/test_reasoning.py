"""Reasoning told from the answer, at any split, with what the template did already."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.prompting.families import Family, families
from tests.unit.prompting.parsing import parse

from isthmus.contracts.errors import ModelInvalid
from isthmus.contracts.prompting import OutputParse, Piece
from isthmus.contracts.sampling import TextParams
from isthmus.execution.prompting.assembler import Assembler
from isthmus.execution.prompting.dialects import Dialect, Opening, ReasoningDialect, ToolDialect, detect, opening
from isthmus.execution.prompting.reasoning import MAX_HELD_BREAKS

UNSAID, OPENED, CLOSED = Opening.UNSAID, Opening.OPENED, Opening.CLOSED
THINK = ReasoningDialect.THINK

CASES: dict[str, tuple[Opening, str, str, str]] = {
    "both marks": (UNSAID, "<think>\nwhy\n</think>\n\nyes", "why", "yes"),
    "on one line": (UNSAID, "<think>why</think>yes", "why", "yes"),
    "line breaks within": (UNSAID, "<think>\n\na\n\nb\n</think>c", "a\n\nb", "c"),
    "white space before": (UNSAID, " \n<think>why</think>yes", "why", "yes"),
    "spaces are kept": (UNSAID, "<think> why </think> yes", " why ", " yes"),
    "empty": (UNSAID, "<think>\n\n</think>\n\nyes", "", "yes"),
    "none": (UNSAID, "yes", "", "yes"),
    "none, white space": (UNSAID, "\n yes", "", "\n yes"),
    "only white space": (UNSAID, "\n ", "", "\n "),
    "not at the start": (UNSAID, "yes <think>no</think>", "", "yes <think>no</think>"),
    "half a mark": (UNSAID, "<thin", "", "<thin"),
    "other mark": (UNSAID, "<thinker>", "", "<thinker>"),
    "never closed": (UNSAID, "<think>why\n", "why", ""),
    "cut within the closing mark": (UNSAID, "<think>a\n</thi", "a\n</thi", ""),
    "other marks within": (UNSAID, "<think>a</b></thin></think>c", "a</b></thin>", "c"),
    "second closing mark": (UNSAID, "<think>a</think>b</think>", "a", "b</think>"),
    "opened by the template": (OPENED, "\nwhy</think>yes", "why", "yes"),
    "opened, said again": (OPENED, "\n<think>\nwhy</think>yes", "why", "yes"),
    "opened, never closed": (OPENED, "why", "why", ""),
    "opened, nothing": (OPENED, "", "", ""),
    "opened, closed at once": (OPENED, "</think>yes", "", "yes"),
    "opened, half a mark": (OPENED, "<thi", "<thi", ""),
    "closed by the template": (CLOSED, "yes", "", "yes"),
    "closed, a break": (CLOSED, "\nyes\n", "", "yes\n"),
    "closed, marks are text": (CLOSED, "<think>a</think>b", "", "<think>a</think>b"),
    "many breaks within": (UNSAID, "<think>a" + "\n" * 99 + "b</think>", "a" + "\n" * 99 + "b", ""),
    "a call follows": (UNSAID, '<think>{"<tool_call>"}</think>\n\n<tool_call>{"name": "f"}</tool_call>', None, ""),
}


@pytest.mark.parametrize(("state", "text", "reasoning", "content"), CASES.values(), ids=CASES)
def test_what_is_told_apart(state: Opening, text: str, reasoning: str | None, content: str) -> None:
    for parts in ([text], list(text)):
        outcome, _ = parse(ToolDialect.HERMES, parts, reasoning=THINK, opening=state)
        assert outcome.content == content
        if reasoning is None:
            assert (outcome.reasoning, outcome.calls) == ('{"<tool_call>"}', [["f", "{}"]])
        else:
            assert outcome.reasoning == reasoning
            assert not outcome.calls


def test_marks_of_mistral() -> None:
    text = "[THINK]a [1][/THINK]b"
    outcome, _ = parse(ToolDialect.MISTRAL, list(text), reasoning=ReasoningDialect.MISTRAL)
    assert (outcome.reasoning, outcome.content) == ("a [1]", "b")


@given(
    st.sampled_from(Opening),
    st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "<", "a", "<tool_call>", '{"name": "f"}', "é"])),
    st.integers(0, 60),
)
@settings(max_examples=150, deadline=None)
def test_any_split_gives_the_same(state: Opening, pieces: list[str], cut: int) -> None:
    text = "".join(pieces)
    outcome, _ = parse(ToolDialect.HERMES, [text], reasoning=THINK, opening=state)
    for parts in (list(text), [text[:cut], text[cut:]]):
        assert parse(ToolDialect.HERMES, parts, reasoning=THINK, opening=state)[0] == outcome


def test_reasoning_comes_as_it_is_written() -> None:
    _, steps = parse(ToolDialect.HERMES, list("<think>ab\nc"), reasoning=THINK)
    assert [bool(step) for step in steps] == [*([False] * 7), True, True, False, True, False]


def test_line_breaks_held_are_bounded() -> None:
    _, steps = parse(ToolDialect.HERMES, ["<think>a", *["\n"] * 200], reasoning=THINK)
    assert sum(map(bool, steps)) > 200 // (MAX_HELD_BREAKS + 1)


TAILS = {
    "user\nhi<|im_end|>\n<|im_start|>assistant\n": UNSAID,
    "<|im_start|>assistant\n<think>\n": OPENED,
    "<|im_start|>assistant\n<think>": OPENED,
    "<|im_start|>assistant\n<think>\n\n</think>\n\n": CLOSED,
    "say <think><|im_end|>\n<|im_start|>assistant\n": UNSAID,
    "<think> and": UNSAID,
    "": UNSAID,
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["hermes", "hermes as text"])
def test_the_end_of_the_prompt_tells_what_was_opened(name: str, tail: str) -> None:
    family = families()[name]
    ids = family.tokenizer.encode(tail, add_special_tokens=False).ids
    assert opening(family.dialect, family.vocabulary, ids) is TAILS[tail]
    assert opening(Dialect(), family.vocabulary, ids) is UNSAID


def run(family: Family, text: str, params: TextParams, parse_: OutputParse) -> list[Piece]:
    assembler = Assembler(family.vocabulary, params, parse_, family.dialect)
    ids = family.tokenizer.encode(text, add_special_tokens=False).ids
    return [*(assembler.feed([one]) for one in ids), assembler.finish()]


def test_stop_strings_end_the_answer_not_the_reasoning() -> None:
    text = "<think>to stop\n</think>\n\nnot yet, stop here<tool_call>"
    for name in ("hermes", "hermes special", "hermes as text"):
        pieces = run(families()[name], text, TextParams(stop=("stop",)), OutputParse(True, True))
        assert "".join(p.reasoning for p in pieces) == "to stop"
        assert "".join(p.text for p in pieces) == "not yet, "
        assert pieces[-1].stopped
        assert pieces[-1].stop == "stop"


def test_a_stop_string_does_not_span_a_call() -> None:
    text = 'ab<tool_call>{"name": "f"}</tool_call>cd'
    pieces = run(families()["hermes"], text, TextParams(stop=("bc",)), OutputParse(True, True))
    assert "".join(p.text for p in pieces) == "abcd"
    first_call = next(index for index, piece in enumerate(pieces) if piece.calls)
    assert "".join(p.text for p in pieces[: first_call + 1]) == "ab"


def test_what_is_not_looked_for_is_text() -> None:
    text = '<think>a</think><tool_call>{"name": "f"}</tool_call>'
    family = families()["hermes"]
    assert "".join(p.text for p in run(family, text, TextParams(), OutputParse())) == text
    pieces = run(family, text, TextParams(), OutputParse(reasoning=True))
    assert "".join(p.text for p in pieces) == text.partition("</think>")[2]
    pieces = run(families()["hermes special"], "<think>a</think>b", TextParams(), OutputParse(tools=True))
    assert "".join(p.text for p in pieces) == "ab"
    # Special marks that mean nothing where they stand are left out like all special tokens, unless these are shown.
    pieces = run(families()["hermes special"], "b</think></tool_call>c", TextParams(), OutputParse(True, True))
    assert "".join(p.text for p in pieces) == "bc"
    shown = TextParams(skip_special_tokens=False)
    pieces = run(families()["hermes special"], "b</think>c", shown, OutputParse(True, True))
    assert "".join(p.text for p in pieces) == "b</think>c"


DETECTED = {
    "": Dialect(),
    "{{ messages }}": Dialect(),
    "{% if tools %}<tool_call>{% endif %}": Dialect(ToolDialect.HERMES),
    "<tool_call> <think> </think>": Dialect(ToolDialect.HERMES, THINK),
    "<tool_call><function=f><parameter=a>": Dialect(),
    "<tool_call>f<arg_key>a</arg_key>": Dialect(),
    "[TOOL_CALLS][": Dialect(ToolDialect.MISTRAL),
    "[TOOL_CALLS]f[ARGS] [THINK][/THINK]": Dialect(ToolDialect.MISTRAL, ReasoningDialect.MISTRAL, named=True),
    """<|start_header_id|> tools '{"name": "' + name + '", "parameters": '""": Dialect(ToolDialect.LLAMA),
    "<|start_header_id|>": Dialect(),
}


@pytest.mark.parametrize("source", DETECTED)
def test_a_template_shows_the_dialect(source: str) -> None:
    assert detect(source) == DETECTED[source]


def test_settings_overrule_the_template() -> None:
    assert detect(None) == Dialect()
    assert detect("<tool_call>", "llama") == Dialect(ToolDialect.LLAMA)
    assert detect("<tool_call><think></think>", "none", "none") == Dialect()
    assert detect(None, "mistral", "mistral") == Dialect(ToolDialect.MISTRAL, ReasoningDialect.MISTRAL)
    for bad in (("qwen", "auto"), ("auto", "yes")):
        with pytest.raises(ModelInvalid, match="_parser is"):
            detect("", *bad)
