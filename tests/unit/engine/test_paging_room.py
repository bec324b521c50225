"""Room for what is loaded: it stays until its request starts, gives way to who computes, and what left meanwhile is
asked for.
"""

from tests.support.fake_pager import FakePager
from tests.support.fake_runner import FakeRunner, fake_info
from tests.support.requests import make_request

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.events import RequestOutput
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.paging.jobs import Look
from isthmus.execution.inference.settings import SchedulerSettings

FIRST, SECOND, LONG = [1] * 17, [2] * 17, [3] * 24
BLOCKS = 4
"""Full blocks of each."""


class Engine:
    """Steps of 8 tokens; the store has what was computed before."""

    def __init__(self, blocks: int) -> None:
        self.runner, self.pager, self.clock = FakeRunner(fake_info(blocks, vocab=50)), FakePager(), ManualClock()
        self.pager.runner = self.runner
        self.core = EngineCore(
            self.runner, SchedulerSettings(max_batch_tokens=8, max_running=2), self.clock, pager=self.pager
        )
        self.core._scheduler._paging.rates.worth = lambda *args: True  # type: ignore
        self.last: dict[str, RequestOutput] = {}
        self.cached: dict[str, int] = {}

    def submit(self, name: str, prompt: list[int], tokens: int = 1, priority: int = 0) -> None:
        assert self.core.submit(make_request(name, prompt, tokens, priority=priority)) is None

    def step(self, times: int = 1, work: int = 99) -> None:
        """Steps, and the store's work between them."""
        for _ in range(times):
            self.pager.work(work)
            self.clock.advance(0.01)
            for output in self.core.step():
                if output.cached_tokens is not None:
                    self.cached[output.request_id] = output.cached_tokens
                if output.finish is not None:
                    self.last[output.request_id] = output
            self.core.check()

    def until(self, *names: str) -> None:
        for _ in range(200):
            if set(names) <= set(self.last):
                return
            self.step()
        raise AssertionError(f"only {list(self.last)} ended")

    def forgotten_by_the_device(self) -> None:
        self.step(3)
        while self.core._scheduler._tree.evict(99):
            pass


def stored(blocks: int) -> Engine:
    """An engine whose store has both prompts, and its device nothing."""
    engine = Engine(blocks)
    for name, prompt in (("f", FIRST), ("s", SECOND)):
        engine.submit(name, prompt)
        engine.until(name)
    engine.forgotten_by_the_device()
    return engine


def ready(engine: Engine) -> int:
    return engine.core._scheduler._paging.ready.blocks  # type: ignore[union-attr]


def test_what_was_loaded_is_not_pushed_out_by_another_load() -> None:
    engine = stored(13)
    engine.submit("a", FIRST)
    engine.step()
    engine.submit("long", LONG, 4, priority=-1)  # takes whole steps: nothing else starts
    engine.step(2)
    assert ready(engine) == BLOCKS
    engine.submit("b", SECOND, priority=-1)  # comes before "a", and would have its blocks for its own load
    engine.until("long", "a", "b")
    assert engine.cached["a"] == engine.cached["b"] == BLOCKS * 4
    engine.step(3)
    assert ready(engine) == engine.core.stats().blocks_leased == 0


def test_what_was_loaded_gives_way_to_who_computes() -> None:
    engine = stored(9)
    engine.submit("a", FIRST)
    engine.step()
    engine.submit("long", LONG, 4, priority=-1)  # six blocks and more, beside the four of "a"
    engine.step(4)
    assert "long" in engine.cached, "it does not wait for who has not begun"
    assert "a" not in engine.cached
    assert ready(engine) == 0
    engine.until("long", "a")
    engine.step(3)
    assert engine.core.stats().blocks_leased == 0


def test_what_left_the_device_while_its_request_waited_is_loaded() -> None:
    engine = stored(13)
    engine.submit("a", FIRST)
    engine.until("a")
    engine.submit("long", LONG, 4, priority=-1)
    engine.submit("b", FIRST)  # all of it is on the device
    assert not any(isinstance(job, Look) and len(job.keys) == BLOCKS for job in engine.pager.jobs)
    engine.step()
    while engine.core._scheduler._tree.evict(99):
        pass
    engine.until("long", "b")
    assert engine.cached["b"] == BLOCKS * 4
