"""The canonical layout of a block, shared by device pool, store and wire.

A block holds the KV of `block_tokens` consecutive tokens of one sequence, for every layer. It is one contiguous record:

    [layer 0: K | V][layer 1: K | V] ... [layer n-1: K | V]       K and V each [block_tokens, kv_heads, head_dim]

so one layer's chunk can be used while the next is still arriving, and the device pool `[blocks, layers, 2,
block_tokens, kv_heads, head_dim]` holds records of exactly this shape: storing a block is one copy, with no
transposition.
"""

import enum
from dataclasses import dataclass

from blake3 import blake3

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.framing import frame

LAYOUT_VERSION = 1


class Dtype(enum.StrEnum):
    """Element types of stored state, by their safetensors names."""

    F32 = "F32"
    BF16 = "BF16"
    F16 = "F16"

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return 4 if self is Dtype.F32 else 2


class Codec(enum.StrEnum):
    """How a stored block is encoded. RAW is the bytes of the layout above."""

    RAW = "raw"


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Everything besides the tokens that decides whether two blocks' bytes are interchangeable.

    `weights` is the 32-byte digest of the model's weights and config. `slice_index` of `slice_count` names the part
    that a tensor-parallel rank holds (0 of 1 when whole).
    """

    weights: bytes
    dtype: Dtype
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    slice_index: int = 0
    slice_count: int = 1
    codec: Codec = Codec.RAW

    def __post_init__(self) -> None:
        if len(self.weights) != 32:
            raise InvalidInput("the weights digest has 32 bytes", "weights")
        for name in ("layers", "kv_heads", "head_dim", "block_tokens", "slice_count"):
            if not 1 <= getattr(self, name) <= 65_536:
                raise InvalidInput(f"{name} is {getattr(self, name)}, accepted: 1 to 65536", name)
        if not 0 <= self.slice_index < self.slice_count:
            raise InvalidInput(f"slice {self.slice_index} of {self.slice_count} does not exist", "slice_index")

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's chunk (K and V)."""
        return 2 * self.block_tokens * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block record."""
        return self.layers * self.layer_bytes

    def digest(self) -> bytes:
        """32 bytes that differ whenever any field differs (length-framed, domain-separated)."""
        numbers = (LAYOUT_VERSION, self.layers, self.kv_heads, self.head_dim, self.block_tokens)
        parallel = (self.slice_index, self.slice_count)
        fields = [self.weights, self.dtype.encode(), self.codec.encode()]
        fields += [number.to_bytes(8, "little") for number in (*numbers, *parallel)]
        return blake3(frame(b"isthmus/block-format/v1", *fields)).digest()
