"""The fingerprint table with keys as they are (uniform), and at its limits."""

from typing import Any

import numpy as np
import pytest

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.index.partitions import Partitions
from isthmus.state.kv.index.slots import Slots
from isthmus.state.kv.index.table import LOCATIONS, FingerprintTable

MOST_BYTES = 16


def some_keys(count: int, seed: int = 1) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(32 * count), np.uint8).reshape(count, 32)


def numbers(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint64)


def test_single_keys() -> None:
    table = FingerprintTable()
    one, two = (row.tobytes() for row in some_keys(2))
    assert table.get(one) == -1
    assert table.candidates(one) == []
    table.add(one, 5)
    table.add(one, 5)
    table.add(two, LOCATIONS - 1)
    assert (table.get(one), table.get(two), len(table)) == (5, LOCATIONS - 1, 2)
    table.add(one, 7)
    assert sorted(table.candidates(one)) == [5, 7]
    assert table.discard(one, 5)
    assert not table.discard(one, 5)
    assert table.candidates(one) == [7]


@pytest.mark.parametrize("batch", [1, 40, 100, 3000, 50_000])
def test_uniform_keys_come_and_go_in_batches(batch: int) -> None:
    count = min(100_000, batch * 200)
    table = FingerprintTable(partition_slots=16_384)
    keys, others = some_keys(count), some_keys(1000, seed=2)
    for start in range(0, count, batch):
        table.put(keys[start : start + batch], numbers(min(batch, count - start), start))
    assert len(table) == count
    assert (table.find(keys) == np.arange(count)).all()
    assert (table.find(others) == -1).all()
    assert not table.remove(others, numbers(1000)).any()
    assert not table.remove(keys[:1000], numbers(min(count, 1000), count)).any(), "other locations than theirs"
    assert table.replace(keys, numbers(count), numbers(count, count)).all()
    assert not table.replace(keys, numbers(count), numbers(count)).any()
    assert (table.find(keys) == np.arange(count, 2 * count)).all()
    half = count // 2
    for start in range(0, half, batch):
        end = min(start + batch, half)
        assert table.remove(keys[start:end], numbers(end - start, count + start)).all()
    assert (table.find(keys[:half]) == -1).all()
    assert (table.find(keys[half:]) == np.arange(count + half, 2 * count)).all()
    assert len(table) == count - half


def test_a_batch_may_name_the_same_pair_twice() -> None:
    table = FingerprintTable()
    keys = np.tile(some_keys(500), (3, 1))
    places = np.concatenate([numbers(500), numbers(500), numbers(500, 1000)])
    table.put(some_keys(20_000, seed=3), numbers(20_000))
    before = len(table)
    table.put(keys, places)
    table.put(keys, places)
    assert len(table) == before + 1000
    assert table.remove(keys, places).sum() == 1000
    assert len(table) == before


@pytest.mark.parametrize("first", [0, 1000])
def test_replacing_goes_pair_by_pair(first: int) -> None:
    table = FingerprintTable()
    keys = some_keys(300)
    table.put(keys, numbers(300, first))
    table.put(keys, numbers(300, 1000 - first))
    # What comes is there already: once, afterwards.
    assert table.replace(keys, numbers(300), numbers(300, 1000)).all()
    assert len(table) == 300
    assert all(table.candidates(row.tobytes()) == [1000 + at] for at, row in enumerate(keys))
    # The same pair twice, then what became of it: the first of the two moves it.
    done = table.replace(np.tile(keys, (3, 1)), np.tile(numbers(300, 1000), 3)[:900], numbers(900, 2000))
    assert done.tolist() == [True] * 300 + [False] * 600
    assert (table.find(keys) == np.arange(2000, 2300)).all()
    done = table.replace(
        np.tile(keys, (2, 1)), np.concatenate([numbers(300, 2000), numbers(300, 3000)]), numbers(600, 3000)
    )
    assert done.all()
    assert (table.find(keys) == np.arange(3300, 3600)).all()


def test_keys_with_one_hash_are_all_candidates() -> None:
    """Far more than a partition could hold at one place; they cannot be told apart, and none is lost."""
    table = FingerprintTable(partition_slots=2048)
    table.put(some_keys(3000), numbers(3000))
    alike = np.full((5000, 32), 255, np.uint8)
    table.put(alike, numbers(5000, 10_000))
    for place in range(15_000, 15_050):
        table.add(alike[0].tobytes(), place)
    assert sorted(table.candidates(alike[0].tobytes())) == list(range(10_000, 15_050))
    assert (table.find(some_keys(3000)) == np.arange(3000)).all()
    assert table.remove(alike, numbers(5000, 10_000)).all()
    assert len(table) == 3050
    assert table.discard(alike[0].tobytes(), 15_000)
    assert sorted(table.candidates(alike[0].tobytes())) == list(range(15_001, 15_050))


def test_no_key_takes_more_than_16_bytes_with_one_more_at_a_time() -> None:
    table = FingerprintTable()
    keys = some_keys(72_000)
    table.put(keys[:10_000], numbers(10_000))
    worst = table.memory_bytes / len(table)
    for place in range(10_000, 72_000):
        table.add(keys[place].tobytes(), place)
        if place % 16 == 0 or place < 11_000:
            worst = max(worst, table.memory_bytes / len(table))
    assert worst <= MOST_BYTES
    assert table._parts.directory.parts > 1, "it split on the way"
    assert (table.find(keys) == np.arange(72_000)).all()


@pytest.mark.parametrize("expected", [0, 400_000])
def test_no_key_takes_more_than_16_bytes_while_many_come_and_go(expected: int) -> None:
    """Up to 400,000 and back: partitions join again, and what they took is given back."""
    table = FingerprintTable(expected)
    count = 400_000
    keys = some_keys(count)
    least = max(10_000, expected // 2)
    worst = 0.0
    most_parts = 0
    for start in range(0, count, 2500):
        table.put(keys[start : start + 2500], numbers(2500, start))
        most_parts = max(most_parts, table._parts.directory.parts)
        worst = max(worst, table.memory_bytes / len(table)) if len(table) >= least else worst
    for start in range(0, count - 10_000, 2500):
        assert table.remove(keys[start : start + 2500], numbers(2500, start)).all()
        worst = max(worst, table.memory_bytes / len(table)) if len(table) >= least else worst
    assert worst <= MOST_BYTES
    assert table._parts.directory.parts < most_parts or expected
    assert (table.find(keys[-10_000:]) == np.arange(count - 10_000, count)).all()


def test_what_is_counted_is_what_is_resident() -> None:
    """Pages in the process's tables against `memory_bytes`, after growing and shrinking."""
    table = FingerprintTable()
    keys = some_keys(300_000)
    table.put(keys, numbers(300_000))
    for start in range(0, 200_000, 5000):
        table.remove(keys[start : start + 5000], numbers(5000, start))
    resident = 0
    addresses = {table._slots.words.ctypes.data, table._slots.tags.ctypes.data}
    with open("/proc/self/smaps") as lines:
        inside = False
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(edge, 16) for edge in first.split("-"))
                inside = any(low <= address < high for address in addresses)
            elif inside and first == "Rss:":
                resident += int(line.split()[1]) * 1024
    assert 0 < resident <= table.memory_bytes + 65_536


def test_one_key_never_rebuilds_more_than_one_partition_and_its_two_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    store = Partitions._store

    def counted(*arguments: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        store(*arguments, **named)

    monkeypatch.setattr(Partitions, "_store", counted)
    table = FingerprintTable(partition_slots=2048)
    most = total = 0
    for place, row in enumerate(some_keys(20_000)):
        calls = 0
        table.add(row.tobytes(), place)
        most, total = max(most, calls), total + calls
    assert most == 3
    assert total < 400


def test_without_memory_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    table = FingerprintTable(partition_slots=2048)
    keys = some_keys(40_000)
    table.put(keys[:1000], numbers(1000))

    def refuse(slots: Slots, regions: int) -> None:
        raise OSError("no memory")

    def add_all() -> None:
        for place in range(1000, 40_000):
            table.add(keys[place].tobytes(), place)

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "_resize", refuse)
        with pytest.raises(MemoryError):
            table.put(keys, numbers(40_000))
        assert (table.find(keys[:1000]) == np.arange(1000)).all()
        with pytest.raises(MemoryError):
            add_all()
    kept = len(table)
    assert 1000 < kept < 40_000
    assert (table.find(keys[:kept]) == np.arange(kept)).all()
    table.put(keys, numbers(40_000))
    assert (table.find(keys) == np.arange(40_000)).all()


@pytest.mark.parametrize("shape", [(3, 31), (32,), (1, 2, 32)])
def test_keys_of_another_form_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="32"):
        FingerprintTable().find(np.zeros(shape, np.uint8))


def test_other_bad_input_is_refused() -> None:
    table = FingerprintTable()
    with pytest.raises(InvalidInput, match="bytes"):
        table.find(np.zeros((1, 32), np.int64))
    with pytest.raises(InvalidInput, match="locations"):
        table.put(some_keys(2), numbers(3))
    with pytest.raises(InvalidInput, match="locations"):
        table.put(some_keys(1), numbers(1, LOCATIONS))
    with pytest.raises(InvalidInput, match="location"):
        table.add(bytes(32), LOCATIONS)
    with pytest.raises(InvalidInput, match="32 bytes"):
        table.get(bytes(31))
    with pytest.raises(InvalidInput, match="expected"):
        FingerprintTable(-1)
    with pytest.raises(InvalidInput, match="power of two"):
        FingerprintTable(partition_slots=3000)
    assert len(table) == 0


def test_empty_batches_and_slices_of_larger_arrays() -> None:
    table = FingerprintTable()
    empty = np.empty((0, 32), np.uint8)
    table.put(empty, numbers(0))
    assert table.find(empty).shape == (0,)
    assert table.remove(empty, numbers(0)).shape == (0,)
    assert table.replace(empty, numbers(0), numbers(0)).shape == (0,)
    wide = np.random.default_rng(5).integers(0, 256, (4000, 40), np.uint8)
    table.put(wide[::2, 4:36], numbers(2000))
    assert (table.find(np.ascontiguousarray(wide[::2, 4:36])) == np.arange(2000)).all()
