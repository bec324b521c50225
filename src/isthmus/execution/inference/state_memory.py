"""The device's state memory of a hybrid model: records of the canonical layout, one a slot, and an empty state.

Shape [slots + 1, layers, convolution inputs and recurrent state] (contracts.layout), float32 in every mode: reading or
writing a slot is one copy, bit for bit. The extra last slot is zero and never written: it is the state before the first
position.
"""

import math

import torch

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.layout import StateFormat
from isthmus.execution.inference.host_memory import HostMemory, host_memory


class StateMemory:
    """Slots 0 to `slots` - 1, shaped by `shape`, and the empty state."""

    def __init__(self, slots: int, shape: StateFormat, device: torch.device) -> None:
        self.slots, self.shape = slots, shape
        size = (slots + 1, shape.state_bytes // 4)
        self.host: HostMemory | None = None
        """As of `KvMemory`."""
        if device.type == "cpu":
            self.host = host_memory("state", math.prod(size) * 4)
            self._pool = torch.from_numpy(self.host.bytes).view(torch.float32).view(size)
        else:
            self._pool = torch.zeros(size, dtype=torch.float32, device=device)
        conv = shape.channels * shape.history
        layers = self._pool.view(slots + 1, shape.layers, -1).unbind(1)
        sizes = (shape.heads, shape.key_dim, shape.value_dim)
        self._conv: list[torch.Tensor] = []
        self._recurrent: list[torch.Tensor] = []
        for part in layers:
            self._conv.append(part[:, :conv].view(slots + 1, shape.channels, shape.history))
            self._recurrent.append(part[:, conv:].view(slots + 1, *sizes))

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self._pool.device

    @property
    def empty(self) -> int:
        """The slot of the state before the first position."""
        return self.slots

    def conv(self, layer: int) -> torch.Tensor:
        """The convolution inputs of a recurrent layer, [slots + 1, channels, history]."""
        return self._conv[layer]

    def recurrent(self, layer: int) -> torch.Tensor:
        """The states of a recurrent layer, [slots + 1, heads, key_dim, value_dim]."""
        return self._recurrent[layer]

    def view(self, slot: int) -> memoryview | None:
        """The record of a slot where it lies; None off the CPU. Raises `InvalidInput` when there is no such slot."""
        self._check(slot)
        return self._pool[slot].view(torch.uint8).numpy().data if self._pool.device.type == "cpu" else None

    def read_state(self, slot: int) -> bytes:
        """The record of a slot. Raises `InvalidInput` when there is no such slot."""
        self._check(slot)
        return self._pool[slot].view(torch.uint8).cpu().numpy().tobytes()

    def write_state(self, slot: int, record: bytes) -> None:
        """Set a slot. Raises `InvalidInput` on a wrong slot or length."""
        self._check(slot)
        target = self._pool[slot].view(torch.uint8)
        if len(record) != target.numel():
            raise InvalidInput(f"a state record has {target.numel()} bytes, not {len(record)}", "record")
        # frombuffer wants a writable buffer; the copy is the one into the pool.
        target.copy_(torch.frombuffer(bytearray(record), dtype=torch.uint8))

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise InvalidInput(f"state slot {slot} does not exist, accepted: 0 to {self.slots - 1}", "slot")
