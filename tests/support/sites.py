"""An engine core over a runner and a block store."""

import threading
from pathlib import Path
from typing import Any

from tests.support.stores import LOG

from isthmus.contracts.blocks import BlockStore, Tier
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.events import RequestOutput
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.paging.child import Child
from isthmus.execution.inference.paging.host import RemoteHost
from isthmus.execution.inference.paging.jobs import Pager
from isthmus.execution.inference.paging.local import LocalPager
from isthmus.execution.inference.paging.settings import PagingSettings
from isthmus.execution.inference.runner import TorchRunner
from isthmus.execution.inference.settings import SchedulerSettings
from isthmus.pager import StoreSpec, command
from isthmus.state.kv.administrator import Administrator
from isthmus.state.kv.settings import StoreSettings

WITHIN_S = 30.0
PROMPT = list(range(2, 100))


class Site:
    """An engine core over a runner and a store, driven as its process does it."""

    def __init__(self, runner: TorchRunner, store: BlockStore | None, **paging: object) -> None:
        self.runner, self.store = runner, store
        self.rung = threading.Event()
        settings = PagingSettings(look_s=WITHIN_S, **paging)  # type: ignore[arg-type]
        self.pager = self.make_pager(settings)
        self.core = EngineCore(runner, SchedulerSettings(paging=settings), SystemClock(), pager=self.pager)
        # A tiny model computes faster than it loads: what is tested is loading.
        self.core._scheduler._paging.rates.worth = lambda *args: True  # type: ignore

    def make_pager(self, settings: PagingSettings) -> Any:
        """What pages for it."""
        return LocalPager(self.store, self.runner, settings, SystemClock(), wake=self.rung.set)

    def run(self, *requests: EngineRequest) -> dict[str, RequestOutput]:
        """The last output of each request, with all of its tokens."""
        for request in requests:
            assert self.core.submit(request) is None
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        last: dict[str, RequestOutput] = {}
        while len(last) < len(requests):
            self.rung.clear()
            if self.core.begin_step():
                outputs = self.core.finish_step()
            else:
                outputs = self.core.collect()
                if not outputs:
                    assert self.rung.wait(WITHIN_S), "something is to happen"
            for output in outputs:
                tokens[output.request_id] += output.token_ids
                if output.finish is not None:
                    last[output.request_id] = output
        self.tokens = tokens
        return last

    def settle(self) -> None:
        """Everything is written behind."""
        self.write_behind()
        while self.core.begin_step():
            self.core.finish_step()
        self.core.check()
        assert self.core.stats().blocks_leased == 0

    def write_behind(self) -> None:
        """Everything is in the store."""
        self.pager.threads.settle(WITHIN_S)

    def push_out(self) -> None:
        """Nothing is left on the device."""
        self.settle()
        tree = self.core._scheduler._tree
        while tree.evict(1000):
            pass
        assert len(tree) == 0

    def close(self) -> None:
        self.pager.close()
        assert not self.pager.threads.alive


class RemoteSite(Site):
    """A site whose paging, and the store, is a process of its own."""

    def __init__(self, runner: TorchRunner, folder: Path, *, quiet_s: float = 30.0, **paging: object) -> None:
        self.spec = StoreSpec(
            own=StoreSettings(arena_bytes=16 << 20, path=str(folder / "log"), log=LOG), socket=str(folder / "run" / "s")
        )
        self.children: list[Child] = []
        self.host = RemoteHost(self._start, SystemClock(), quiet_s=quiet_s)
        try:
            super().__init__(runner, None, **paging)
        except BaseException:
            self.host.close()
            raise

    def _start(self) -> Child:
        self.children.append(Child(command(self.spec)))
        return self.children[-1]

    def make_pager(self, settings: PagingSettings) -> Pager:
        return self.host.serve(self.runner, settings, self.rung.set)

    def write_behind(self) -> None:
        while True:
            self.rung.clear()
            self.core.begin_step()
            if not self.core.stats().paging["keep_owed_bytes"]:
                return
            assert self.rung.wait(WITHIN_S), "what is owed is to be written"

    def only_on_disk(self) -> None:
        """Nothing is left on the device nor in DRAM."""
        self.push_out()
        admin = Administrator(Path(self.spec.socket), SystemClock())
        try:
            # What is not in the log yet would be lost with its copy in DRAM.
            while (stats := admin.status()).durable < stats.sequence:
                threading.Event().wait(0.005)
            while admin.status().tiers[0].records:
                admin.evict(Tier.DRAM, 1 << 30, WITHIN_S)
        finally:
            admin.close()

    def close(self) -> None:
        self.host.close()
        assert all(child._process.poll() is not None for child in self.children)
