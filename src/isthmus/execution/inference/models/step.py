"""What one step of a model is computed from: the kernels, and the tensors that every layer shares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from isthmus.execution.inference.attention.base import AttentionBackend, StepAttention
from isthmus.execution.inference.linear.base import LinearBackend
from isthmus.execution.inference.models.delta_plan import DeltaPlan
from isthmus.execution.inference.models.gated_delta import DEFAULT_DELTA, DeltaKernels
from isthmus.execution.inference.models.pieces import Norm, Pieces
from isthmus.execution.inference.paging.jobs import Arrivals
from isthmus.execution.inference.state_memory import StateMemory

MOST_WAIT_S = 1.0
"""How long a layer waits for one that is being loaded: others compute in the same step."""


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension (Zhang & Sennrich 2019), in float32 inside."""
    if weight.dtype is not rows.dtype:
        return functional.rms_norm(rows.float(), weight.shape, weight, eps).to(rows.dtype)
    return functional.rms_norm(rows, weight.shape, weight, eps)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return functional.silu(gate).mul_(up)


def sigmoid(rows: torch.Tensor) -> torch.Tensor:
    """The logistic function of each element."""
    return torch.sigmoid(rows)


def route(logits: torch.Tensor, per_token: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each row, best first, and their weights, each [rows, per_token]; weights in the logits' dtype.

    Softmax over all experts in float32, then the best; `normalise` divides by their sum. Of equals the one with the
    lower number goes first.
    """
    shares, experts = torch.softmax(logits.float(), -1).sort(dim=-1, descending=True, stable=True)
    weights = shares[:, :per_token]
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts[:, :per_token]


@dataclass(frozen=True, slots=True)
class Kernels:
    """How the parts are computed. Rows of a step, and of an expert, are padded to a multiple of `row_tile`.

    `pieces` may change between two steps; what it holds first computes by `norm`.
    """

    linear: LinearBackend
    attention: AttentionBackend
    norm: Norm
    gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    row_tile: int
    pieces: Pieces
    sigmoid: Callable[[torch.Tensor], torch.Tensor] = sigmoid
    route: Callable[[torch.Tensor, int, bool], tuple[torch.Tensor, torch.Tensor]] = route
    delta: DeltaKernels = DEFAULT_DELTA


@dataclass(frozen=True, slots=True)
class StepStates:
    """The recurrent states of a step of a hybrid model: where they are, and what is to be done with them."""

    memory: StateMemory
    plan: DeltaPlan


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a step gives every layer: token ids, angles, where K and V go, attention."""

    tokens: torch.Tensor  # [rows] int64
    cos: torch.Tensor  # [rows, 1, rotary_dim]
    sin: torch.Tensor
    write: Sequence[torch.Tensor]  # for each layer of the memory [2 * real rows]: rows of K, then of V
    real_rows: int
    attention: StepAttention
    states: StepStates | None = None
    arrivals: Sequence[Arrivals] = ()  # loads of which layers may be missing yet

    def await_layer(self, layer: int) -> None:
        """Wait until what is loaded of `layer` is here. What does not come in time fails: its slices are void."""
        for one in self.arrivals:
            if not one.wait(layer, MOST_WAIT_S):
                one.fail()
