"""`isthmus bench store`: every form of ours puts, gets and gives back what was put; the far ends in this project and in
the peers' environments measure the same; figures, ratios and goals are what they say.
"""

import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isthmus.bench import store_ours, store_records
from isthmus.bench.disk_limits import DiskRate
from isthmus.bench.store import Case, cases, figures
from isthmus.bench.store_ratios import judged, ratios
from isthmus.bench.store_targets import OURS
from isthmus.cli.main import main
from isthmus.state.kv.arena import arena as arena_module
from isthmus.state.kv.log import reader as reader_module

SIZE = 8 << 20
PEERS = Path(__file__).resolve().parents[3] / "benchmarks" / "peers"
HASHING = ((arena_module, "copy_digests"), (arena_module, "copy_verified"), (reader_module, "digests_of"))


@pytest.fixture
def memory() -> Iterator[store_records.Memory]:
    descriptor = store_records.create_memory(SIZE)
    yield store_records.Memory(f"/proc/{os.getpid()}/fd/{descriptor}", SIZE)
    os.close(descriptor)


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind != "daemon"])
def test_every_form_of_ours_gives_back_what_was_put(
    kind: str, memory: store_records.Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in HASHING:  # what is unverified replaces these, for good
        monkeypatch.setattr(module, name, getattr(module, name))
    store = store_ours.make(store_ours.Making(kind, tmp_path, SIZE), memory)
    for seed, (size, batch) in enumerate([(64 << 10, 32), (1 << 20, 1), (4 << 20, 2)]):
        question = {"size": size, "records": SIZE // size, "batch": batch, "seed": seed}
        answer = store_records.answer(store, memory, question)
        assert answer["intact"]
        for operation in ("put", "get"):
            assert len(answer[operation]["calls_s"]) == SIZE // size // batch
            assert answer[operation]["wall_s"] >= sum(answer[operation]["calls_s"]) > 0
    held = getattr(store, "store", None) or getattr(store, "_log", None)
    if held is not None:
        held.close()


@pytest.mark.parametrize("size", [1 << 20, 32 << 20, 128 << 20, 256 << 20, 512 << 20])
def test_logs_are_possible_for_every_size_of_question(size: int) -> None:
    assert store_ours.Making("log", Path(), size).log.capacity >= size * 2


def test_the_command_measures_ours_and_writes_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("isthmus.bench.store.MOST_TRIES", 1)
    rates = [DiskRate("io_uring", name, 1 << 20, 1, 1.0, 1.0, 1.0) for name in ("read", "write")]
    monkeypatch.setattr("isthmus.bench.store.disk_rates", lambda *_: rates)
    base = ["bench", "store", "--size", "1MiB", "--bytes", "8MiB", "--rounds", "1"]
    kinds = [part for kind in ("memcpy", "arena", "daemon", "log") for part in ("--kind", kind)]
    assert main([*base, *kinds, "--json", "r.json"]) == 0
    result = json.loads(Path("r.json").read_text())["results"]
    assert {ratio["kind"] for ratio in result["ratios"]} == {"memcpy", "disk", "depth"}
    assert all(len(store["cases"]) == 2 for store in result["stores"].values())
    assert "goals" in capsys.readouterr().out
    assert main([*base, "--kind", "other"]) == 2
    assert main([*base, "--peer", "mooncake", "--peers-dir", str(tmp_path)]) == 2


# The far end of the peers


@pytest.fixture
def far() -> ModuleType:
    spec = importlib.util.spec_from_file_location("records", PEERS / "records.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["answer", "measured", "cpu_seconds"])
def test_peers_are_measured_by_the_same_lines(far: ModuleType, name: str) -> None:
    def body(module: Any) -> str:
        return inspect.getsource(getattr(module, name)).split('"""')[-1]

    assert body(far) == body(store_records)


def test_peers_are_asked_for_the_same_records(far: ModuleType, memory: store_records.Memory) -> None:
    question = {"size": 1 << 20, "records": 3, "batch": 1, "seed": 5}
    descriptor = store_records.create_memory(SIZE)
    theirs = far.Memory(f"/proc/{os.getpid()}/fd/{descriptor}", SIZE).records(question)
    os.close(descriptor)
    ours = memory.records(question)
    assert [one.key for one in ours] == [one.key for one in theirs]
    assert [bytes(one.source) for one in ours] == [bytes(one.source) for one in theirs]


# Figures


def answered(put_s: float, get_s: float, **more: Any) -> dict[str, Any]:
    runs = {name: {"wall_s": wall, "cpu_s": wall / 2, "calls_s": [wall]} for name, wall in
            (("put", put_s), ("get", get_s))}  # fmt: skip
    return {**runs, "other_load": 0.0, **more}


def test_batches_are_of_one_and_of_several() -> None:
    assert cases([1 << 20], 64 << 20) == [Case(1 << 20, 64, 1), Case(1 << 20, 64, 32)]
    assert cases([32 << 20], 256 << 20) == [Case(32 << 20, 8, 1), Case(32 << 20, 8, 4)]


def test_noisy_rounds_count_only_when_there_is_no_other() -> None:
    case = Case(1 << 20, 1000, 1)
    found = figures(case, [answered(1.0, 2.0), answered(0.1, 0.1, noisy=True)], "put")
    assert (found["gb_per_s"], found["noisy"]) == (pytest.approx(1.0486, abs=1e-3), False)
    assert figures(case, [answered(0.1, 0.1, noisy=True)], "put")["noisy"]


def test_goals_are_judged_by_their_worst_case() -> None:
    single, batched = Case(1 << 20, 64, 1), Case(1 << 20, 64, 32)

    def speed(value: float) -> dict[str, dict[str, float]]:
        return {"put": {"gb_per_s": value}, "get": {"gb_per_s": value}}

    speeds = {
        "log": {single: speed(0.5), batched: speed(1.9)},
        "log-unverified": {single: speed(0.5), batched: speed(2.0)},
        "lmcache-disk": {single: speed(1.0), batched: speed(1.0)},
    }
    disk = [DiskRate("io_uring", name, 1 << 20, depth, rate, 1.0, 1.0) for name in ("read", "write")
            for depth, rate in ((1, 0.5), (32, 2.0))]  # fmt: skip
    goals = {goal["goal"]: goal for goal in judged(ratios(speeds, disk))}
    at_best = goals["log put and get over the disk's best queue depth"]
    assert (at_best["reached"], at_best["of"]) == (2, 4)
    assert at_best["worst"]["value"] == 0.25
    alone = goals["log get, one record a call, over the disk at queue depth 1"]
    assert (alone["reached"], alone["of"], alone["worst"]["value"]) == (1, 1, 1.0)
    assert goals["over the best peer, batches of 1 MiB and more"]["of"] == 2
