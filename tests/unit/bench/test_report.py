"""Results of `isthmus bench` and of benchmarks/ say alike where they come from."""

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from benchmarks import common

from isthmus.bench import report


def test_a_result_names_what_it_was_measured_with(tmp_path: Path) -> None:
    head = report.header("name", 7, {"requests": 3}, ["msgspec"])
    report.write(tmp_path / "folder" / "result.json", head, {"found": 1})
    written = json.loads((tmp_path / "folder" / "result.json").read_text())
    assert (written["benchmark"], written["seed"], written["settings"]) == ("name", 7, {"requests": 3})
    assert written["results"] == {"found": 1}
    assert written["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert written["machine"]["msgspec"] == version("msgspec")
    assert {"version", "commit", "tree_changed", "started", "load_average_before", "load_average_after"} < set(written)


def test_results_of_both_kinds_have_one_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    run = common.Run("name", 7, {})
    run.write({"found": 1})
    path = run.write({"found": 2})
    report.write(tmp_path / "other.json", report.header("name", 7, {}), {"found": 2})
    ours, other = json.loads(path.read_text()), json.loads((tmp_path / "other.json").read_text())
    assert ours.pop("seconds") >= 0
    assert ours["machine"].pop("torch") == version("torch")
    assert ours["commit"] == other["commit"] == report.commit()
    assert ours["machine"] == other["machine"] == report.machine()
    assert ours.keys() == other.keys()
    assert ours["results"] == {"found": 2}
