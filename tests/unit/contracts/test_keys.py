"""Identity of state: equal keys mean equal tenant, model, adapter, tokens and media from 0 on, and equal bytes."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.framing import frame
from isthmus.contracts.ids import Namespace
from isthmus.contracts.keys import MediaRef, PrefixScope, block_key, prefix_chain, prefix_key
from isthmus.contracts.layout import BlockFormat, Codec, Dtype

SCOPE = PrefixScope(Namespace(b"n" * 32), "model")
FORMAT = BlockFormat(b"w" * 32, Dtype.F32, layers=2, kv_heads=3, head_dim=4, block_tokens=16)
ROOT_HEX = "8a971bb741a41f1e3f338900afb46bc33af963551adc726f5b038c9bf3ea7732"
SECOND_HEX = "1b5a09b2e1c30bb3f55adc9e593553a1cffe9a7d998b10cc69f6cc78aedafde9"
BLOCK_HEX = "881356c8e9a64c03d16595ac43caca95d85f1dcd93638df7ce79015ddd06c9da"
TOKENS = st.lists(st.integers(0, 3), max_size=24)


def test_keys_are_stable_over_releases() -> None:
    """Stored state outlives a process: these values may only change together with the version in their domain."""
    assert SCOPE.root().hex() == ROOT_HEX
    keys = prefix_chain(SCOPE, list(range(8)), 4)
    assert keys[-1].hex() == SECOND_HEX
    assert block_key(SCOPE, keys[-1], FORMAT.digest()).hex() == BLOCK_HEX


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_chains_agree_exactly_as_far_as_the_tokens_do(left: list[int], right: list[int], size: int) -> None:
    ours, theirs = prefix_chain(SCOPE, left, size), prefix_chain(SCOPE, right, size)
    assert len(ours) == len(left) // size
    for index, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        end = (index + 1) * size
        assert (mine == yours) == (left[:end] == right[:end])


@pytest.mark.parametrize(
    "other",
    [
        PrefixScope(Namespace(b"m" * 32), "model"),
        PrefixScope(Namespace(b"n" * 32), "mode"),
        PrefixScope(Namespace(b"n" * 32), "model", "adapter"),
        PrefixScope(Namespace(b"n" * 32), "model", ""),
    ],
)
def test_another_scope_is_another_identity(other: PrefixScope) -> None:
    assert prefix_chain(other, [1, 2], 2) != prefix_chain(SCOPE, [1, 2], 2)


def test_the_namespace_keys_every_hash_not_only_the_root() -> None:
    other = PrefixScope(Namespace(b"m" * 32), "model")
    parent = SCOPE.root()
    assert prefix_key(SCOPE, parent, [1]) != prefix_key(other, parent, [1])
    assert block_key(SCOPE, parent, b"f" * 32) != block_key(other, parent, b"f" * 32)


def test_media_count_by_place_and_content() -> None:
    def keys(*media: MediaRef) -> list[bytes]:
        return list(prefix_chain(SCOPE, [1] * 8, 4, media))

    seen = [keys(), keys(MediaRef(0, b"a" * 32)), keys(MediaRef(1, b"a" * 32)), keys(MediaRef(0, b"b" * 32))]
    assert len({chain[0] for chain in seen}) == 4
    late = keys(MediaRef(5, b"a" * 32))
    assert late[0] == keys()[0]
    assert late[1] != keys()[1]


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_framing_never_confuses_two_lists_of_fields(left: list[bytes], right: list[bytes]) -> None:
    assert (frame(b"d", *left) == frame(b"d", *right)) == (left == right)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": b"x" * 32},
        {"dtype": Dtype.BF16},
        {"layers": 3},
        {"kv_heads": 4},
        {"head_dim": 8},
        {"block_tokens": 8},
        {"slice_count": 2},
        {"slice_index": 1, "slice_count": 2},
    ],
)
def test_every_field_of_the_format_is_part_of_the_block_key(change: dict[str, object]) -> None:
    assert replace(FORMAT, **change).digest() != FORMAT.digest()  # type: ignore[arg-type]


def test_the_layout_s_sizes() -> None:
    assert FORMAT.layer_bytes == 2 * 16 * 3 * 4 * 4
    assert FORMAT.block_bytes == 2 * FORMAT.layer_bytes
    assert replace(FORMAT, dtype=Dtype.BF16).block_bytes * 2 == FORMAT.block_bytes
    assert Codec.RAW in Codec


@pytest.mark.parametrize(
    "change", [{"weights": b"short"}, {"layers": 0}, {"slice_index": 1}, {"head_dim": 1 << 20}, {"block_tokens": 0}]
)
def test_a_format_that_makes_no_sense_cannot_be_built(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        replace(FORMAT, **change)  # type: ignore[arg-type]


def test_bad_scopes_and_media_cannot_be_built_or_decoded() -> None:
    with pytest.raises(InvalidInput):
        PrefixScope(Namespace(b"short"), "model")
    with pytest.raises(InvalidInput):
        MediaRef(-1, b"a" * 32)
    raw = msgspec.msgpack.encode({"namespace": b"short", "model": "m"})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(raw, type=PrefixScope)
