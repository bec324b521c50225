"""The memory that the daemon reads into for a client: an answer that nobody waits for any more spoils no later one."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.stores import LOG, SHAPE, key_of, payload_of, read_under, store_all

from isthmus.contracts.blocks import Outcome, Reason, Tier, Want
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.state.kv.client import open_client
from isthmus.state.kv.daemon import Daemon
from isthmus.state.kv.lanepool import ClientSettings
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import open_store

CLOCK = SystemClock()
WITHIN_S = 10.0


def test_a_read_that_ends_late_does_not_lie_among_the_answers_of_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = StoreSettings(arena_bytes=1 << 20, region_bytes=1 << 19, path=str(tmp_path / "log"), log=LOG)
    store = open_store(settings, CLOCK, SystemEntropy())
    daemon = Daemon(store, DaemonSettings(socket=str(tmp_path / "run" / "s")), CLOCK, SystemEntropy())
    daemon.start()
    chosen = ClientSettings(lanes=1, window_bytes=1 << 20, area_bytes=1 << 19, backoff_s=(0.001, 0.01))
    client = open_client(tmp_path / "run" / "s", CLOCK, chosen)
    store_all(client, ["late", "next"])
    assert client.flush(WITHIN_S)
    store.admin.evict(Tier.DRAM, 1 << 20, 1.0)
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    read = store.read_leased

    def read_leased(number: int, holder: int, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        if wants[0].key == key_of("late"):
            begun.set()
            assert go_on.wait(WITHIN_S)
            outcomes = read(number, holder, wants, WITHIN_S)
            wants[0].into[:] = payload_of("late", SHAPE.record_bytes)
            ended.set()
            return outcomes
        outcomes = read(number, holder, wants, timeout_s)
        # What is there now was verified. Before the daemon looks at it again, the one that nobody waits for is done.
        go_on.set()
        assert ended.wait(WITHIN_S)
        return outcomes

    monkeypatch.setattr(store, "read_leased", read_leased)
    with client.lease([key_of("late"), key_of("next")], 30.0) as lease:
        into = bytearray(SHAPE.record_bytes)
        (outcome,) = client.read(lease, [Want(key_of("late"), SHAPE, memoryview(into))], 0.2)
        assert outcome.reason is Reason.LATE
        assert begun.is_set()
        outcome, data = read_under(client, lease, "next")
        assert outcome.reason is Reason.HIT
        assert data == payload_of("next", SHAPE.record_bytes)
    client.close()
    daemon.stop()
    store.close()
