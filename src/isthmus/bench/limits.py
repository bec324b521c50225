"""The least time that a workload could take on a machine: every step bound by bandwidth or by arithmetic, no overhead.

Prefill is one step of all rows; a prefix that asks share is computed once; decode steps read all weights and the KV
of each sequence, a shared prefix once. `mixed` has arrivals, so its bound is none; it is not given.
"""

from dataclasses import dataclass

from isthmus.bench import model
from isthmus.bench.workloads import Workload


@dataclass(frozen=True, slots=True)
class Machine:
    """What roofline.py measured. `dtype` is bf16 or f32; `device` the name of a GPU, empty for the processor."""

    bytes_per_s: float
    flops_per_s: float
    dtype: str
    device: str = ""

    @property
    def element_bytes(self) -> int:
        """Of weights and of K and V."""
        return 2 if self.dtype == "bf16" else 4

    def step_s(self, rows: int, sampled: int, kv_tokens: int) -> float:
        """One step's least time."""
        reading = model.read_bytes(kv_tokens, self.element_bytes) / self.bytes_per_s
        return max(reading, model.flops(rows, sampled) / self.flops_per_s)


def least_seconds(workload: Workload, machine: Machine) -> float | None:
    """For a workload whose asks come at once; None for others."""
    asks = workload.asks
    if any(ask.at_s for ask in asks):
        return None
    shared = _shared(workload) if len(asks) > 1 else 0
    own = [len(ask.prompt) - shared for ask in asks]
    first = sum(own) + (0 if workload.prime else shared)
    total = machine.step_s(first, len(asks), shared if workload.prime else 0)
    for made in range(1, max(ask.output for ask in asks)):
        running = [length for length, ask in zip(own, asks, strict=True) if ask.output > made]
        total += machine.step_s(len(running), len(running), shared + sum(running) + made * len(running))
    return total


def _shared(workload: Workload) -> int:
    """How many tokens all prompts begin with."""
    first, count = workload.asks[0].prompt, 0
    rows = zip(*(ask.prompt for ask in workload.asks), strict=False)
    for count, row in enumerate(rows):
        if any(token != first[count] for token in row):
            return count
    return count
