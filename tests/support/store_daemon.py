"""A store's daemon in a process of its own, to be stopped and killed. Run as a module with settings in JSON."""

import json
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.state.kv.daemon import run_daemon
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import open_store

START_S = 60.0


class DaemonProcess:
    """Starts on construction, ready when it returns."""

    def __init__(self, store: StoreSettings, daemon: DaemonSettings) -> None:
        sent = json.dumps({"store": msgspec.to_builtins(store), "daemon": msgspec.to_builtins(daemon)})
        command = [sys.executable, "-m", "tests.support.store_daemon", sent]
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if ready else ""
        if not line.startswith("ready"):
            self.process.kill()
            raise AssertionError(f"the daemon did not start: {self.process.communicate(timeout=10)}")

    def kill(self) -> None:
        """kill -9; nothing when it has ended."""
        self.process.kill()
        self.process.communicate(timeout=20)

    def end(self) -> tuple[int, str]:
        """SIGTERM; exit status and what it said."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    def close(self) -> None:
        """Ended, whoever ended it, and its pipes closed. May be called twice."""
        if self.process.returncode is None:
            self.kill()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextmanager
def running(store: StoreSettings, daemon: DaemonSettings) -> Iterator[DaemonProcess]:
    process = DaemonProcess(store, daemon)
    try:
        yield process
    finally:
        process.close()


def main() -> None:
    given = json.loads(sys.argv[1])
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    clock, entropy = SystemClock(), SystemEntropy()
    store = open_store(msgspec.convert(given["store"], StoreSettings), clock, entropy)
    settings = msgspec.convert(given["daemon"], DaemonSettings)
    run_daemon(store, settings, clock, entropy, stop=stop, on_ready=lambda _: print("ready", flush=True))


if __name__ == "__main__":
    main()
