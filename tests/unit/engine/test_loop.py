"""The loop of the engine's process, over a real socket pair and a core that does as it is told."""

import select
import socket
import threading
from collections.abc import Iterator

import pytest
from tests.support.requests import make_request

from isthmus.contracts.events import Command, EngineStats, Outputs, RequestOutput, Shutdown, Submit
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.inference.process import Bell, Hangup, Link, Loop

WITHIN_S = 20.0


class Core:
    """Has a step under way from the first `begin_step` on, until it is done or, when a request comes, taken back."""

    def __init__(self) -> None:
        self.stepping = False
        self.ready = False
        self.begun = 0
        self.again = threading.Event()
        self.compiled = ""

    def begin_step(self) -> bool:
        self.begun += 1
        if self.begun == 1:
            self.stepping = True
        else:
            self.again.set()
        return self.stepping

    def submit(self, request: EngineRequest) -> RequestOutput | None:
        del request
        self.stepping = False
        return None

    def finish_step(self) -> list[RequestOutput]:
        assert self.stepping
        assert self.ready
        self.stepping = False
        return [RequestOutput("a", [7])]  # type: ignore[arg-type]

    def collect(self) -> list[RequestOutput]:
        return []

    def wait_s(self) -> float | None:
        return None

    def grace_s(self) -> float:
        return 0.0

    def watched(self) -> tuple[list[int], list[int]]:
        return [], []

    def stats(self) -> EngineStats:
        return EngineStats(compiled=self.compiled)


class World:
    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(WITHIN_S)
        self.core, self.bell = Core(), Bell()
        loop = Loop(self.core, Link(self.theirs), self.bell)  # type: ignore[arg-type]

        def run() -> None:
            with pytest.raises(Hangup):
                loop.run()

        self.thread = threading.Thread(target=run, daemon=True)

    def send(self, command: Command) -> None:
        self.ours.sendall(encode_frame(command))

    def receive(self) -> Outputs:
        reader: FrameReader[Outputs] = FrameReader(Outputs)
        while not (found := reader.feed(self.ours.recv(1 << 16))):
            pass
        return found[0]

    def end(self) -> None:
        self.send(Shutdown())
        self.thread.join(WITHIN_S)
        assert not self.thread.is_alive()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.ours.close()
    made.theirs.close()
    made.bell.close()


def test_a_step_that_is_taken_back_while_it_is_awaited_is_not_waited_for(world: World) -> None:
    world.thread.start()
    while not world.core.stepping:
        pass
    world.send(Submit(make_request("a", [1])))
    assert world.core.again.wait(WITHIN_S), "the loop goes on"
    world.end()


def test_the_end_of_a_step_is_noticed_from_another_thread(world: World) -> None:
    world.thread.start()
    while not world.core.stepping:
        pass
    world.core.ready = True
    world.bell.ring()
    assert [output.token_ids for output in world.receive().outputs] == [[7]]
    world.end()


def test_a_loop_at_rest_tells_that_pieces_are_built_and_when_they_are_there(world: World) -> None:
    world.core.begun, world.core.compiled = 1, "building"
    world.thread.start()
    assert world.receive().stats.compiled == "building"
    world.core.compiled = "ready"
    assert world.receive().stats.compiled == "ready"
    world.end()


def test_a_bell_that_rings_often_is_heard_once() -> None:
    bell = Bell()
    for _ in range(100_000):
        bell.ring()
    assert select.select([bell.fileno], [], [], 0)[0]
    bell.hush()
    assert not select.select([bell.fileno], [], [], 0)[0]
    bell.close()
