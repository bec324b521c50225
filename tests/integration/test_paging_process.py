"""The paging process: an engine and its store go on as they should when it is killed, stopped or cannot open its store,
and it ends when its engine does.
"""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.requests import make_request
from tests.support.sites import PROMPT, WITHIN_S, RemoteSite
from tests.support.tiny_models import make_model, open_tiny

from isthmus.contracts.blocks import Reason
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.errors import StoreLocked
from isthmus.contracts.wire import encode_frame
from isthmus.execution.inference.paging.child import Child
from isthmus.execution.inference.paging.frames import Opened
from isthmus.execution.inference.paging.jobs import Look
from isthmus.execution.inference.runner import TorchRunner
from isthmus.pager import command
from isthmus.state.kv.store import open_store


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchRunner]:
    path = tmp_path_factory.mktemp("model")
    make_model(path, "llama-odd-heads")
    made = open_tiny(path)
    yield made
    made.close()


def lost(site: RemoteSite) -> float:
    return site.core.stats().paging.get("pager_lost", 0)


def until_lost(site: RemoteSite, count: int = 1) -> None:
    while lost(site) < count:
        site.rung.clear()
        site.core.begin_step()
        if lost(site) < count:
            assert site.rung.wait(WITHIN_S), "its end is to be told"


def test_state_comes_back_through_it(runner: TorchRunner, tmp_path: Path) -> None:
    site = RemoteSite(runner, tmp_path)
    site.run(make_request("a", PROMPT, 6))
    tokens = site.tokens["a"]
    site.push_out()
    warm = site.run(make_request("b", PROMPT, 6))["b"]
    assert site.tokens["b"] == tokens
    assert warm.reuse is not None
    assert warm.reuse.dram > 60
    site.only_on_disk()
    cold = site.run(make_request("c", PROMPT, 6))["c"]
    assert site.tokens["c"] == tokens
    assert cold.reuse is not None
    assert cold.reuse.nvme > 60
    site.settle()
    assert not lost(site)
    site.close()


def test_killed_it_is_replaced_and_what_was_durable_is_there(runner: TorchRunner, tmp_path: Path) -> None:
    site = RemoteSite(runner, tmp_path)
    site.run(make_request("a", PROMPT, 6))
    tokens = site.tokens["a"]
    site.only_on_disk()
    site.children[0]._process.kill()
    until_lost(site)
    while len(site.children) < 2 or not site.pager._child:
        threading.Event().wait(0.01)
    warm = site.run(make_request("b", PROMPT, 6))["b"]
    assert site.tokens["b"] == tokens
    assert warm.reuse is not None
    assert warm.reuse.nvme > 60
    site.settle()
    site.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_gone_in_the_middle_of_a_load_the_rest_is_computed(
    runner: TorchRunner, tmp_path: Path, how: signal.Signals
) -> None:
    """Stopped first, so that the job is under way for sure; a process that is only stopped is noticed, too."""
    site = RemoteSite(runner, tmp_path, quiet_s=0.5)
    site.run(make_request("a", PROMPT, 6))
    tokens = site.tokens["a"]
    site.only_on_disk()
    pid = site.children[0].pid
    loading = site.pager.load

    def load(*job: object) -> None:
        os.kill(pid, signal.SIGSTOP)
        loading(*job)
        if how is not signal.SIGSTOP:
            os.kill(pid, how)

    site.pager.load = load
    late = site.run(make_request("b", PROMPT, 6))["b"]
    assert site.tokens["b"] == tokens
    assert late.reuse is not None
    assert late.reuse.reason == Reason.UNAVAILABLE
    assert lost(site) == 1
    site.pager.load = loading
    assert site.children[0]._process.poll() is not None, "nothing of it may write any more"
    site.settle()
    site.close()


class RaisingSite(RemoteSite):
    """The first process raises when it is to load; the others are as they should be."""

    def _start(self) -> Child:
        made = command(self.spec)
        if not self.children:
            made[made.index("isthmus.pager")] = "tests.support.raising_pager"
        self.children.append(Child(made))
        return self.children[-1]


def test_a_process_that_raises_is_replaced_and_nobody_waits_for_it(
    runner: TorchRunner, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site = RaisingSite(runner, tmp_path)
    site.run(make_request("a", PROMPT, 6))
    tokens = site.tokens["a"]
    site.only_on_disk()
    late = site.run(make_request("b", PROMPT, 6))["b"]
    assert site.tokens["b"] == tokens
    assert late.reuse is not None
    assert late.reuse.reason == Reason.UNAVAILABLE
    until_lost(site)
    assert lost(site) == 1
    assert site.children[0]._process.poll() is not None
    assert "nobody foresaw this" in capfd.readouterr().err
    while len(site.children) < 2 or not site.pager._child:
        threading.Event().wait(0.01)
    site.push_out()
    warm = site.run(make_request("c", PROMPT, 6))["c"]
    assert site.tokens["c"] == tokens
    assert warm.reuse is not None
    assert warm.reuse.nvme + warm.reuse.dram > 60
    site.settle()
    site.close()


def test_while_there_is_none_requests_compute(runner: TorchRunner, tmp_path: Path) -> None:
    site = RemoteSite(runner, tmp_path)
    try:
        site.run(make_request("a", PROMPT, 6))
        tokens = site.tokens["a"]
        site.push_out()
        (tmp_path / "log").rename(tmp_path / "away")
        (tmp_path / "log").mkdir()  # no store can be opened there
        site.children[0]._process.kill()
        until_lost(site)
        warm = site.run(make_request("b", PROMPT, 6))["b"]
        assert site.tokens["b"] == tokens
        assert warm.reuse is not None
        assert warm.reuse.reason == Reason.UNAVAILABLE
        assert site.core.stats().paging["keep_unavailable"] >= 6
        site.settle()
    finally:
        site.close()


def test_a_store_that_cannot_be_opened_says_why(runner: TorchRunner, tmp_path: Path) -> None:
    first = RemoteSite(runner, tmp_path)
    with pytest.raises(StoreLocked):
        RemoteSite(runner, tmp_path)
    first.close()


def test_it_ends_with_its_engine_and_closes_its_log(tmp_path: Path, runner: TorchRunner) -> None:
    site = RemoteSite(runner, tmp_path)
    site.run(make_request("a", PROMPT, 6))
    site.settle()
    site.close()
    assert site.children[0]._process.poll() == 0
    # As when the engine is killed: nobody is at the other end any more.
    child = Child(command(site.spec))
    child.opened(SystemClock())
    assert child.end(kill=False) == 0
    assert site.spec.own is not None
    store = open_store(site.spec.own, SystemClock(), SystemEntropy())
    assert store.stats().tiers[1].records >= 6
    store.close()


@pytest.mark.parametrize("bad", [b"\xff\xff\xff\xff", encode_frame({"a": 1}), encode_frame(Look(1, []))])
def test_frames_that_break_the_rules_end_it(tmp_path: Path, bad: bytes, runner: TorchRunner) -> None:
    site = RemoteSite(runner, tmp_path)
    spec = site.spec
    site.close()
    near, far = socket.socketpair()
    with near, far:
        process = subprocess.Popen(
            [*command(spec), "--fd", str(far.fileno())], pass_fds=[far.fileno()], stderr=subprocess.PIPE
        )
        far.close()
        near.settimeout(WITHIN_S)
        assert near.recv(1 << 16) == encode_frame(Opened())
        near.sendall(bad)
        _, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1
    assert b"isthmus-pager: " in said
