"""A client of a store's daemon that stops itself (SIGSTOP) in the middle of a call. Run as a module, with the socket's
path; reads orders from its input, one JSON a line, and answers each with what it found.

    {"verb": "read", "names": [...], "point": "half copied"}    {"verb": "write", "names": [...], "point": "asked"}

Points of a read: `leased` (before it looks at the memory), `half copied`, `copied` (before it looks at the lease
again). Of a write: `filled` (its window), `asked` (the daemon has the request), `junk` (as `asked`, and the window is
overwritten before). No point: it does not stop.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.stores import SHAPE, key_of, payload_of, put_of

from isthmus.contracts.blocks import Want
from isthmus.contracts.clock import SystemClock
from isthmus.state.kv import client as client_module
from isthmus.state.kv import wire
from isthmus.state.kv.arena.copying import copy_digests, copy_verified
from isthmus.state.kv.arena.crew import Crew
from isthmus.state.kv.client import RemoteStore, open_client
from isthmus.state.kv.connection import Connection
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.lanepool import ClientSettings

READS = ("leased", "half copied", "copied")
WRITES = ("filled", "asked", "junk")
LEASE_S, CALL_S = 30.0, 5.0


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


class Stalled:
    """A client whose calls stop once, at a point."""

    def __init__(self, client: RemoteStore) -> None:
        self.client = client
        self.point = ""
        self._lanes = list(client._pool._free)
        client_module.copy_verified = self.copy_verified
        client_module.copy_digests = self.copy_digests
        self._send = Connection.send
        Connection.send = lambda *values: self.send(*values)  # type: ignore[assignment,misc]

    def at(self, *points: str) -> bool:
        """Whether it is to stop here; only once."""
        if self.point not in points:
            return False
        self.point = ""
        return True

    def copy_verified(
        self, source: memoryview, target: memoryview, chunk_bytes: int, digests: bytes, crew: Crew | None = None
    ) -> bool:
        if self.at("half copied"):
            half = len(source) // 2
            target[:half] = source[:half]
            stop()
            target[half:] = source[half:]
            return digests_of(target, chunk_bytes) == digests
        good = copy_verified(source, target, chunk_bytes, digests, crew)
        if self.at("copied"):
            stop()
        return good

    def copy_digests(self, source: memoryview, target: memoryview, chunk_bytes: int, crew: Crew | None = None) -> bytes:
        digests = copy_digests(source, target, chunk_bytes, crew)
        if self.at("filled"):
            stop()
        return digests

    def send(self, connection: Connection, value: Any, *limits: Any) -> None:
        self._send(connection, value, *limits)
        if isinstance(value, wire.WriteAsk):
            if self.point == "junk":
                for lane in self._lanes:
                    lane.window[: 4 * SHAPE.record_bytes] = random.randbytes(4 * SHAPE.record_bytes)
            if self.at("asked", "junk"):
                stop()

    def read(self, names: list[str]) -> list[tuple[str, bool]]:
        """What became of each, and whether the bytes are right."""
        with self.client.lease([key_of(name) for name in names], LEASE_S) as lease:
            if self.at("leased"):
                stop()
            buffers = [bytearray(SHAPE.record_bytes) for _ in names]
            wants = [Want(key_of(name), SHAPE, memoryview(into)) for name, into in zip(names, buffers, strict=True)]
            outcomes = self.client.read(lease, wants, CALL_S)
        return [
            (outcome.reason.value, bytes(into) == payload_of(name, SHAPE.record_bytes))
            for name, into, outcome in zip(names, buffers, outcomes, strict=True)
        ]

    def write(self, names: list[str]) -> list[tuple[str, bool]]:
        """What became of each."""
        outcomes = self.client.write([put_of(name) for name in names], CALL_S)
        return [(outcome.reason.value, True) for outcome in outcomes]


def main() -> None:
    settings = ClientSettings(window_bytes=1 << 20, area_bytes=1 << 19, call_s=CALL_S, backoff_s=(0.001, 0.01))
    stalled = Stalled(open_client(Path(sys.argv[1]), SystemClock(), settings))
    verbs: dict[str, Callable[[list[str]], list[tuple[str, bool]]]] = {"read": stalled.read, "write": stalled.write}
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        stalled.point = order.get("point", "")
        found = verbs[order["verb"]](order["names"])
        print(json.dumps({"found": found, "stopped": not stalled.point}), flush=True)


if __name__ == "__main__":
    main()
