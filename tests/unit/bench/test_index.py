"""`isthmus bench index` on few keys: what it measures, and what it says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from isthmus.bench import index
from isthmus.cli.main import main


def test_sizes_end_with_what_was_asked_for() -> None:
    assert index.sizes(20_000) == [20_000]
    assert index.sizes(1_000_000) == [1_000_000]
    assert index.sizes(30_000_000) == [1_000_000, 10_000_000, 30_000_000]


def test_a_seed_draws_the_same_keys_and_its_streams_other_ones() -> None:
    assert np.array_equal(index.drawn(1, 2, 100), index.drawn(1, 2, 100))
    assert not np.array_equal(index.drawn(1, 2, 100), index.drawn(1, 3, 100))
    assert not np.array_equal(index.drawn(2, 2, 100), index.drawn(1, 2, 100))


@pytest.mark.parametrize("size", [1000, 10_000, 90_000])
def test_the_rule_for_a_dictionary_agrees_with_one(size: int) -> None:
    table = {at.to_bytes(32, "little"): at for at in range(size)}
    assert index.dict_bytes(size) == pytest.approx(index.dict_bytes(size, table), rel=0.15)
    assert sys.getsizeof(table) < index.dict_bytes(size, table)


def test_the_command_writes_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(index, "_NEW", 5000)
    monkeypatch.setattr(index, "_SAMPLE", 5000)
    monkeypatch.setattr(index, "_ROUNDS", 1)
    monkeypatch.setattr(index, "SIZES", (10_000, 20_000))
    monkeypatch.setattr(index, "DICT_MOST", 10_000)
    assert main(["bench", "index", "--keys", "20000", "--json", "result.json"]) == 0
    shown = capsys.readouterr()
    assert "20000 keys" in shown.out
    assert "extrapolated" in shown.out
    assert "table, 20000 keys" in shown.err
    written = json.loads(Path("result.json").read_text())
    assert written["benchmark"] == "index"
    assert set(written["results"]["dict"]) == set(written["results"]["table"]) == {"10000", "20000"}
    table = written["results"]["table"]["20000"]
    assert 10 < table["bytes_per_key"] <= table["worst_bytes_per_key_until_here"] <= 16
    assert set(table["find_hit_ns"]) == {"get", "1", "64", "4096"}
    assert set(table["put_ns"]) == {"1000000", "1", "64", "4096"}
    assert table["false_positives"] == 0


def test_numbers_of_keys_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "index", "--keys", "5"]) == 2
