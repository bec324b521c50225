"""The canonical layouts of a block and of a state snapshot, shared by device pool, store and wire.

A block holds the KV of `block_tokens` consecutive tokens of one sequence, for every layer. It is one contiguous record:

    [layer 0: K | V][layer 1: K | V] ... [layer n-1: K | V]       K and V each [block_tokens, kv_heads, head_dim]

so one layer's chunk can be used while the next is still arriving, and the device pool `[blocks, layers, 2,
block_tokens, kv_heads, head_dim]` holds records of exactly this shape: storing a block is one copy, with no
transposition.

A state snapshot holds what the recurrent layers of a hybrid model know after a number of tokens: always float32,
whatever the model's dtype, because rounding it would stay for all later tokens. It too is one contiguous record, the
recurrent layers in order:

    [layer 0: conv | recurrent][layer 1: conv | recurrent] ...    conv [channels, history], oldest position first
                                                                  recurrent [heads, key_dim, value_dim]

conv are the last inputs of the layer's causal convolution (channels: queries of all heads, keys, values), zeros before
the first position. A snapshot matches after exactly its tokens or not at all.
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
    that a tensor-parallel rank holds (0 of 1 when whole). `arithmetic` names how the numbers were computed where that
    is promised to give the same bits (exact mode: state computed in any other way must not be mixed in), else it is
    empty.
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
    arithmetic: str = ""

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
        fields += _named(self.arithmetic)
        return blake3(frame(b"isthmus/block-format/v1", *fields)).digest()


@dataclass(frozen=True, slots=True)
class StateFormat:
    """Everything besides the tokens that decides whether two state snapshots' bytes are interchangeable.

    `layers` counts recurrent layers. `channels` and `history` are the convolution's channels and how many inputs it
    looks back; `heads`, `key_dim` and `value_dim` shape the recurrent state. The rest is as in `BlockFormat`.
    """

    weights: bytes
    layers: int
    channels: int
    history: int
    heads: int
    key_dim: int
    value_dim: int
    slice_index: int = 0
    slice_count: int = 1
    codec: Codec = Codec.RAW
    arithmetic: str = ""

    def __post_init__(self) -> None:
        if len(self.weights) != 32:
            raise InvalidInput("the weights digest has 32 bytes", "weights")
        limits = {"channels": 1 << 20, "history": 16}
        for name in ("layers", "channels", "history", "heads", "key_dim", "value_dim", "slice_count"):
            high = limits.get(name, 65_536)
            if not 1 <= getattr(self, name) <= high:
                raise InvalidInput(f"{name} is {getattr(self, name)}, accepted: 1 to {high}", name)
        if not 0 <= self.slice_index < self.slice_count:
            raise InvalidInput(f"slice {self.slice_index} of {self.slice_count} does not exist", "slice_index")

    @property
    def conv_bytes(self) -> int:
        """Bytes of one layer's convolution inputs."""
        return self.channels * self.history * Dtype.F32.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's part."""
        return self.conv_bytes + self.heads * self.key_dim * self.value_dim * Dtype.F32.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of a whole snapshot record."""
        return self.layers * self.layer_bytes

    def digest(self) -> bytes:
        """32 bytes that differ whenever any field differs (length-framed, domain-separated)."""
        shape = (self.layers, self.channels, self.history, self.heads, self.key_dim, self.value_dim)
        numbers = (LAYOUT_VERSION, *shape, self.slice_index, self.slice_count)
        fields = [self.weights, self.codec.encode()]
        fields += [number.to_bytes(8, "little") for number in numbers]
        fields += _named(self.arithmetic)
        return blake3(frame(b"isthmus/state-format/v1", *fields)).digest()


def _named(arithmetic: str) -> list[bytes]:
    """A field of its own where there is a name: formats without one keep the digests that they had."""
    return [arithmetic.encode()] if arithmetic else []
