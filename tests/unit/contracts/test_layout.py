"""The format of state snapshots: its size, its digest, its limits."""

import pytest

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.layout import BlockFormat, Dtype, StateFormat

SHAPE = {"layers": 3, "channels": 640, "history": 3, "heads": 5, "key_dim": 32, "value_dim": 64}


def test_a_record_has_convolution_inputs_and_state_of_every_layer_in_float32() -> None:
    made = StateFormat(b"w" * 32, **SHAPE)
    assert made.conv_bytes == 640 * 3 * 4
    assert made.state_bytes == 3 * (640 * 3 + 5 * 32 * 64) * 4


def test_the_digest_differs_with_every_field() -> None:
    base = StateFormat(b"w" * 32, **SHAPE)
    others = [StateFormat(b"v" * 32, **SHAPE), StateFormat(b"w" * 32, **SHAPE, slice_index=1, slice_count=2)]
    others += [StateFormat(b"w" * 32, **SHAPE, slice_count=2), StateFormat(b"w" * 32, **SHAPE, arithmetic="exact")]
    others += [StateFormat(b"w" * 32, **(SHAPE | {name: SHAPE[name] + 1})) for name in SHAPE]
    digests = {made.digest() for made in [base, *others]}
    assert len(digests) == 1 + len(others)
    assert BlockFormat(b"w" * 32, Dtype.F32, 3, 640, 3, 5).digest() not in digests
    assert StateFormat(b"w" * 32, **SHAPE).digest() == base.digest()


def test_blocks_of_other_arithmetic_are_other_blocks() -> None:
    plain = BlockFormat(b"w" * 32, Dtype.F32, 3, 640, 3, 5)
    named = BlockFormat(b"w" * 32, Dtype.F32, 3, 640, 3, 5, arithmetic="exact")
    assert plain.digest() != named.digest()
    assert plain.block_bytes == named.block_bytes


@pytest.mark.parametrize(
    ("changes", "match"),
    [({name: 0}, name) for name in SHAPE] + [({"history": 17}, "history"), ({"slice_index": 1}, "slice")],
)
def test_what_no_model_has_is_refused_by_name(changes: dict[str, int], match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        StateFormat(b"w" * 32, **(SHAPE | changes))
    with pytest.raises(InvalidInput, match="digest"):
        StateFormat(b"w", **SHAPE)
