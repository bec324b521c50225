"""A real `isthmus serve` for tests: its own process group, a free port, a state directory of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ENDS_WITHIN_S = 60
READY_WITHIN_S = 120


@dataclass
class Served:
    """A running server."""

    url: str
    state: Path
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> str:
        """Everything on stderr so far."""
        return (self.state / "stderr").read_text()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for value in found)

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ENDS_WITHIN_S)


@contextmanager
def serve(state: Path, *flags: str) -> Iterator[Served]:
    """Start a server and wait until it says where it is; kill its whole group at the end."""
    state.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "isthmus.cli.main", "serve", "--port", "0", "--state-dir", str(state)]
    # Not every server of the tests is to compile: those that ask for it do.
    command += ["--no-compile", "--store", "off", *flags]
    with (state / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
    try:
        yield Served(_address(process, state / "stderr"), state, process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(ENDS_WITHIN_S)


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Where the server says it is, once it says so."""
    deadline = time.monotonic() + READY_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")
