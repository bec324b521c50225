"""From arrivals to figures."""

import pytest

from isthmus.bench.client import Trace
from isthmus.bench.figures import best, figures


def test_figures_of_two_traces() -> None:
    first = Trace(0.0, [(1.0, 1), (1.5, 1), (2.0, 2)])
    second = Trace(1.0, [(3.0, 1), (4.0, 1)])
    found = figures([first, second])
    assert found.seconds == 4.0
    assert found.tokens_per_s == pytest.approx(6 / 4)
    assert found.ttft_median_s == pytest.approx(1.5)
    assert found.ttft_last_s == 2.0
    # Gaps: 0.5, 0.5, 0 (two came together), 1.
    assert found.gap_p50_s == pytest.approx(0.5)
    # After the last first token, at 3, one token came, at 4.
    assert found.decode_per_s == pytest.approx(1.0)


def test_one_token_each_has_no_gaps_and_no_decode() -> None:
    found = figures([Trace(0.0, [(0.5, 1)])])
    assert (found.gap_p50_s, found.gap_p99_s, found.decode_per_s) == (0.0, 0.0, 0.0)


def test_the_best_run_is_the_one_with_the_highest_throughput() -> None:
    assert best([{"tokens_per_s": 1.0}, {"tokens_per_s": 3.0}, {"tokens_per_s": 2.0}])["tokens_per_s"] == 3.0
