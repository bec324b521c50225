"""`isthmus serve` as it comes: it compiles beside its work, and nothing of the build outlives it."""

import time
from pathlib import Path

import httpx
import psutil
from tests.support.server import serve

from isthmus.execution.inference.compiled.service import BUILDER

APPEARS_WITHIN_S = 30.0


def _builders(server: int) -> list[psutil.Process]:
    return [one for one in psutil.Process(server).children(recursive=True) if BUILDER in one.cmdline()]


def test_a_server_compiles_beside_its_work_and_ends_the_build_with_itself(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serve(state, "--compile") as server:
        deadline = time.monotonic() + APPEARS_WITHIN_S
        while not (builders := _builders(server.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Told without any request: a server at rest looks after its build, too.
        while 'state="building"' not in httpx.get(f"{server.url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        body = {"model": "isthmus", "prompt": "Hello", "max_tokens": 4}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert builders[0].is_running()
        below = [builders[0], *builders[0].children(recursive=True)]
        assert server.terminate() == 0
        psutil.wait_procs(below, timeout=10)
        assert not [one for one in below if one.is_running()]
    assert (state / "compiled").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (state / "compiled").iterdir()] == ["build.log"]


def test_a_server_that_is_told_not_to_compile_does_not(tmp_path: Path) -> None:
    with serve(tmp_path / "state") as server:
        assert _builders(server.process.pid) == []
        assert not (tmp_path / "state" / "compiled").exists()
