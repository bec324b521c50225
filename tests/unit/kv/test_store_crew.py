"""Work that is shared: all of it is done, in order, whoever does it; errors come out, and nothing stays under way."""

import os
import threading
import time

import pytest

from isthmus.state.kv.arena import crew
from isthmus.state.kv.arena.copying import PART_BYTES, copy_digests, copy_verified
from isthmus.state.kv.arena.crew import PIECE_BYTES, Crew, together
from isthmus.state.kv.hashing import digests_of


@pytest.mark.parametrize("helpers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_results_come_in_order(helpers: int, count: int) -> None:
    assert Crew(helpers).together(lambda one: one * 2, list(range(count))) == [one * 2 for one in range(count)]


def test_helpers_help() -> None:
    seen: set[int] = set()

    def work(_: int) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    Crew(1).together(work, list(range(20)))
    assert len(seen) == 2


def test_an_error_comes_out_when_nothing_is_under_way() -> None:
    under_way: list[int] = []

    def work(number: int) -> None:
        under_way.append(number)
        time.sleep(0.005)
        under_way.remove(number)
        if number == 3:
            raise ValueError("unlucky")

    team = Crew(2)
    for _ in range(5):
        with pytest.raises(ValueError, match="unlucky"):
            team.together(work, list(range(8)))
        assert not under_way


def test_work_within_work_and_from_many_threads_ends() -> None:
    team = Crew(1)
    found: list[list[int]] = []

    def outer(number: int) -> int:
        return sum(team.together(lambda one: one, [number] * 4))

    threads = [threading.Thread(target=lambda: found.append(team.together(outer, range(6)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [[0, 4, 8, 12, 16, 20]] * 4


def test_a_forked_child_has_helpers_of_its_own() -> None:
    team = Crew(1)
    assert team.together(lambda one: one, [1, 2]) == [1, 2]
    child = os.fork()
    if not child:
        good = team.together(lambda one: one + 1, [1, 2, 3]) == [2, 3, 4]
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_small_pieces_are_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "CREW", None)
    assert together(lambda one: one, [1, 2], 2 * PIECE_BYTES - 1) == [1, 2]


@pytest.mark.parametrize("chunk", [4096, 40_960, 3 * PART_BYTES // 2, 4 * PART_BYTES])
def test_large_copies_are_the_same_in_parts(chunk: int) -> None:
    size = max(1, 4 * PART_BYTES // chunk) * chunk
    source, target = memoryview(os.urandom(size)), memoryview(bytearray(size))
    digests = copy_digests(source, target, chunk)
    assert bytes(target) == bytes(source)
    assert digests == digests_of(source, chunk)
    assert copy_verified(source, target, chunk, digests)
    assert not copy_verified(source, target, chunk, digests[:-1] + bytes([digests[-1] ^ 1]))
