"""The erasure table: what is dead, and how the table comes and goes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.contracts.blocks import NO_SESSION, Owner
from isthmus.contracts.errors import InvalidInput, Overloaded
from isthmus.state.kv.log.erasure import ENTRY_BYTES, HEADER_BYTES, ErasureTable, Scope, ScopeKind
from isthmus.state.kv.log.format import ENTRY, ROW

ROOM = 4096
IDS = [bytes([number]) * 16 for number in (0, 1, 2)]
KEYS = [bytes([number]) * 32 for number in (0, 1, 2)]


def rows_of(records: list[tuple[bytes, bytes, bytes, int]]) -> np.ndarray:
    packed = [ROW.pack(key, name, session, stamp, 1, 0, 1, 1, 1, 0, 0, 0) for key, name, session, stamp in records]
    return np.frombuffer(b"".join(packed), ENTRY)


def test_older_records_of_a_scope_are_dead_and_newer_ones_are_not() -> None:
    table = ErasureTable().forget(Scope.of(IDS[1]), ROOM)
    assert (table.epoch, table.number) == (1, 1)
    for session in IDS:
        assert table.dead(KEYS[0], Owner(IDS[1], session), 0)
        assert not table.dead(KEYS[0], Owner(IDS[1], session), 1)
        assert not table.dead(KEYS[0], Owner(IDS[2], session), 0)
    table = table.forget(Scope.of(IDS[2], IDS[1]), ROOM).forget(Scope.of_key(KEYS[2]), ROOM)
    assert table.dead(KEYS[0], Owner(IDS[2], IDS[1]), 1)
    assert not table.dead(KEYS[0], Owner(IDS[2], IDS[1]), 2)
    assert not table.dead(KEYS[0], Owner(IDS[2], NO_SESSION), 0)
    assert table.dead(KEYS[2], Owner(IDS[2], NO_SESSION), 2)
    assert not table.dead(KEYS[2], Owner(IDS[2], NO_SESSION), 3)


def test_a_scope_says_what_it_is() -> None:
    assert Scope.of(IDS[1]).kind is ScopeKind.NAMESPACE
    assert Scope.of(IDS[1], IDS[2]) == Scope(ScopeKind.SESSION, IDS[1] + IDS[2])
    assert (Scope.of(IDS[1], IDS[2]).namespace_id, Scope.of(IDS[1], IDS[2]).session_id) == (IDS[1], IDS[2])
    assert (Scope.of(IDS[1]).session_id, Scope.of_key(KEYS[1]).namespace_id) == (NO_SESSION, b"")
    with pytest.raises(InvalidInput):
        Scope(ScopeKind.KEY, b"short")


def test_an_erasure_of_the_same_scope_takes_the_place_of_the_older() -> None:
    table = ErasureTable()
    for _ in range(5):
        table = table.forget(Scope.of(IDS[1]), ROOM)
    assert [(entry.epoch, entry.number) for entry in table.entries] == [(5, 5)]


def test_it_is_full_of_what_is_pending_only() -> None:
    room = HEADER_BYTES + 3 * ENTRY_BYTES
    table = ErasureTable()
    for number in range(3):
        table = table.forget(Scope.of_key(KEYS[number]), room)
    with pytest.raises(Overloaded):
        table.forget(Scope.of(IDS[1]), room)
    assert len(table.encode(1, 0)) == room
    table = table.finish(1)
    assert [entry.done for entry in table.entries] == [True, False, False]
    table = table.forget(Scope.of(IDS[1]), room)
    assert [entry.number for entry in table.entries] == [2, 3, 4]
    assert [entry.number for entry in table.pending] == [2, 3, 4]


def test_the_epoch_is_never_under_a_stamp() -> None:
    table = ErasureTable(3).at_least(9)
    assert table.epoch == 9
    assert table.at_least(2) is table
    assert table.forget(Scope.of(IDS[1]), ROOM).dead(KEYS[0], Owner(IDS[1]), 9)


def test_segments_that_cannot_hold_the_dead_are_passed_over() -> None:
    table = ErasureTable().forget(Scope.of(IDS[1]), ROOM).forget(Scope.of(IDS[2], IDS[1]), ROOM)
    assert table.touches([IDS[1]], 0)
    assert not table.touches([IDS[1]], 1)
    assert table.touches([IDS[2]], 1)
    assert not table.touches([IDS[0]], 0)
    assert table.forget(Scope.of_key(KEYS[0]), ROOM).touches([], 2)


records = st.tuples(st.sampled_from(KEYS), st.sampled_from(IDS), st.sampled_from(IDS), st.integers(0, 6))
scopes = st.one_of(
    st.builds(Scope.of, st.sampled_from(IDS), st.sampled_from(IDS)), st.builds(Scope.of_key, st.sampled_from(KEYS))
)


@given(st.lists(scopes, max_size=6), st.lists(records, max_size=20))
def test_directories_agree_with_single_records(forgotten: list[Scope], held: list[tuple[bytes, ...]]) -> None:
    table = ErasureTable()
    for scope in forgotten:
        table = table.forget(scope, ROOM)
    rows = rows_of(held)  # type: ignore[arg-type]
    single = [table.dead(key, Owner(name, session), stamp) for key, name, session, stamp in held]  # type: ignore[arg-type]
    assert table.dead_rows(rows).tolist() == single


@given(st.lists(scopes, max_size=8), st.integers(0, 8), st.integers(1, 1 << 60))
def test_it_comes_back(forgotten: list[Scope], done: int, seq: int) -> None:
    table = ErasureTable()
    for scope in forgotten:
        table = table.forget(scope, ROOM)
    table = table.finish(done)
    data = table.encode(seq, 77)
    assert ErasureTable.decode(data + bytes(100), 77) == (seq, table)
    assert ErasureTable.decode(data, 78) is None
    assert ErasureTable.decode(data[:-1], 77) is None
    for bit in range(0, len(data) * 8, 37):
        flipped = bytearray(data)
        flipped[bit >> 3] ^= 1 << (bit & 7)
        assert ErasureTable.decode(bytes(flipped), 77) is None
