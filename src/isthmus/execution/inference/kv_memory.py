"""The device's KV memory: records of the canonical layout, one a block, and a slot of zeros.

Shape [blocks + 1, layers, 2, block_tokens, kv_heads, head_dim] (contracts.layout): reading or writing a block is one
copy, bit for bit in every dtype. The extra last block is never written: padding of an index points there, so that what
another request left in a block (even NaN) can never reach a sum.
"""

import math

import torch

from isthmus.contracts.errors import InvalidInput
from isthmus.execution.inference.host_memory import HostMemory, host_memory


class KvMemory:
    """`rows` views the memory as [token rows, kv_heads * head_dim].

    A token in layer 0 is at row block * block_rows + its place in the block; add `layer_offset` and `value_offset`.
    """

    def __init__(
        self,
        *,
        blocks: int,
        layers: int,
        block_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (blocks + 1, layers, 2, block_tokens, kv_heads, head_dim)
        self.blocks, self.layers, self.block_tokens = blocks, layers, block_tokens
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.host: HostMemory | None = None
        """Where it lies when the device is a CPU, for other processes to copy records to and from."""
        if device.type == "cpu":
            self.host = host_memory("kv", math.prod(shape) * dtype.itemsize)
            self._pool = torch.from_numpy(self.host.bytes).view(dtype).view(shape)
        else:
            self._pool = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = self._pool.view(-1, kv_heads * head_dim)
        self._offsets = torch.arange(layers, device=device)[:, None] * (2 * block_tokens)

    @property
    def block_rows(self) -> int:
        """Token rows of one block record, over all layers, K and V."""
        return self.layers * 2 * self.block_tokens

    @property
    def zero_row(self) -> int:
        """Row (layer 0, K) of a token that is zero in every layer."""
        return self.blocks * self.block_rows

    def layer_offset(self, layer: int) -> int:
        """What to add to a row of layer 0 for the same token in `layer`."""
        return layer * 2 * self.block_tokens

    def in_layers(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows, given for layer 0, in each layer: flat, made in one operation."""
        return (rows.reshape(1, -1) + self._offsets).unbind(0)

    @property
    def value_offset(self) -> int:
        """What to add to a K row for the V row of the same token and layer."""
        return self.block_tokens

    def view(self, block: int) -> memoryview | None:
        """The record of a block where it lies; None off the CPU. Raises `InvalidInput` when there is no such block."""
        self._check(block)
        if self._pool.device.type != "cpu":
            return None
        return self._pool[block].reshape(-1).view(torch.uint8).numpy().data

    def read_block(self, block: int) -> bytes:
        """The record of a block. Raises `InvalidInput` when there is no such block."""
        self._check(block)
        flat = self._pool[block].reshape(-1).view(torch.uint8).cpu()
        return flat.numpy().tobytes()

    def write_block(self, block: int, record: bytes) -> None:
        """Set a block. Raises `InvalidInput` on a wrong block or length."""
        self._check(block)
        target = self._pool[block].reshape(-1).view(torch.uint8)
        if len(record) != target.numel():
            raise InvalidInput(f"a block record has {target.numel()} bytes, not {len(record)}", "record")
        # frombuffer wants a writable buffer; the copy is the one into the pool.
        target.copy_(torch.frombuffer(bytearray(record), dtype=torch.uint8))

    def _check(self, block: int) -> None:
        if not 0 <= block < self.blocks:
            raise InvalidInput(f"block {block} does not exist, accepted: 0 to {self.blocks - 1}", "block")
