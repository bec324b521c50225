"""The composition root of a paging process: the block store that an engine keeps state in, beside that engine.

A worker (worker.py) starts it and gives it the engine's memory; here the store is opened and handed to the engine's
pager, as a port. What the store is comes as one plain JSON argument.
"""

import argparse
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import msgspec

from isthmus.contracts.blocks import BlockStore
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.execution.inference.paging.serving import run
from isthmus.state.kv.address import make_private
from isthmus.state.kv.client import open_client
from isthmus.state.kv.daemon import Daemon
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import open_store

MAX_SPEC_BYTES = 1 << 16
MODULE = "isthmus.pager"
NICE = 10


class StoreSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker keeps state: in a store of its own, made of `own` (which answers its administrator at `socket`),
    or in the daemon at the socket `daemon`. `apart`: in a process beside the engine's, which shares the memory of the
    engine's device; that has to be a CPU's.
    """

    own: StoreSettings | None = None
    socket: str = ""
    daemon: str = ""
    apart: bool = True


def command(spec: StoreSpec) -> list[str]:
    """The command line of a paging process, but for its socket."""
    return [sys.executable, "-m", MODULE, "--store", msgspec.json.encode(spec).decode()]


def open_spec(spec: StoreSpec, stack: ExitStack) -> BlockStore:
    """The store that `spec` says; `stack` closes it. Raises `StoreError` and `ConfigInvalid`."""
    clock, entropy = SystemClock(), SystemEntropy()
    if spec.own is not None:
        make_private(Path(spec.socket).parent)
        store = open_store(spec.own, clock, entropy)
        stack.callback(store.close)
        daemon = Daemon(store, DaemonSettings(socket=spec.socket), clock, entropy)
        daemon.start()
        stack.callback(daemon.stop)
        return store
    client = open_client(Path(spec.daemon), clock)
    stack.callback(client.close)
    return client


def read_spec(text: str) -> StoreSpec | None:
    """The spec of an argument; None of an empty one. Raises `ValueError`."""
    if len(text.encode()) > MAX_SPEC_BYTES:
        raise ValueError(f"--store has at most {MAX_SPEC_BYTES} bytes")
    return msgspec.json.decode(text, type=StoreSpec) if text else None


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m isthmus.pager --fd N --store JSON`."""
    parser = argparse.ArgumentParser(prog="isthmus-pager", description="A paging process; started by an engine.")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the socket pair")
    parser.add_argument("--store", required=True, help="what the block store is made of, as JSON")
    parsed = parser.parse_args(arguments)
    try:
        spec = read_spec(parsed.store)
    except ValueError as error:
        parser.error(str(error))
    if spec is None:
        parser.error("--store is empty")
    # Requests that decode go first: who waits for a load waits a little longer.
    os.nice(NICE)
    return run(socket.socket(fileno=parsed.fd), lambda stack: open_spec(spec, stack), SystemClock())


if __name__ == "__main__":
    sys.exit(main())
