"""Where an engine's paging runs: a process beside it, or threads of its own."""

import sys
from collections.abc import Callable
from typing import Protocol

from isthmus.contracts.blocks import BlockStore, RecordKind
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import ConfigInvalid
from isthmus.execution.inference.batch import Runner
from isthmus.execution.inference.paging.child import Child
from isthmus.execution.inference.paging.frames import Begin
from isthmus.execution.inference.paging.jobs import Pager
from isthmus.execution.inference.paging.local import LocalPager
from isthmus.execution.inference.paging.memory import shapes
from isthmus.execution.inference.paging.remote import QUIET_S, RemotePager
from isthmus.execution.inference.paging.settings import PagingSettings

SWITCH_S = 0.00005
"""How long a thread of paging may keep the interpreter from the loop and from a step's operators, each of which has to
get it back (seconds; Python's own choice is 0.005)."""


class PagerHost(Protocol):
    """Pages for an engine once there is one."""

    def serve(self, runner: Runner, settings: PagingSettings, wake: Callable[[], None]) -> Pager:
        """Page for the engine with this runner. Raises the error of a store that cannot be opened."""
        ...

    def close(self) -> None:
        """End it, within limits: what was written behind becomes durable. May be called twice."""
        ...


class LocalHost:
    """In threads of this process."""

    def __init__(self, open_store: Callable[[], BlockStore], clock: Clock) -> None:
        self._open_store, self._clock = open_store, clock
        self._pager: LocalPager | None = None

    def serve(self, runner: Runner, settings: PagingSettings, wake: Callable[[], None]) -> Pager:
        """See `PagerHost`."""
        self._pager = LocalPager(self._open_store(), runner, settings, self._clock, wake=wake)
        # Its threads share an interpreter with a step's operators.
        sys.setswitchinterval(SWITCH_S)
        return self._pager

    def close(self) -> None:
        """See `PagerHost`."""
        if self._pager is not None:
            self._pager.close()
            self._pager = None


class RemoteHost:
    """In a process of its own, which starts when this is made: its store is opened while the model is being loaded."""

    def __init__(self, start: Callable[[], Child], clock: Clock, *, quiet_s: float = QUIET_S) -> None:
        """`quiet_s`: how long it may say nothing while there are jobs."""
        self._start, self._clock, self._quiet_s = start, clock, quiet_s
        self._first: Child | None = start()
        self._pager: RemotePager | None = None

    def serve(self, runner: Runner, settings: PagingSettings, wake: Callable[[], None]) -> Pager:
        """See `PagerHost`. Raises `ConfigInvalid` when the device's memory cannot be shared."""
        pools = runner.host()
        if RecordKind.BLOCK not in pools:
            raise ConfigInvalid("the memory of this device cannot be shared with a paging process")
        sizes = [(kind, pool.size) for kind, pool in pools.items()]
        begin = Begin(shapes(runner.info), settings, sizes)
        descriptors = [pool.descriptor for pool in pools.values()]
        first, self._first = self._first or self._start(), None
        self._pager = RemotePager(self._start, first, begin, descriptors, self._clock, wake=wake, quiet_s=self._quiet_s)
        return self._pager

    def close(self) -> None:
        """See `PagerHost`."""
        if self._first is not None:
            self._first.end(kill=False)
            self._first = None
        if self._pager is not None:
            self._pager.close()
            self._pager = None
