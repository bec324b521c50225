"""The block store behind a real server: state survives kill -9 of engine, server and daemon, answers stay the same,
what is forgotten is gone, and a person can look at all of it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from tests.support.server import Served, serve

from isthmus.contracts.clock import SystemClock
from isthmus.state.kv.administrator import Administrator

OWN = ("--store", "own", "--store-memory", "16MiB", "--store-disk", "160MiB")
PROMPT = "The keeper of the lighthouse counts the ships and writes their names. " * 20
WITHIN_S = 30.0


def ask(server: Served, prompt: str = PROMPT, session: str = "talk") -> tuple[str, str]:
    """The id and the text of a greedy answer."""
    body = {"model": "isthmus", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(
        f"{server.url}/v1/completions", json=body, headers={"x-isthmus-session": session}, timeout=60
    ).json()
    return answer["id"], answer["choices"][0]["text"]


def eventually(check: Callable[[], bool]) -> None:
    until = time.monotonic() + WITHIN_S
    while not check():
        assert time.monotonic() < until
        time.sleep(0.05)


def reused(server: Served, tier: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("isthmus_reused_tokens_total") and tier in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def all_durable(server: Served, socket: Path) -> None:
    """Wait until everything computed so far is written behind and durable."""
    admin = Administrator(socket, SystemClock())

    def done() -> bool:
        owed = server.metric("isthmus_paging")
        stats = admin.status()
        return owed >= 0 and stats.sequence > 0 and stats.durable == stats.sequence

    try:
        eventually(lambda: 'isthmus_store_blocks_total{event="keep"' in httpx.get(f"{server.url}/metrics").text)
        eventually(done)
    finally:
        admin.close()


def kill_engine(server: Served) -> None:
    """kill -9 of the worker, then of the server."""
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # those whose parent ended before
            if "isthmus.worker" in " ".join(child.cmdline()):
                child.kill()
                child.wait(WITHIN_S)
    with suppress(ProcessLookupError):  # it ends when its engine does
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(WITHIN_S)


def store(state: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "isthmus", "store", *arguments, "--state-dir", str(state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def daemon(state: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "isthmus", "store", "serve", "--state-dir", str(state)]
    process = subprocess.Popen([*command, *OWN[2:]], stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b"keeps blocks" in process.stderr.readline()
    try:
        yield process
    finally:
        process.kill()
        process.wait(WITHIN_S)
        process.stderr.close()


def test_a_conversation_survives_kill_9_and_is_forgotten_when_told_to(tmp_path: Path) -> None:
    with serve(tmp_path, *OWN) as server:
        _, cold = ask(server)
        all_durable(server, tmp_path / "store" / "store.sock")
        shown = store(tmp_path, "status")
        assert shown.returncode == 0, shown.stderr
        assert "residency by session" in shown.stdout
        assert "write amplification" in shown.stdout
        kill_engine(server)
    with serve(tmp_path, *OWN) as server:
        name, warm = ask(server)
        assert warm == cold
        assert reused(server, "nvme") > 300
        eventually(lambda: "nvme" in explained(tmp_path, name))
        assert store(tmp_path, "verify").returncode == 0
        assert len(store(tmp_path, "ls", "--tier", "nvme").stdout.splitlines()) > 10
        assert store(tmp_path, "evict", "--tier", "dram", "16MiB").returncode == 0
        assert store(tmp_path, "compact").returncode == 0
        refused = store(tmp_path, "forget")
        assert refused.returncode == 2
        assert "--yes" in refused.stderr
        told = store(tmp_path, "forget", "--session", "talk")
        assert "forgotten" in told.stdout, told.stderr
        kill_engine(server)
    with serve(tmp_path, *OWN) as server:
        assert len(store(tmp_path, "ls", "--tier", "nvme").stdout.splitlines()) == 1
        _, again = ask(server, session="other")
        assert again == cold
        assert reused(server, "nvme") == 0
        stats = json.loads(store(tmp_path, "status", "--json").stdout)
        assert stats["erasures"]


def explained(state: Path, name: str) -> str:
    command = [sys.executable, "-m", "isthmus", "explain", name, "--state-dir", str(state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def test_engines_come_and_go_over_one_daemon(tmp_path: Path) -> None:
    house, state = tmp_path / "house", tmp_path / "state"
    house.mkdir()
    socket = house / "store" / "store.sock"
    with daemon(house) as running:
        with serve(state, "--store", str(socket)) as server:
            _, cold = ask(server)
            all_durable(server, socket)
            kill_engine(server)
        with serve(state, "--store", str(socket)) as server:
            assert ask(server)[1] == cold
            assert reused(server, "dram") > 300, "a worker's crash loses nothing that the daemon has in DRAM"
            running.kill()
            running.wait(WITHIN_S)
            # Without the daemon the engine goes on, and says why nothing came from it.
            _, alone = ask(server, PROMPT[5:])
            assert alone
            with daemon(house):
                eventually(lambda: store(house, "status").returncode == 0)
                kill_engine(server)
                with serve(state, "--store", str(socket)) as after:
                    assert ask(after)[1] == cold
                    assert reused(after, "nvme") > 300


def test_a_second_store_on_one_log_is_refused(tmp_path: Path) -> None:
    with serve(tmp_path, *OWN):
        second = store(tmp_path, "serve", *OWN[2:])
        assert second.returncode != 0
        assert "store_locked" in second.stderr


@pytest.mark.parametrize("arguments", [("status",), ("ls",), ("verify",), ("forget", "--session", "x")])
def test_without_a_store_the_answer_is_plain(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "tenant.secret").write_bytes(b"s" * 32)
    (tmp_path / "tenant.secret").chmod(0o600)
    told = store(tmp_path, *arguments)
    assert told.returncode != 0
    assert "store_unavailable" in told.stderr
    assert "Traceback" not in told.stderr
