"""Mooncake as a peer: `mooncake_store.py KIND MEMORY BYTES`, driven over records.py.

KIND is where the records lie
- tcp: in another process, the owner of a segment, reached over TCP on loopback.
- local: in a segment of this process, which is also the client.
A master, and the owner, are started here and end with this. The producer's and the consumer's memory are registered,
so that records go between them and the segment without a copy of ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from records import Memory, Record, serve

HOST = "127.0.0.1"
WAIT_S = 60.0
NEVER_S = 86_400
LOCAL_BYTES = 16 << 20
SEGMENT_SHARE = 1.5
_POLL_S = 0.1
# make.sh puts libraries that its wheel takes for granted here; the order is that of their dependencies.
SYSTEM = Path(sys.prefix) / "system"
LIBRARIES = ("libnl-3.so.200", "libnl-route-3.so.200", "libibverbs.so.1", "libcudart.so.12")


def libraries() -> list[Path]:
    """Those that are there, in order."""
    found = {path.name: path for root in (SYSTEM, Path(sys.prefix) / "lib") for path in root.rglob("lib*.so.*")}
    return [found[name] for name in LIBRARIES if name in found]


def connected(segment: int, master: int) -> Any:
    """A client of the master at that port which lends it a segment of so many bytes."""
    for library in libraries():
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    from mooncake.store import MooncakeDistributedStore

    until = time.monotonic() + WAIT_S
    while True:
        store = MooncakeDistributedStore()
        code = store.setup(HOST, "P2PHANDSHAKE", segment, LOCAL_BYTES, "tcp", "", f"{HOST}:{master}")
        if code == 0:
            return store
        if time.monotonic() > until:
            raise ConnectionError(f"Mooncake's client does not start: {code}")
        time.sleep(_POLL_S)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Mooncake:
    """Records in a segment."""

    def __init__(self, memory: Memory, size: int, *, local: bool) -> None:
        import mooncake

        port, segment = free_port(), int(size * SEGMENT_SHARE)
        paths = ":".join(str(library.parent) for library in libraries())
        command = [str(Path(mooncake.__file__).with_name("mooncake_master"))]
        command += ["-rpc_port", str(port), "-metrics_port", str(free_port())]
        # It is stopped while others are measured: nobody is given up for that.
        command += ["-client_ttl", str(NEVER_S)]
        environment = {**os.environ, "LD_LIBRARY_PATH": paths}
        self._children = [subprocess.Popen(command, env=environment, stdout=sys.stderr)]
        wait_for(port)
        if not local:
            owner = [sys.executable, __file__, "owner", str(segment), str(port)]
            self._children.append(subprocess.Popen(owner, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            if not self._children[1].stdout.readline():
                raise ConnectionError("the owner of the segment does not start")
        self._store = connected(segment if local else 0, port)
        if self._store.register_buffer(memory.address, 2 * memory.size):
            raise MemoryError("Mooncake does not register the memory")

    def prepare(self, record: Record) -> tuple[str, Record]:
        return record.key.hex(), record

    def put(self, items: Sequence[tuple[str, Record]]) -> None:
        keys, addresses = [key for key, _ in items], [record.source_address for _, record in items]
        if any(self._store.batch_put_from(keys, addresses, [record.size for _, record in items])):
            raise OSError("Mooncake did not take a record")

    def settle(self) -> None: ...

    def cool(self) -> None: ...

    def get(self, items: Sequence[tuple[str, Record]]) -> None:
        keys, addresses = [key for key, _ in items], [record.target_address for _, record in items]
        sizes = [record.size for _, record in items]
        if self._store.batch_get_into(keys, addresses, sizes) != sizes:
            raise OSError("Mooncake did not give a record")

    def drop(self, items: Sequence[tuple[str, Record]]) -> None:
        self._store.batch_remove([key for key, _ in items], True)

    def processes(self) -> Sequence[int]:
        return [child.pid for child in self._children]

    def close(self) -> None:
        """End the processes that were started."""
        with suppress(Exception):
            self._store.close()
        for child in reversed(self._children):
            child.terminate()
            child.wait(WAIT_S)


def wait_for(port: int) -> None:
    """Return when something listens there."""
    until = time.monotonic() + WAIT_S
    while True:
        try:
            socket.create_connection((HOST, port), _POLL_S).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(_POLL_S)


def main() -> None:
    """Make the store, then answer; or be the owner of a segment until the input ends."""
    if sys.argv[1] == "owner":
        store = connected(int(sys.argv[2]), int(sys.argv[3]))
        os.write(1, b"ready\n")
        sys.stdin.read()
        store.close()
        return
    kind, path, size = *sys.argv[1:3], int(sys.argv[3])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    made: list[Mooncake] = []

    def make(memory: Memory) -> Mooncake:
        made.append(Mooncake(memory, size, local=kind == "local"))
        return made[0]

    try:
        serve(make, path, size)
    finally:
        for one in made:
            one.close()


if __name__ == "__main__":
    main()
