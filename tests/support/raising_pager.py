"""A paging process whose store raises, at its first lease, what nobody foresaw."""

import socket
import sys
from contextlib import ExitStack

from isthmus.contracts.blocks import BlockStore
from isthmus.contracts.clock import SystemClock
from isthmus.execution.inference.paging.serving import run
from isthmus.pager import open_spec, read_spec


def opened(text: str, stack: ExitStack) -> BlockStore:
    spec = read_spec(text)
    assert spec is not None
    store = open_spec(spec, stack)

    def lease(*_: object) -> None:
        raise RuntimeError("nobody foresaw this")

    store.lease = lease  # type: ignore[method-assign,assignment]
    return store


if __name__ == "__main__":
    _, _, text, _, descriptor = sys.argv
    sys.exit(run(socket.socket(fileno=int(descriptor)), lambda stack: opened(text, stack), SystemClock()))
