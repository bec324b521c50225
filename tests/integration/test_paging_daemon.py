"""An engine over a real store behind a daemon that is killed while state is being loaded from it: what did not come is
computed, the answer is the same, and the engine takes the daemon up again when there is one.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.requests import make_request
from tests.support.sites import PROMPT, Site
from tests.support.store_daemon import DaemonProcess, running
from tests.support.stores import LOG
from tests.support.tiny_models import make_model, open_tiny

from isthmus.contracts.blocks import Lease, Outcome, Reason, Tier, Want
from isthmus.contracts.clock import SystemClock
from isthmus.execution.inference.paging import pager
from isthmus.execution.inference.runner import TorchRunner
from isthmus.state.kv.administrator import Administrator
from isthmus.state.kv.client import RemoteStore, open_client
from isthmus.state.kv.lanepool import ClientSettings
from isthmus.state.kv.settings import DaemonSettings, StoreSettings

WITHIN_S = 20.0


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchRunner]:
    path = tmp_path_factory.mktemp("model")
    make_model(path, "llama-odd-heads")
    runner = open_tiny(path)
    yield runner
    runner.close()


class Doomed:
    """A store whose daemon is stopped when the `nth` read begins, and killed once that was asked for."""

    def __init__(self, store: RemoteStore, daemon: DaemonProcess, nth: int) -> None:
        self.store, self.pid = store, daemon.process.pid
        self.left = nth
        self.dead = False
        self.reasons: list[Reason] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def read(self, lease: Lease, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        self.left -= 1
        if self.left == 0 and not self.dead:
            self.dead = True
            # Stopped first, so that the request is under way for sure when the daemon dies.
            os.kill(self.pid, signal.SIGSTOP)
            threading.Timer(0.2, os.kill, (self.pid, signal.SIGKILL)).start()
        outcomes = self.store.read(lease, wants, timeout_s)
        self.reasons += [outcome.reason for outcome in outcomes]
        return outcomes


def in_log_only(socket: Path) -> None:
    """Nothing of what the daemon has is in its DRAM, so that every read goes through it."""
    admin = Administrator(socket, SystemClock())
    try:
        while admin.status().tiers[0].records:
            admin.evict(Tier.DRAM, 1 << 30, WITHIN_S)
    finally:
        admin.close()


@pytest.mark.parametrize("nth", [1, 2])
def test_a_daemon_killed_while_it_is_read_from_ends_in_recomputing(
    runner: TorchRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    monkeypatch.setattr(pager, "BATCH_BYTES", 1)  # a block a read: of a load there is a first one and a second
    settings = StoreSettings(arena_bytes=16 << 20, path=str(tmp_path / "log"), log=LOG)
    place = DaemonSettings(socket=str(tmp_path / "run" / "s"))
    client = open_client(
        Path(place.socket),
        SystemClock(),
        ClientSettings(window_bytes=1 << 20, area_bytes=1 << 20, backoff_s=(0.01, 0.1)),
    )
    with running(settings, place) as daemon:
        doomed = Doomed(client, daemon, 0)
        site = Site(runner, doomed)  # type: ignore[arg-type]
        site.run(make_request("a", PROMPT, 6))
        tokens = site.tokens["a"]
        site.push_out()
        assert client.flush(WITHIN_S)
        in_log_only(Path(place.socket))
        # It is read from as it should be ...
        warm = site.run(make_request("b", PROMPT, 6))["b"]
        assert site.tokens["b"] == tokens
        assert warm.reuse is not None
        assert warm.reuse.nvme > 60
        site.push_out()
        in_log_only(Path(place.socket))
        # ... until it is killed in the middle of it.
        doomed.left = nth
        doomed.reasons.clear()
        late = site.run(make_request("c", PROMPT, 6))["c"]
        assert site.tokens["c"] == tokens
        assert late.reuse is not None
        assert doomed.dead
        assert doomed.reasons.count(Reason.HIT) == nth - 1
        assert Reason.UNAVAILABLE in doomed.reasons
        assert late.reuse.reason == Reason.UNAVAILABLE
        # Nothing waits for what is gone.
        again = site.run(make_request("d", [*PROMPT[5:], 3, 4], 6))["d"]
        assert again.reuse is not None
        assert again.reuse.nvme == 0
    with running(settings, place):
        deadline = time.monotonic() + WITHIN_S
        while not client.flush(1.0):
            assert time.monotonic() < deadline, "it is found again"
        site.push_out()
        warm = site.run(make_request("e", PROMPT, 6))["e"]
        assert site.tokens["e"] == tokens
        assert warm.reuse is not None
        assert warm.reuse.nvme > 60
        site.settle()
    site.close()
    client.close()
