"""A real `isthmus serve` for tests: its own process group, a free port, a state directory of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ENDS_WITHIN_S = 60


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
    command = [sys.executable, "-m", "isthmus.cli.main", "serve", "--port", "0", "--state-dir", str(state), *flags]
    with (state / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(rb"http://127\.0\.0\.1:\d+", line)
            if found:
                yield Served(found[0].decode(), state, process)
                break
        else:
            raise AssertionError(f"the server ended: {(state / 'stderr').read_text()[-2000:]}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(ENDS_WITHIN_S)
        if process.stdout is not None:
            process.stdout.close()
