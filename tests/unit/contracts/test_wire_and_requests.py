"""Frames are bounded and typed; requests and parameters cannot be built, nor decoded, with invalid values."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.requests import SCOPE, make_request

from isthmus.contracts import errors
from isthmus.contracts.errors import InvalidInput, IsthmusError, Unsupported, WireViolation
from isthmus.contracts.events import Abort, Command, Drain, Event, Outputs, Submit
from isthmus.contracts.ids import Namespace, RequestId, new_request_id, request_id
from isthmus.contracts.keys import MediaRef, PrefixScope
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.sampling import SamplingParams, TextParams
from isthmus.contracts.wire import FrameReader, encode_frame


@given(st.lists(st.integers(1, 40), min_size=1), st.data())
def test_frames_survive_any_cutting_of_the_stream(cuts: list[int], data: st.DataObject) -> None:
    sent: list[Command] = [Submit(make_request("a", [1, 2, 3])), Abort(RequestId("a")), Drain()]
    stream = b"".join(encode_frame(value) for value in sent)
    reader: FrameReader[Command] = FrameReader(Command)
    got: list[Command] = []
    start = 0
    while start < len(stream):
        size = data.draw(st.sampled_from(cuts))
        got += reader.feed(stream[start : start + size])
        start += size
    assert got == sent


@given(st.binary(max_size=64))
def test_garbage_is_a_violation_or_waits_for_more_but_never_anything_else(noise: bytes) -> None:
    reader: FrameReader[Event] = FrameReader(Event, limit=1024)
    try:
        values = reader.feed(noise)
    except WireViolation:
        return
    assert all(isinstance(value, Outputs) or value is not None for value in values)


def test_a_frame_over_the_limit_is_refused_before_it_arrives() -> None:
    reader: FrameReader[Command] = FrameReader(Command, limit=16)
    with pytest.raises(WireViolation, match="limit of 16"):
        reader.feed((17).to_bytes(4, "little"))
    with pytest.raises(WireViolation, match="limit of 4"):
        encode_frame("too long", limit=4)


def test_text_that_is_no_utf_8_is_a_violation() -> None:
    reader: FrameReader[str] = FrameReader(str)
    with pytest.raises(WireViolation, match="schema"):
        reader.feed(b"\x03\0\0\0\xa2\xaa\xff")


def test_a_frame_of_another_type_is_refused() -> None:
    reader: FrameReader[Command] = FrameReader(Command)
    with pytest.raises(WireViolation, match="schema"):
        reader.feed(encode_frame({"type": "exec", "code": "1"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1 << 21),
        ("seed", -1),
        ("seed", 1 << 64),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("logprobs", 21),
        ("stop_token_ids", tuple(range(65))),
        ("min_tokens", 9),
    ],
)
def test_sampling_parameters_refuse_by_field(field: str, value: object) -> None:
    values: dict[str, object] = {"max_tokens": 8, "seed": 1, field: value}
    with pytest.raises(InvalidInput) as caught:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert caught.value.field == field
    if not isinstance(value, float) or math.isfinite(value):
        raw = msgspec.msgpack.encode(values) if value != 1 << 64 else msgspec.msgpack.encode(values | {"seed": -5})
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(raw, type=SamplingParams)


@pytest.mark.parametrize("stop", [("",), ("x" * 257,), ("x",) * 17])
def test_stop_strings_are_bounded(stop: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput) as caught:
        TextParams(stop=stop)
    assert caught.value.field == "stop"


def test_requests_refuse_what_no_engine_takes() -> None:
    params = SamplingParams(max_tokens=2, seed=0)

    def build(**changes: object) -> EngineRequest:
        values: dict[str, object] = {"request_id": "a", "scope": SCOPE, "prompt_ids": [1], "sampling": params}
        return EngineRequest(**(values | changes))  # type: ignore[arg-type]

    for changes, field in [
        ({"prompt_ids": []}, "prompt"),
        ({"output_ids": [1, 2]}, "output_ids"),
        ({"priority": 101}, "priority"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": 1e9}, "deadline_s"),
        ({"request_id": "a b"}, "request_id"),
    ]:
        with pytest.raises(InvalidInput) as caught:
            build(**changes)
        assert caught.value.field == field
    with pytest.raises(Unsupported):
        build(media=(MediaRef(0, b"m" * 32),))
    with pytest.raises(Unsupported):
        build(scope=PrefixScope(Namespace(b"n" * 32), "m", "adapter"))


def test_request_ids_are_safe_everywhere() -> None:
    class Zeros:
        def token_bytes(self, count: int) -> bytes:
            return bytes(count)

    assert new_request_id("cmpl", Zeros()) == "cmpl-" + "0" * 24
    for bad in ("", "-a", "a" * 129, "a/b", "a\n", "a'b"):
        with pytest.raises(InvalidInput):
            request_id(bad)


def test_the_error_tree_is_its_docstring() -> None:
    text = errors.__doc__ or ""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, IsthmusError)]
    assert len({kind.code for kind in kinds}) == len(kinds), "codes are unique"
    for kind in kinds:
        assert kind.__name__ in text
        assert kind.code in text or kind in {IsthmusError, errors.JournalError}
