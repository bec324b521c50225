"""The pure parts of answers with calls and of demanded forms: order is kept, nothing is lost, limits are exact."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.contracts.clock import SystemEntropy
from isthmus.contracts.errors import InvalidInput, TooLarge, Unsupported
from isthmus.contracts.prompting import Piece, ToolDelta
from isthmus.gateway.answer import CollectedAnswer, CollectedCall
from isthmus.gateway.output_form import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, refusing_as, schema_text
from isthmus.gateway.parts import parts_of
from isthmus.gateway.sequence import Delta

# What a model wrote, in order: (kind, text), calls numbered as they come.
WRITTEN = st.lists(st.tuples(st.sampled_from(["reasoning", "text", "call"]), st.text("ab", max_size=4)), max_size=12)
Flat = list[tuple[str, str]]


def pieces_of(written: Flat) -> list[Piece]:
    """One piece a part; a call's name comes before its arguments, in a piece of its own."""
    pieces, calls = [], 0
    for kind, text in written:
        if kind == "call":
            pieces.append(Piece("", calls=(ToolDelta(calls, f"n{calls}"),)))
            pieces += [Piece("", calls=(ToolDelta(calls, None, char),)) for char in text]
            calls += 1
        else:
            pieces += [Piece(char) if kind == "text" else Piece("", reasoning=char) for char in text]
    return pieces


def expected(written: Flat) -> Flat:
    """The parts, neighbours of one kind joined, empty ones left out; calls with their names."""
    found: Flat = []
    for kind, text in written:
        if kind == "call":
            found.append((kind, f"n{sum(one == 'call' for one, _ in found)}:{text}"))
        elif text and found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + text)
        elif text:
            found.append((kind, text))
    return found


def collect(deltas: Sequence[Delta]) -> CollectedAnswer:
    async def run() -> CollectedAnswer:
        answer = CollectedAnswer(SystemEntropy())
        for delta in deltas:
            await answer.add(delta)
        return answer

    return asyncio.run(run())


@settings(deadline=None)
@given(WRITTEN, st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_an_answer_is_what_was_written_however_steps_cut_it(written: Flat, sizes: list[int]) -> None:
    pieces, deltas, start = pieces_of(written), [], 0
    while start < len(pieces):
        step = pieces[start : start + sizes[len(deltas) % len(sizes)]]
        start += len(step)
        parts = parts_of(step)
        assert (parts == ()) == all(not piece.reasoning and not piece.calls for piece in step)
        # One kind in a part, and one call: what a dialect shows as one event.
        assert all(bool(part.reasoning) + bool(part.text) + len(part.calls) == 1 for part in parts)
        deltas.append(Delta(0, "".join(piece.text for piece in step), [], None, parts=parts))
    answer = collect(deltas)
    shown = [
        ("call", f"{part.name}:{part.arguments}")
        if isinstance(part, CollectedCall)
        else ("reasoning" if part.reasoning else "text", part.text)
        for part in answer.parts
    ]
    assert shown == expected(written)
    assert len({call.id for call in answer.calls}) == len(answer.calls)
    assert answer.text == "".join(text for kind, text in written if kind == "text")


def nested(depth: int, leaf: object) -> dict[str, object]:
    value: dict[str, object] = {"a": leaf}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def test_schemas_have_limits_on_bytes_and_nesting() -> None:
    deepest = schema_text(nested(MAX_SCHEMA_DEPTH, 1), "f")
    assert deepest.count("{") == MAX_SCHEMA_DEPTH
    largest = {"a": "x" * (MAX_SCHEMA_BYTES - len('{"a":""}'))}
    assert len(schema_text(largest, "f")) == MAX_SCHEMA_BYTES
    for wrong, reason in (
        (nested(MAX_SCHEMA_DEPTH, {}), "nested over"),
        (nested(MAX_SCHEMA_DEPTH, []), "nested over"),
        ({"a": largest["a"] + "x"}, "bytes"),
        ({"a": "é" * (MAX_SCHEMA_BYTES // 2)}, "bytes"),
        ({"a": [0] * MAX_SCHEMA_BYTES}, "bytes"),
        ({"x" * MAX_SCHEMA_BYTES: 0}, "bytes"),
    ):
        with pytest.raises(TooLarge, match=reason) as caught:
            schema_text(wrong, "f")
        assert caught.value.field == "f"


@pytest.mark.parametrize("kind", [InvalidInput, TooLarge, Unsupported])
def test_a_refusal_keeps_its_kind_under_another_name(kind: type[InvalidInput]) -> None:
    with pytest.raises(kind, match="why") as caught, refusing_as("tools[1]"):
        raise kind("why", "constraint")
    assert (type(caught.value), caught.value.field) == (kind, "tools[1]")
