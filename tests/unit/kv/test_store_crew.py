"""Work that is shared: all of it is done, in order, whoever does it; errors come out, and nothing stays under way."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isthmus.contracts.blocks import Lifetime, Owner, Put, Reason, RecordKind, Shape
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.arena.copying import PART_BYTES, copy_digests, copy_verified
from isthmus.state.kv.arena.crew import PIECE_BYTES, Crew, crew_for
from isthmus.state.kv.client import open_client
from isthmus.state.kv.daemon import Daemon
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import open_store

LARGE = 1 << 40


OTHERS: list[threading.Thread] = []
"""Helpers of stores that other tests have left open."""


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "copies" and thread not in OTHERS]


@pytest.fixture(autouse=True)
def _nobody_stays() -> Iterator[None]:
    OTHERS[:] = []
    OTHERS[:] = helpers()
    yield
    assert not helpers()


@contextmanager
def crew(count: int) -> Iterator[Crew]:
    team = Crew(count)
    yield team
    team.close()


@pytest.mark.parametrize("helpers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_results_come_in_order(helpers: int, count: int) -> None:
    with crew(helpers) as team:
        assert team.together(lambda one: one * 2, list(range(count)), LARGE) == [one * 2 for one in range(count)]


def test_helpers_help() -> None:
    seen: set[int] = set()

    def work(_: int) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    with crew(1) as team:
        team.together(work, list(range(20)), LARGE)
    assert len(seen) == 2


def test_an_error_comes_out_when_nothing_is_under_way() -> None:
    under_way: list[int] = []

    def work(number: int) -> None:
        under_way.append(number)
        time.sleep(0.005)
        under_way.remove(number)
        if number == 3:
            raise ValueError("unlucky")

    with crew(2) as team:
        for _ in range(5):
            with pytest.raises(ValueError, match="unlucky"):
                team.together(work, list(range(8)), LARGE)
            assert not under_way


def test_work_within_work_and_from_many_threads_ends() -> None:
    found: list[list[int]] = []
    with crew(1) as team:

        def outer(number: int) -> int:
            return sum(team.together(lambda one: one, [number] * 4, LARGE))

        threads = [threading.Thread(target=lambda: found.append(team.together(outer, range(6), LARGE))) for _ in "four"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert found == [[0, 4, 8, 12, 16, 20]] * 4


def test_a_forked_child_has_helpers_of_its_own() -> None:
    with crew(1) as team:
        assert team.together(lambda one: one, [1, 2], LARGE) == [1, 2]
        child = os.fork()
        if not child:
            good = team.together(lambda one: one + 1, [1, 2, 3], LARGE) == [2, 3, 4]
            os._exit(0 if good and len(helpers()) == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_may_close_what_it_never_used() -> None:
    with crew(1) as team:
        assert team.together(lambda one: one, [1, 2], LARGE) == [1, 2]
        child = os.fork()
        if not child:
            team.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_small_pieces_are_not_handed_out() -> None:
    with crew(1) as team:
        assert team.together(lambda one: one, [1, 2], 2 * PIECE_BYTES - 1) == [1, 2]
        assert not helpers()
        assert team.together(lambda one: one, [1, 2], 2 * PIECE_BYTES) == [1, 2]
        assert helpers()


def test_what_comes_after_the_end_is_done_without_help() -> None:
    team = Crew(1)
    team.together(lambda one: one, [1, 2], LARGE)
    team.close()
    team.close()
    assert team.together(lambda one: threading.get_ident(), [1, 2], LARGE) == [threading.get_ident()] * 2


@pytest.mark.parametrize(("processors", "count"), [(1, 0), (2, 1), (64, 1)])
def test_a_crew_has_helpers_where_there_are_processors(processors: int, count: int) -> None:
    team = crew_for(processors)
    team.together(lambda one: one, [1, 2, 3], LARGE)
    assert len(helpers()) == count
    team.close()


def test_a_store_and_a_client_end_theirs() -> None:
    shape = Shape(RecordKind.BLOCK, 4, PIECE_BYTES)
    payload = memoryview(os.urandom(shape.record_bytes))
    with tempfile.TemporaryDirectory() as folder:
        settings = DaemonSettings(socket=f"{folder}/own/store.sock")
        store = open_store(StoreSettings(arena_bytes=64 << 20), SystemClock(), SystemEntropy())
        daemon = Daemon(store, settings, SystemClock(), SystemEntropy())
        daemon.start()
        client = open_client(Path(settings.socket), SystemClock())
        puts = [Put(BlockKey(bytes([n]) * 32), None, Owner(bytes(16)), shape, payload, Lifetime.SHORT) for n in (1, 2)]
        try:
            assert [one.reason for one in client.write(puts, 10.0)] == [Reason.STORED] * 2
            assert len(helpers()) == (2 if len(os.sched_getaffinity(0)) > 1 else 0)
        finally:
            client.close()
            daemon.stop()
            store.close()
    assert not helpers()


@pytest.mark.parametrize("helpers", [0, 1])
@pytest.mark.parametrize("chunk", [4096, 40_960, 3 * PART_BYTES // 2, 4 * PART_BYTES])
def test_large_copies_are_the_same_in_parts(chunk: int, helpers: int) -> None:
    size = max(1, 4 * PART_BYTES // chunk) * chunk
    source, target = memoryview(os.urandom(size)), memoryview(bytearray(size))
    with crew(helpers) as team:
        digests = copy_digests(source, target, chunk, team)
        assert bytes(target) == bytes(source)
        assert digests == digests_of(source, chunk)
        assert copy_verified(source, target, chunk, digests, team)
        assert not copy_verified(source, target, chunk, digests[:-1] + bytes([digests[-1] ^ 1]), team)
