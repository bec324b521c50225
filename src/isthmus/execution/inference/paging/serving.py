"""The paging process: does the jobs of one engine, in the engine's own memory, until the engine hangs up.

It has an interpreter of its own, so no operator of a step waits for its lock; only processors and memory are shared.
"""

import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from isthmus.contracts.blocks import BlockStore, RecordKind
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import InvalidInput, IsthmusError, WireViolation
from isthmus.contracts.events import ErrorInfo
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.inference.bell import Bell
from isthmus.execution.inference.paging.frames import (
    MAX_FRAME_BYTES,
    RECEIVE_BYTES,
    Begin,
    Happened,
    NotOpened,
    Opened,
    ToEngine,
    ToPager,
)
from isthmus.execution.inference.paging.jobs import Arrived, Event
from isthmus.execution.inference.paging.memory import MappedMemory, mapped
from isthmus.execution.inference.paging.pager import PagerThreads

MAX_POOLS = 2


class _Near:
    """The near end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._frames: FrameReader[ToPager] = FrameReader(ToPager, MAX_FRAME_BYTES)
        self._sending = threading.Lock()
        self.descriptors: list[int] = []
        self._bell = Bell()
        self.broken = False
        """Whether the threads of paging are gone."""

    def send(self, value: ToEngine) -> None:
        """Tell the engine. An engine that is gone hears nothing: the next `receive` says so."""
        frame = encode_frame(value, MAX_FRAME_BYTES)
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError:
                self.hang_up()

    def tell(self, events: Sequence[Event | Arrived]) -> None:
        """See `jobs.Told`."""
        self.send(Happened(events))

    def gone(self) -> None:
        """The threads of paging are gone, and so is to be the process: nothing more is received."""
        self.broken = True
        self._bell.ring()

    def hang_up(self) -> None:
        """The engine hears nothing more, and starts another process when it has ended this one."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[ToPager] | None:
        """What came; None at the end. Raises `WireViolation`."""
        select.select([self._socket.fileno(), self._bell.fileno], [], [])
        if self.broken:
            return None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, RECEIVE_BYTES, MAX_POOLS)
        except OSError:
            return None
        self.descriptors += descriptors
        return self._frames.feed(data) if data else None


def run(sock: socket.socket, open_store: Callable[[ExitStack], BlockStore], clock: Clock) -> int:
    """Open the store and page for the engine at the other end of `sock` until that is gone; the exit status. The store
    is closed at the end, whatever that was. What nobody foresaw ends it, too: the state that it left is nobody's to go
    on with.
    """
    near = _Near(sock)
    with ExitStack() as stack:
        try:
            store = open_store(stack)
        except IsthmusError as error:
            field = error.field if isinstance(error, InvalidInput) else ""
            near.send(NotOpened(ErrorInfo(error.code, str(error), field)))
            return 1
        near.send(Opened())
        try:
            _page(near, store, clock)
        except WireViolation as error:
            os.write(2, f"isthmus-pager: {error}\n".encode())
            return 1
    return int(near.broken)


def _page(near: _Near, store: BlockStore, clock: Clock) -> None:
    threads: PagerThreads | None = None
    try:
        while (messages := near.receive()) is not None:
            for message in messages:
                if isinstance(message, Begin):
                    if threads is not None:
                        raise WireViolation("the engine begins twice")
                    memory = MappedMemory(message.shapes, _pools(message, near.descriptors))
                    threads = PagerThreads(
                        store,
                        memory,
                        message.shapes,
                        message.settings,
                        clock,
                        told=near.tell,
                        gone=near.gone,
                        heard=message.heard,
                    )
                elif threads is None:
                    raise WireViolation("the engine asks before it begins")
                else:
                    threads.do(message)
    finally:
        if threads is not None:
            threads.close()  # when that is over what was raised has been said on standard error
        if near.broken:
            near.hang_up()


def _pools(begin: Begin, descriptors: list[int]) -> dict[RecordKind, memoryview]:
    """The engine's memory, mapped. Raises `WireViolation`."""
    if len(descriptors) != len(begin.pools):
        raise WireViolation(f"{len(descriptors)} descriptors came, {len(begin.pools)} are named")
    pools = {}
    for (kind, size), descriptor in zip(begin.pools, descriptors, strict=True):
        pools[kind] = mapped(descriptor, size)
        os.close(descriptor)
    descriptors.clear()
    return pools
