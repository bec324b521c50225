"""The composition root of a worker process: an engine, and the paging that keeps its state in a block store.

`app.py` composes the server's own process; the engine runs in another one, which has to be composed, too: no plane may
import another, and the engine knows the store as a port only. The store is opened in a third one (pager.py), which
shares the engine's memory, or in this one where memory cannot be shared.
"""

import argparse
import socket
import sys
from contextlib import ExitStack

import msgspec

from isthmus.contracts.clock import SystemClock
from isthmus.execution.inference.paging.child import Child
from isthmus.execution.inference.paging.host import LocalHost, PagerHost, RemoteHost
from isthmus.pager import StoreSpec, open_spec, read_spec
from isthmus.pager import command as pager_command

MODULE = "isthmus.worker"


def command(spec: StoreSpec | None) -> list[str]:
    """The command line of a worker, but for its socket."""
    chosen = [sys.executable, "-m", MODULE]
    return chosen if spec is None else [*chosen, "--store", msgspec.json.encode(spec).decode()]


def host_of(spec: StoreSpec | None, stack: ExitStack) -> PagerHost | None:
    """What pages for the engine; `stack` ends it. A process of its own starts at once: it opens the store while torch
    is imported and weights are loaded.
    """
    if spec is None:
        return None
    if not spec.apart:
        return LocalHost(lambda: open_spec(spec, stack), SystemClock())
    host = RemoteHost(lambda: Child(pager_command(spec)), SystemClock())
    stack.callback(host.close)
    return host


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m isthmus.worker --fd N [--store JSON]`."""
    parser = argparse.ArgumentParser(prog="isthmus-worker", description="An engine process; started by isthmus serve.")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the socket pair")
    parser.add_argument("--store", default="", help="what the block store is made of, as JSON; none without")
    parsed = parser.parse_args(arguments)
    try:
        spec = read_spec(parsed.store)
    except ValueError as error:
        parser.error(str(error))
    with ExitStack() as stack:
        host = host_of(spec, stack)
        # torch comes with it; the server's process imports this module for the command line only.
        from isthmus.execution.inference.process import Link, run

        return run(Link(socket.socket(fileno=parsed.fd)), host)


if __name__ == "__main__":
    sys.exit(main())
