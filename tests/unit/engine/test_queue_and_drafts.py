"""The waiting queue's order never changes with time; drafts continue the latest earlier occurrence."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from tests.support.requests import make_request

from isthmus.execution.inference.drafts import NGRAM, NgramDrafter
from isthmus.execution.inference.sequence import Sequence
from isthmus.execution.inference.waiting import WaitingQueue

ARRIVALS = st.lists(st.tuples(st.integers(0, 50), st.integers(-3, 3)), min_size=1, max_size=20)


@given(ARRIVALS, st.floats(0.1, 20), st.floats(50, 200))
def test_the_order_is_urgency_at_any_time(arrivals: list[tuple[int, int]], ageing_s: float, now: float) -> None:
    queue = WaitingQueue(ageing_s)
    sequences = [
        Sequence(make_request(str(index), [1], priority=priority), 4, b"f" * 32, float(arrived))
        for index, (arrived, priority) in enumerate(arrivals)
    ]
    for sequence in sequences:
        queue.push(sequence)

    def urgency(sequence: Sequence) -> float:
        return sequence.request.priority - (now - sequence.arrived) / ageing_s

    order = list(queue)
    assert len(order) == len(sequences)
    for first, second in itertools.pairwise(order):
        assert urgency(first) <= urgency(second) + 1e-6
    queue.remove(order[0])
    queue.push(order[0])
    assert list(queue) == order, "a preempted sequence gets its place back"


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 6))
def test_drafts_are_what_followed_the_latest_earlier_occurrence(tokens: list[int], limit: int) -> None:
    drafter = NgramDrafter()
    for token in tokens:
        drafter.extend([token])
    expected: list[int] = []
    last = tokens[-NGRAM:]
    for start in range(len(tokens) - NGRAM - 1, -1, -1):
        if len(last) == NGRAM and tokens[start : start + NGRAM] == last:
            expected = tokens[start + NGRAM : start + NGRAM + limit]
            break
    assert drafter.propose(limit) == expected
