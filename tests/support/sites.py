"""An engine core over a runner and a block store."""

import threading

from isthmus.contracts.blocks import BlockStore
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.events import RequestOutput
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.paging.local import LocalPager
from isthmus.execution.inference.paging.settings import PagingSettings
from isthmus.execution.inference.runner import TorchRunner
from isthmus.execution.inference.settings import SchedulerSettings

WITHIN_S = 30.0
PROMPT = list(range(2, 100))


class Site:
    """An engine core over a runner and a store, driven as its process does it."""

    def __init__(self, runner: TorchRunner, store: BlockStore, **paging: object) -> None:
        self.runner, self.store = runner, store
        self.rung = threading.Event()
        settings = PagingSettings(look_s=WITHIN_S, **paging)  # type: ignore[arg-type]
        self.pager = LocalPager(store, runner, settings, SystemClock(), wake=self.rung.set)
        self.core = EngineCore(runner, SchedulerSettings(paging=settings), SystemClock(), pager=self.pager)
        # A tiny model computes faster than it loads: what is tested is loading.
        self.core._scheduler._paging.rates.worth = lambda *args: True  # type: ignore

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
        self.pager.threads.settle(WITHIN_S)
        while self.core.begin_step():
            self.core.finish_step()
        self.core.check()
        assert self.core.stats().blocks_leased == 0

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
