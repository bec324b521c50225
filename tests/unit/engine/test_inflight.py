"""In-flight prefixes: whoever waits is woken when the block is computed or let go, and no one else."""

from isthmus.contracts.ids import RequestId
from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.inflight import InflightPrefixes

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")
KEYS = [BlockKey(bytes([number]) * 32) for number in range(4)]


def test_a_wait_is_for_the_last_block_of_one_owner_s_run() -> None:
    inflight = InflightPrefixes()
    inflight.register(A, KEYS[:2])
    inflight.register(B, KEYS)
    assert inflight.last_pending(KEYS, 0) == KEYS[1], "the third block is another owner's"
    assert inflight.last_pending(KEYS, 2) == KEYS[3]
    assert inflight.last_pending(KEYS[:0], 0) is None


def test_computing_the_block_wakes_its_waiters_once() -> None:
    inflight = InflightPrefixes()
    inflight.register(A, KEYS)
    inflight.wait(B, KEYS[1])
    assert inflight.computed(A, KEYS[0]) == []
    assert inflight.computed(C, KEYS[1]) == [], "only the owner computes it"
    assert inflight.computed(A, KEYS[1]) == [B]
    assert inflight.computed(A, KEYS[1]) == []


def test_letting_go_wakes_everybody_who_waited_for_any_of_it() -> None:
    inflight = InflightPrefixes()
    inflight.register(A, KEYS)
    inflight.wait(B, KEYS[3])
    inflight.wait(C, KEYS[1])
    assert sorted(inflight.release(A)) == [B, C]
    assert len(inflight) == 0
    assert inflight.release(A) == []


def test_a_cancelled_wait_is_not_woken() -> None:
    inflight = InflightPrefixes()
    inflight.register(A, KEYS)
    inflight.wait(B, KEYS[0])
    inflight.cancel_wait(B)
    inflight.cancel_wait(B)
    assert inflight.release(A) == []
