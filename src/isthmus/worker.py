"""The composition root of a worker process: an engine, and the block store that it keeps state in.

`app.py` composes the server's own process; the engine runs in another one, which has to be composed, too: no plane may
import another, and the engine knows the store as a port only. What the store is comes as one plain JSON argument.
"""

import argparse
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from isthmus.contracts.blocks import BlockStore
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.state.kv.address import make_private
from isthmus.state.kv.client import open_client
from isthmus.state.kv.daemon import Daemon
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import open_store

MAX_SPEC_BYTES = 1 << 16
MODULE = "isthmus.worker"


class StoreSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker keeps state: in a store of its own, made of `own` (which answers its administrator at `socket`),
    or in the daemon at the socket `daemon`.
    """

    own: StoreSettings | None = None
    socket: str = ""
    daemon: str = ""


def command(spec: StoreSpec | None) -> list[str]:
    """The command line of a worker, but for its socket."""
    chosen = [sys.executable, "-m", MODULE]
    return chosen if spec is None else [*chosen, "--store", msgspec.json.encode(spec).decode()]


def opener(spec: StoreSpec | None, stack: ExitStack) -> Callable[[], BlockStore | None]:
    """Opens the store that `spec` says, and closes it with `stack`."""

    def opened() -> BlockStore | None:
        if spec is None:
            return None
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

    return opened


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m isthmus.worker --fd N [--store JSON]`."""
    # torch comes with it; the server's process imports this module for the command line only.
    from isthmus.execution.inference.process import Link, run

    parser = argparse.ArgumentParser(prog="isthmus-worker", description="An engine process; started by isthmus serve.")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the socket pair")
    parser.add_argument("--store", default="", help="what the block store is made of, as JSON; none without")
    parsed = parser.parse_args(arguments)
    text = parsed.store.encode()
    if len(text) > MAX_SPEC_BYTES:
        parser.error(f"--store has at most {MAX_SPEC_BYTES} bytes")
    spec = msgspec.json.decode(text, type=StoreSpec) if text else None
    with ExitStack() as stack:
        return run(Link(socket.socket(fileno=parsed.fd)), opener(spec, stack))


if __name__ == "__main__":
    sys.exit(main())
