"""The pure parts of the edge: seeds, the depth scan, offsets, traces, settings, hosts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.contracts.errors import ConfigInvalid
from isthmus.gateway.decode import check_depth
from isthmus.gateway.errors import HttpError
from isthmus.gateway.message import check_host, target_path
from isthmus.gateway.plan import child_seed
from isthmus.gateway.render import legacy_token
from isthmus.gateway.sequence import TextOffsets
from isthmus.gateway.settings import GatewaySettings

LEAVES = st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\[]{}é', max_size=8)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max((depth_of(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((depth_of(item) for item in value), default=0)
    return 0


@given(VALUES, st.integers(1, 4))
def test_the_depth_scan_agrees_with_a_parser(value: object, limit: int) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    # A scan may pass early on few brackets, never refuse what is within the limit, never pass what is over it.
    if depth_of(value) <= limit:
        check_depth(body, limit)
    else:
        with pytest.raises(HttpError, match=f"over {limit} levels"):
            check_depth(body, limit)


def test_the_first_choice_keeps_the_seed_and_others_are_derived() -> None:
    assert child_seed(42, 0) == 42
    derived = [child_seed(42, choice) for choice in range(1, 100)]
    assert len(set(derived)) == 99
    assert all(0 <= seed < 2**64 for seed in derived)
    # Frozen: a change would give other answers for the same seed.
    assert child_seed(42, 1) == 7563686785053448561


@given(st.text(max_size=30), st.lists(st.integers(1, 3), max_size=40))
def test_offsets_are_where_tokens_start(text: str, sizes: list[int]) -> None:
    raw, offsets, start = text.encode("utf-8", "replace"), TextOffsets(), 0
    for size in [*sizes, len(raw) + 1]:
        part = raw[start : start + size]
        offset = offsets.next(part)
        assert offset == len(raw[:start].decode("utf-8", "ignore"))
        start += size


def test_tokens_that_are_not_text_are_shown_as_bytes() -> None:
    assert legacy_token("é".encode()) == "é"
    assert legacy_token(b"\xe2\x80") == "bytes:\\xe2\\x80"


def test_targets_become_paths() -> None:
    assert target_path(b"/a/b?c=d#e") == "/a/b"
    assert target_path(b"http://host:80/a?b") == "/a"
    assert target_path(b"*") == "*"
    for bad in (b"a", b"", b"/\x7f", b"/ a", "/é".encode()):
        with pytest.raises(HttpError):
            target_path(bad)


def test_hosts_may_be_allowed_by_name() -> None:
    check_host("isthmus.internal:8000", ("isthmus.internal",))
    with pytest.raises(HttpError):
        check_host("isthmus.internal.evil", ("isthmus.internal",))


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70000}, {"max_body_bytes": 0}, {"header_timeout_s": -1}, {"default_deadline_s": 0.0},
     {"max_deadline_s": 1e9}, {"default_deadline_s": 4000.0}],
)  # fmt: skip
def test_settings_refuse_what_has_no_meaning(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigInvalid, match=next(iter(wrong))):
        GatewaySettings(**wrong)  # type: ignore[arg-type]
