"""The asks of `isthmus bench engine`, and the least time they could take."""

import pytest

from isthmus.bench import model
from isthmus.bench.limits import Machine, least_seconds
from isthmus.bench.workloads import NAMES, build
from isthmus.contracts.errors import InvalidInput

MACHINE = Machine(bytes_per_s=20e9, flops_per_s=2e12, dtype="bf16")


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_makes_the_same_asks_again_and_another_seed_none_of_them(name: str) -> None:
    asks = build(name, 3, model.VOCABULARY).asks
    assert asks == build(name, 3, model.VOCABULARY).asks
    other = {ask.prompt[:8] for ask in build(name, 4, model.VOCABULARY).asks}
    assert not other & {ask.prompt[:8] for ask in asks}
    assert all(0 <= token < model.VOCABULARY for ask in asks for token in ask.prompt)


def test_the_shapes_are_those_that_were_agreed_on() -> None:
    found = {name: build(name, 1, model.VOCABULARY) for name in NAMES}
    sizes = {n: {(len(a.prompt), a.output) for a in w.asks} for n, w in found.items() if n != "mixed"}
    assert sizes == {"A": {(512, 64)}, "B": {(1024, 64)}, "C-cold": {(1056, 32)}, "C-warm": {(1056, 32)}}
    assert [len(found[n].asks) for n in ("A", "B", "C-cold", "C-warm")] == [16, 1, 16, 16]
    for name in ("C-cold", "C-warm"):
        assert len({ask.prompt[:1024] for ask in found[name].asks}) == 1
    assert found["C-warm"].prime[0].prompt[:1024] == found["C-warm"].asks[0].prompt[:1024]
    assert not found["C-cold"].prime
    times = [ask.at_s for ask in found["mixed"].asks]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert all(len(ask.prompt) + ask.output <= model.POSITIONS for ask in found["mixed"].asks)


def test_an_unknown_workload_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="'D' is no workload"):
        build("D", 1, model.VOCABULARY)


def test_the_model_has_the_parameters_that_were_agreed_on() -> None:
    assert round(model.parameters() / 1e6, 1) == 124.7


def test_the_bound_of_one_stream_is_reading_all_weights_for_each_token() -> None:
    workload = build("B", 1, model.VOCABULARY)
    least = least_seconds(workload, MACHINE)
    assert least is not None
    # 200 MB at 20 GB/s a step, 63 steps after the first; the prompt's arithmetic and the KV come on top.
    assert 63 * 0.010 < least < 63 * 0.011 + 0.2


def test_a_shared_prefix_is_computed_and_read_once() -> None:
    cold, warm = (least_seconds(build(n, 1, model.VOCABULARY), MACHINE) for n in ("C-cold", "C-warm"))
    assert cold is not None
    assert warm is not None
    prefix = 1024 * model.flops(1, 0) / MACHINE.flops_per_s
    assert cold - warm == pytest.approx(prefix, rel=0.05)


def test_arrivals_have_no_such_bound() -> None:
    assert least_seconds(build("mixed", 1, model.VOCABULARY), MACHINE) is None
