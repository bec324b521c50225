"""The gated delta rule: chunked and sequential forms against the definition, and the memory of its states."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.layout import StateFormat
from isthmus.execution.inference.exact_delta import exact_delta, exact_pointwise
from isthmus.execution.inference.models.delta_plan import StateSpan, plan_delta
from isthmus.execution.inference.models.gated_delta import DEFAULT_DELTA, DeltaInputs, DeltaKernels, convolve, scan
from isthmus.execution.inference.state_memory import StateMemory

SHAPE = StateFormat(b"w" * 32, layers=2, channels=7, history=3, heads=6, key_dim=8, value_dim=12)
CPU = torch.device("cpu")


@dataclass
class Part:
    """A sequence's part of a step, before it has rows: `source` None for the empty state."""

    start: int
    count: int
    source: int | None
    captures: Sequence[tuple[int, int]] = ()


def spans(parts: Sequence[Part]) -> list[StateSpan]:
    made, first = [], 0
    for part in parts:
        source = SLOTS if part.source is None else part.source
        made.append(StateSpan(first, part.count, part.start, source, part.captures))
        first += part.count
    return made


SLOTS = 12
STEPS: dict[str, list[Part]] = {
    "decode": [Part(70, 1, 0, [(71, 0)]), Part(1, 1, 1, [(2, 1)]), Part(0, 1, None, [(1, 2)])],
    "one long": [Part(0, 200, None, [(200, 0)])],
    "past the grid": [Part(0, 63, None, [(63, 0)]), Part(0, 64, None, [(64, 1)]), Part(0, 65, None, [(65, 2)])],
    "off the grid": [Part(30, 170, 3, [(200, 3)]), Part(64, 128, 4, [(192, 5)]), Part(127, 2, 6, [(129, 6)])],
    "states inside": [
        Part(0, 192, None, [(64, 0), (100, 1), (101, 2), (192, 3)]),
        Part(64, 64, 4, [(100, 5), (128, 4)]),
    ],
    "drafts": [Part(60, 6, 0, [(61, 1), (62, 2), (63, 3), (64, 4), (65, 5), (66, 0)]), Part(9, 1, 6, [(10, 6)])],
    "nothing kept": [Part(0, 70, None), Part(64, 70, 0)],
    "forks": [Part(64, 70, 0, [(134, 1)]), Part(64, 3, 0, [(67, 2)]), Part(64, 64, 0, [(128, 3)])],
}


def filled_memory(seed: int = 0) -> StateMemory:
    memory = StateMemory(SLOTS, SHAPE, CPU)
    generator = np.random.default_rng(seed)
    for slot in range(SLOTS):
        memory.write_state(slot, generator.standard_normal(SHAPE.state_bytes // 4).astype("<f4").tobytes())
    return memory


def random_inputs(rows: int, key_heads: int = 2, seed: int = 1) -> DeltaInputs:
    generator = torch.Generator().manual_seed(seed)
    heads, keys, values = SHAPE.heads, SHAPE.key_dim, SHAPE.value_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    unit = DEFAULT_DELTA.unit
    return DeltaInputs(
        query=unit(normal(rows, key_heads, keys)) * keys**-0.5,
        key=unit(normal(rows, key_heads, keys)),
        value=normal(rows, heads, values),
        decay=-torch.rand(rows, heads, generator=generator) * torch.logspace(-3, 1, heads),
        rate=torch.rand(rows, heads, generator=generator),
    )


def by_definition(inputs: DeltaInputs, span: StateSpan, state: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs of a span and the state after each position, in float64, from the recurrence of the paper."""
    shared = inputs.value.shape[1] // inputs.key.shape[1]
    state, outputs, states = state.double(), [], []
    for row in range(span.first, span.first + span.count):
        key, query = (part[row].double().repeat_interleave(shared, 0) for part in (inputs.key, inputs.query))
        state = state * inputs.decay[row].double().exp()[:, None, None]
        seen = torch.einsum("hkv,hk->hv", state, key)
        change = (inputs.value[row].double() - seen) * inputs.rate[row].double()[:, None]
        state = state + torch.einsum("hk,hv->hkv", key, change)
        outputs.append(torch.einsum("hkv,hk->hv", state, query))
        states.append(state)
    return torch.stack(outputs), states


@pytest.mark.parametrize("kernels", [DEFAULT_DELTA, exact_delta()], ids=["default", "exact"])
@pytest.mark.parametrize("name", STEPS)
def test_outputs_and_kept_states_are_those_of_the_definition(name: str, kernels: DeltaKernels) -> None:
    made, memory, before = spans(STEPS[name]), filled_memory(), filled_memory()
    inputs = random_inputs(sum(span.count for span in made))
    plan = plan_delta(made, SHAPE.history, CPU, cells=kernels.cells)
    out = scan(inputs, kernels, plan, memory, 1)
    written = set()
    for span in made:
        expected, states = by_definition(inputs, span, before.recurrent(1)[span.source])
        torch.testing.assert_close(out[span.first : span.first + span.count].double(), expected, atol=2e-5, rtol=1e-4)
        for end, slot in span.captures:
            written.add(slot)
            kept = memory.recurrent(1)[slot].double()
            torch.testing.assert_close(kept, states[end - span.start - 1], atol=2e-5, rtol=1e-4)
    untouched = [slot for slot in range(SLOTS + 1) if slot not in written]
    assert torch.equal(memory.recurrent(1)[untouched], before.recurrent(1)[untouched])
    assert torch.equal(memory.recurrent(0), before.recurrent(0))


@pytest.mark.parametrize("name", STEPS)
def test_the_convolution_reads_kept_inputs_and_keeps_the_last_ones(name: str) -> None:
    made, memory, before = spans(STEPS[name]), filled_memory(), filled_memory()
    rows = torch.randn(sum(span.count for span in made), SHAPE.channels, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(SHAPE.history + 1, SHAPE.channels, generator=torch.Generator().manual_seed(4))
    out = convolve(rows, weight, plan_delta(made, SHAPE.history, CPU, cells=True), memory, 0)
    for span in made:
        line = torch.cat((before.conv(0)[span.source].T, rows[span.first : span.first + span.count]))
        expected = torch.nn.functional.conv1d(line.T[None], weight.T[:, None], groups=SHAPE.channels)[0].T
        torch.testing.assert_close(out[span.first : span.first + span.count], expected)
        for end, slot in span.captures:
            at = end - span.start
            assert torch.equal(memory.conv(0)[slot], line[at : at + SHAPE.history].T)


def test_exact_mode_is_bitwise_the_same_however_a_sequence_is_cut_and_joined() -> None:
    count, kernels = 150, exact_delta()
    whole = random_inputs(count)

    def run(cuts: Sequence[int], beside: int) -> tuple[torch.Tensor, bytes]:
        """In slices that end at `cuts`, with `beside` other sequences of changing lengths in each step."""
        memory, parts, start = filled_memory(), [], 0
        for turn, end in enumerate(cuts):
            mine = DeltaInputs(*(part[start:end] for part in fields(whole)))
            others = [Part(0, 1 + (turn * 5 + index * 7) % 11, None) for index in range(beside)]
            step = spans([*others, Part(start, end - start, 0 if start else None, [(end, 0)])])
            joined = mine
            if others:
                rest = random_inputs(sum(other.count for other in others), seed=turn)
                joined = DeltaInputs(*(torch.cat(pair) for pair in zip(fields(rest), fields(mine), strict=True)))
            out = scan(joined, kernels, plan_delta(step, 3, CPU, cells=False), memory, 0)
            parts.append(out[step[-1].first :])
            start = end
        return torch.cat(parts), memory.recurrent(0)[0].numpy().tobytes()

    reference = run([count], 0)
    for cuts, beside in (([count], 3), ([64, 128, count], 0), ([7, 64, 65, 99, count], 2), (range(1, count + 1), 1)):
        out, state = run(list(cuts), beside)
        assert torch.equal(out, reference[0])
        assert state == reference[1]


def fields(inputs: DeltaInputs) -> tuple[torch.Tensor, ...]:
    return inputs.query, inputs.key, inputs.value, inputs.decay, inputs.rate


def test_a_state_on_the_grid_costs_no_cell_and_one_off_the_grid_only_its_own() -> None:
    def cells(captures: Sequence[tuple[int, int]]) -> int:
        plan = plan_delta(spans([Part(0, 192, None, captures)]), 3, CPU, cells=True)
        return sum(window.cell_rows.numel() for window in plan.windows) // 64

    assert cells([(192, 0)]) == cells([(64, 1), (128, 2), (192, 0)]) == 3
    assert cells([(100, 1), (192, 0)]) == 2


def test_many_cells_are_done_in_windows_of_bounded_size() -> None:
    made = spans([Part(0, 64 * 50, None, [(64 * 50, 0)]), Part(0, 64 * 30, None, [(64 * 30, 1)])])
    plan = plan_delta(made, 3, CPU, cells=True)
    assert [window.cell_rows.numel() // 64 for window in plan.windows] == [64, 16]
    many = spans([Part(0, 128, None, [(128, slot)]) for slot in range(70)])
    plan = plan_delta(many, 3, CPU, cells=True)
    sizes = [window.cell_rows.numel() // 64 for window in plan.windows]
    assert sum(sizes) == 140
    assert max(sizes) <= 64


def test_exact_elementwise_functions_do_not_depend_on_the_place() -> None:
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(5))
    reference = exact_pointwise(torch.exp, values)
    torch.testing.assert_close(reference, values.exp())
    for low, high in ((0, 1), (3, 50), (17, 20_001), (39_999, 40_000)):
        assert torch.equal(exact_pointwise(torch.exp, values[low:high]), reference[low:high])


def test_a_state_comes_back_bit_for_bit_in_the_canonical_layout() -> None:
    memory = StateMemory(3, SHAPE, CPU)
    record = np.random.default_rng(1).integers(0, 256, SHAPE.state_bytes, np.uint8).tobytes()
    memory.write_state(2, record)
    assert memory.read_state(2) == record
    assert memory.read_state(1) == bytes(SHAPE.state_bytes)
    memory.conv(1)[0, 4, 2] = 5.0
    memory.recurrent(0)[0, 3, 7, 11] = 6.0
    layers = np.frombuffer(memory.read_state(0), "<f4").reshape(2, -1)
    conv, recurrent = layers[:, :21].reshape(2, 7, 3), layers[:, 21:].reshape(2, 6, 8, 12)
    assert conv[1, 4, 2] == 5.0
    assert recurrent[0, 3, 7, 11] == 6.0
    assert np.count_nonzero(layers) == 2
    for slot, bad in ((0, record[:-1]), (3, record), (-1, record)):
        with pytest.raises(InvalidInput):
            memory.write_state(slot, bad)
    with pytest.raises(InvalidInput):
        memory.read_state(3)
