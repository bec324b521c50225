"""Which records are worth the wear."""

from isthmus.contracts.blocks import Lifetime
from isthmus.state.kv.log.admission import Admission

DAY = 86_400 * 1000
"""Bytes a day: 1,000 a second, 3.6 million in the bucket."""
ROOM = 3_600_000


def test_without_a_limit_everything_is_let_in() -> None:
    rule = Admission(0, 100, 0.0)
    rule.spend(10**15, 0.0)
    assert rule.admits(10**12, Lifetime.SHORT, 0, 0.0)


def test_a_day_s_bytes_are_not_exceeded() -> None:
    rule = Admission(DAY, 1000, 0.0)
    written = 0
    for second in range(86_400):
        while rule.admits(5000, Lifetime.SHARED, 9, float(second)):
            rule.spend(5000, float(second))
            written += 5000
    assert DAY * 0.95 <= written <= DAY + ROOM


def test_as_the_budget_grows_scarce_only_the_likely_are_let_in() -> None:
    rule = Admission(DAY, 1000, 0.0)
    assert rule.admits(1000, Lifetime.SHORT, 0, 0.0)
    rule.spend(ROOM // 4, 0.0)
    assert not rule.admits(1000, Lifetime.SHORT, 0, 0.0)
    assert rule.admits(1000, Lifetime.SESSION, 0, 0.0)
    rule.spend(ROOM * 4 // 10, 0.0)
    assert not rule.admits(1000, Lifetime.SESSION, 0, 0.0)
    assert rule.admits(1000, Lifetime.SESSION, 1, 0.0)
    assert rule.admits(1000, Lifetime.SHARED, 0, 0.0)
    rule.spend(ROOM, 0.0)
    assert not rule.admits(1, Lifetime.SHARED, 50, 0.0)


def test_debt_is_paid_back_with_time_and_the_bucket_has_an_end() -> None:
    rule = Admission(DAY, 1000, 0.0)
    rule.spend(2 * ROOM, 0.0)
    assert rule.level(0.0) == -ROOM
    assert rule.level(3600.0) == 0.0
    assert rule.level(1800.0) == 0.0
    assert rule.level(10**9) == ROOM


def test_what_is_read_is_learned() -> None:
    rule = Admission(DAY, 1000, 0.0)
    before = rule.expected_reuse(Lifetime.SESSION, 0)
    for _ in range(100):
        rule.observe(Lifetime.SESSION, 0.0)
    assert rule.expected_reuse(Lifetime.SESSION, 0) < 0.01 < before
    assert rule.expected_reuse(Lifetime.SESSION, 1) > rule.expected_reuse(Lifetime.SESSION, 0)
    for _ in range(100):
        rule.observe(Lifetime.SESSION, 7.0)
    assert rule.expected_reuse(Lifetime.SESSION, 0) <= 1.0
