"""A layer's two parts, and how a family's builders get their weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.linear.base import Linear
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.step import Kernels, StepTensors


class Mixer(Protocol):
    """The part of a layer that mixes positions: attention, or a recurrence."""

    def __call__(self, rows: torch.Tensor, step: StepTensors, memory: KvMemory) -> torch.Tensor:
        """[rows, hidden], normalised, to [rows, hidden]. K and V of the real rows are in the memory after it."""
        ...


class Feed(Protocol):
    """The part of a layer that treats each row alone: an MLP, or experts."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, hidden], normalised, to [rows, hidden]."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, ready to be used."""

    input_norm: torch.Tensor
    mixer: Mixer
    feed_norm: torch.Tensor
    feed: Feed


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer, named from `prefix` on. `norm_offset` is added to the weights of RMSNorms."""

    tensors: Mapping[str, torch.Tensor]
    prefix: str
    kernels: Kernels
    norm_offset: float = 0.0

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as it is."""
        return self.tensors[f"{self.prefix}.{name}"]

    def norm(self, name: str) -> torch.Tensor:
        """The weight of an RMSNorm."""
        weight = self.tensor(f"{name}.weight")
        return weight + self.norm_offset if self.norm_offset else weight

    def biased(self, name: str) -> bool:
        """Whether the linear called `name` has a bias."""
        return f"{self.prefix}.{name}.bias" in self.tensors

    def linear(self, *names: str) -> Linear:
        """One linear of the weights of `names`, one after the other; all of them have a bias or none."""
        weights = [self.tensor(f"{name}.weight") for name in names]
        keys = [f"{self.prefix}.{name}.bias" for name in names]
        biases = [self.tensors[key] for key in keys if key in self.tensors]
        return self.kernels.linear.prepare(torch.cat(weights), torch.cat(biases) if biases else None)


MixerBuilder = Callable[[ModelConfig, int, LayerWeights], Mixer]
"""Builds layer number `int`'s mixer."""
FeedBuilder = Callable[[ModelConfig, int, LayerWeights], Feed]
