"""`isthmus bench restart` on few records: real kills of real processes, what it measures and what it says."""

import json
from pathlib import Path

import pytest

from isthmus.bench import restart
from isthmus.bench.restart_worker import Source, pieces
from isthmus.cli import bench_restart
from isthmus.contracts.blocks import RecordKind, Shape


def test_pieces_cover_everything_once() -> None:
    assert list(pieces(3, 10, 4)) == [(3, 7), (7, 11), (11, 13)]
    assert not list(pieces(3, 0, 4))


def test_records_of_a_source_are_the_same_always_and_differ() -> None:
    source = Source(Shape(RecordKind.BLOCK, 3, 1001), 7)
    payload, again = source.payloads(), Source(source.shape, 7).payloads()
    first = payload(source.key(1))
    assert len(first) == 3003
    assert first == again(source.key(1))
    assert first != payload(source.key(2))
    assert first != Source(source.shape, 8).payloads()(source.key(1))
    assert first[:1001] != first[1001:2002]


def told(first: int, count: int, at: float) -> dict[str, object]:
    return {"kept": [first, count], "at": at}


def test_blocks_are_old_when_their_write_had_returned_by_then() -> None:
    old, young = restart.split([told(0, 4, 1.0), told(4, 4, 2.0), told(8, 2, 2.5)], 2.0)
    assert (old, young) == ([(0, 4), (4, 4)], [(8, 2)])


def round_of(**other: object) -> dict[str, object]:
    usual: dict[str, object] = {
        "asked_before": 100,
        "hits_before": 90,
        "written_meanwhile": 10,
        "hits_after": 100,
        "reasons_after": {"hit": 100, "absent": 10},
        "young": 3,
        "young_hits": 2,
        "wrong": 0,
        "lag_s": 0.5,
        "served_again_s": 1.0,
        "daemon_ready_s": None,
    }
    return {**usual, **other}


def test_the_ratio_is_over_the_hits_before_and_what_was_written_counts_as_hit() -> None:
    whole = restart.summary([round_of(), round_of(hits_after=96, served_again_s=3.0, daemon_ready_s=0.7)])
    assert whole["asked"] == 220
    assert whole["hit_ratio_before"] == pytest.approx(200 / 220, abs=1e-6)
    assert whole["after_over_before"] == pytest.approx(196 / 200)
    assert not whole["held"]
    assert whole["served_again_s"] == {"median": 2.0, "most": 3.0}
    assert whole["daemon_ready_s"] == {"median": 0.7, "most": 0.7}
    assert restart.summary([round_of()])["held"]


@pytest.mark.slow
def test_kills_and_recoveries_are_measured(tmp_path: Path) -> None:
    plan = restart.Plan(
        tmp_path,
        blocks=256,
        chunks=4,
        chunk_bytes=4096,
        rounds=1,
        bytes_per_s=16e6,
        memory=16 << 20,
        records=3000,
        recoveries=1,
        delay_s=(0.3, 0.6),
        disk_seconds=0.001,
        disk_bytes=32 << 20,
    )
    said: list[str] = []
    found = {"kills": restart.kills(plan, said.append), "recovery": restart.recovery(plan, said.append)}
    for kind in restart.KILLS:
        one = found["kills"][kind]
        assert one["asked"] >= 256
        assert one["held"], one
        assert not one["wrong"]
        assert (one["daemon_ready_s"] is None) == (kind == "worker")
    one = found["recovery"]
    assert one["records"] >= 3000
    assert one["sampled_hits"] == one["sampled"] == 2000
    assert not one["wrong"]
    assert one["segments_scanned"] >= 1
    assert one["read_bytes"] > 0
    json.dumps(found)
    shown = bench_restart.lines(found)
    assert any(line.startswith("kill -9 of both") for line in shown)
    assert any(line.startswith("recovery after kill -9") for line in shown)
    assert not any(tmp_path.iterdir()), "what it made is gone"
