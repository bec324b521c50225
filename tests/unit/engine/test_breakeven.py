"""Load or recompute: what the measured rates decide."""

import pytest

from isthmus.contracts.blocks import Tier
from isthmus.execution.inference.paging.breakeven import ASSUMED, BreakEven

MB = 1_000_000


def test_before_anything_was_computed_loading_is_tried() -> None:
    rates = BreakEven()
    assert rates.compute_s(100) is None
    assert rates.worth({Tier.NVME: 500 * MB}, 10)
    assert rates.lengths(1000.0) == {}


def test_the_faster_of_the_two_is_chosen() -> None:
    rates = BreakEven()
    rates.computed(1000, 1.0)
    for _ in range(50):
        rates.loaded(Tier.NVME, 100 * MB, 0.104)
    assert rates.load_s({Tier.NVME: 100 * MB}) == pytest.approx(0.104, rel=0.05)
    assert rates.worth({Tier.NVME: 100 * MB}, 200)
    assert not rates.worth({Tier.NVME: 100 * MB}, 100)
    assert not rates.worth({Tier.NVME: 100 * MB}, 200, queued=0.2), "behind other loads it is not worth it"
    assert rates.worth({Tier.NVME: 100 * MB}, 200, queued=0.2, others=2), "computing would delay two others"


def test_tiers_have_rates_of_their_own_and_add_up() -> None:
    rates = BreakEven()
    rates.loaded(Tier.DRAM, 400 * MB, 0.1)
    rates.loaded(Tier.NVME, 100 * MB, 0.1)
    both = rates.load_s({Tier.DRAM: 40 * MB, Tier.NVME: 10 * MB})
    assert both == pytest.approx(rates.load_s({Tier.DRAM: 40 * MB}) + rates.load_s({Tier.NVME: 10 * MB}))
    assert rates.load_s({Tier.DRAM: 10 * MB}) < rates.load_s({Tier.NVME: 10 * MB})


def test_small_loads_teach_the_latency_and_not_the_rate() -> None:
    rates = BreakEven()
    before = rates.load_s({Tier.NVME: 100 * MB}) - rates.load_s({Tier.NVME: 0})
    for _ in range(100):
        rates.loaded(Tier.NVME, 4096, 0.02)
    assert rates.load_s({Tier.NVME: 1}) == pytest.approx(0.02, rel=0.1)
    assert rates.load_s({Tier.NVME: 100 * MB}) - rates.load_s({Tier.NVME: 1}) == pytest.approx(before, rel=0.1)


def test_break_even_lengths_follow() -> None:
    rates = BreakEven()
    rates.computed(1000, 1.0)
    lengths = rates.lengths(10_000.0)
    rate, latency = ASSUMED[Tier.NVME]
    assert lengths["nvme"] == pytest.approx(latency / (0.001 - 10_000 / rate))
    assert rates.lengths(1e9)["nvme"] == -1, "loading never pays where it takes longer a token than computing"


def test_nonsense_changes_nothing() -> None:
    rates = BreakEven()
    rates.computed(0, 1.0)
    rates.computed(10, 0.0)
    rates.loaded(Tier.DEVICE, 10, 1.0)
    rates.loaded(Tier.NVME, 0, 1.0)
    assert rates.compute_s(1) is None
    assert rates.load_s({Tier.DEVICE: 10}) == 0.0
