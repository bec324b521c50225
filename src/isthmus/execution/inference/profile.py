"""Where the time of steps goes: a profile by part, behind a setting.

Parts: `schedule` (choosing and accounting, on the engine's loop), `linears`, `attention` (both with what their kernels
gather and mask), `norms` (norms, the additions before them, and gates), `sampling`, and `interpreter`: all else of a
step, which is Python, the packing, rotations and writes of K and V. Parts do not overlap; all but `schedule` add up to
the steps' time. On a CPU, where operators return when they are done; on an accelerator only the launches would be
timed, so it is refused there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ParamSpec, TypeVar

import torch

from isthmus.contracts.clock import SystemClock
from isthmus.execution.inference.attention.base import AttentionBackend, Span, StepAttention
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.linear.base import Linear, LinearBackend
from isthmus.execution.inference.models.pieces import AddNorm, Norm, Pieces, RotateWrite, eager_rotate_write
from isthmus.execution.inference.models.step import Kernels

P = ParamSpec("P")
R = TypeVar("R")

SCHEDULE, LINEARS, ATTENTION, NORMS = "schedule", "linears", "attention", "norms"
SAMPLING, INTERPRETER = "sampling", "interpreter"


class StepProfile:
    """Seconds since the start, by part. Each part is written by one thread. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or SystemClock().monotonic
        self.seconds = dict.fromkeys((SCHEDULE, LINEARS, ATTENTION, NORMS, SAMPLING, INTERPRETER), 0.0)

    def timed(self, part: str, call: Callable[P, R]) -> Callable[P, R]:
        """`call`, its time counted."""

        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            start = self._clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += self._clock() - start

        return measured

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the body."""
        start = self._clock()
        try:
            yield
        finally:
            self.seconds[name] += self._clock() - start

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the body, a whole step: what no other part of it counts is the interpreter's."""
        start, before = self._clock(), self._inside()
        try:
            yield
        finally:
            inside = self._inside() - before
            self.seconds[INTERPRETER] += self._clock() - start - inside

    def _inside(self) -> float:
        return sum(self.seconds[part] for part in (LINEARS, ATTENTION, NORMS, SAMPLING))


class _TimedLinear:
    """`LinearBackend`."""

    def __init__(self, backend: LinearBackend, profile: StepProfile) -> None:
        self._backend, self._profile = backend, profile

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """See `LinearBackend`."""
        return self._profile.timed(LINEARS, self._backend.prepare(weight, bias))

    def prepare_swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> Linear | None:
        """See `LinearBackend`."""
        product = self._backend.prepare_swiglu(gate, up)
        return None if product is None else self._profile.timed(LINEARS, product)


class _TimedAttention:
    """`AttentionBackend`."""

    def __init__(self, backend: AttentionBackend, profile: StepProfile) -> None:
        self._backend, self._profile = backend, profile

    def plan(self, spans: Sequence[Span], memory: KvMemory, heads: int) -> StepAttention:
        """See `AttentionBackend`."""
        with self._profile.part(ATTENTION):
            step = self._backend.plan(spans, memory, heads)
        return self._profile.timed(ATTENTION, step)


class _TimedPieces(Pieces):
    """`Pieces`. Of an eager rotation the norms inside are counted, by `norm`; of a compiled one nothing is."""

    def __init__(self, kernels: Kernels, norm: Norm, profile: StepProfile) -> None:
        self._profile = profile
        super().__init__(profile.timed(NORMS, kernels.pieces.add_norm), eager_rotate_write(norm))

    def use(self, add_norm: AddNorm, rotate_write: RotateWrite) -> None:
        """See `Pieces`."""
        super().use(self._profile.timed(NORMS, add_norm), rotate_write)


def profiled(kernels: Kernels, profile: StepProfile) -> Kernels:
    """The same kernels, their time counted. Their pieces must be the eager ones."""
    norm = profile.timed(NORMS, kernels.norm)
    return replace(
        kernels,
        linear=_TimedLinear(kernels.linear, profile),
        attention=_TimedAttention(kernels.attention, profile),
        norm=norm,
        pieces=_TimedPieces(kernels, norm, profile),
        gate=profile.timed(NORMS, kernels.gate),
    )
