"""Identity of state: PrefixKey and BlockKey.

    root      = BLAKE3(key=namespace; "isthmus/prefix-root/v1", model, adapter)
    PrefixKey = BLAKE3(key=namespace; "isthmus/prefix/v1", parent, token ids of the block, media hashes in it)
    BlockKey  = BLAKE3(key=namespace; "isthmus/block/v1", PrefixKey at the worker's block size, format digest)

Keyed with the tenant's 32-byte namespace, length-framed, domain-separated, 32 bytes, never truncated: equal keys mean
the same tenant, model, adapter, tokens and media all the way from position 0. A PrefixKey says nothing about bytes, so
it is the same for every kind of worker; a BlockKey also fixes dtype, layout, slice, codec and weights, so it names
bytes.
"""

from array import array
from collections.abc import Sequence
from typing import NewType

import msgspec
from blake3 import blake3

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.framing import frame
from isthmus.contracts.ids import MAX_MODEL_NAME_CHARS, Namespace

PrefixKey = NewType("PrefixKey", bytes)
BlockKey = NewType("BlockKey", bytes)

KEY_BYTES = 32
ROUTING_BLOCK_TOKENS = 64


class MediaRef(msgspec.Struct, frozen=True):
    """A piece of non-text input: the 32-byte hash of its content, at the position of its first token."""

    position: int
    hash: bytes

    def __post_init__(self) -> None:
        if self.position < 0 or len(self.hash) != KEY_BYTES:
            raise InvalidInput("a media reference has a position >= 0 and a hash of 32 bytes", "media")


class PrefixScope(msgspec.Struct, frozen=True):
    """What a chain of PrefixKeys starts from."""

    namespace: Namespace
    model: str
    adapter: str | None = None

    def __post_init__(self) -> None:
        if len(self.namespace) != KEY_BYTES:
            raise InvalidInput("a namespace has 32 bytes", "namespace")
        if not 1 <= len(self.model) <= MAX_MODEL_NAME_CHARS:
            raise InvalidInput(f"a model name has 1 to {MAX_MODEL_NAME_CHARS} characters", "model")

    def root(self) -> PrefixKey:
        """The key of the empty prefix."""
        adapter = b"" if self.adapter is None else b"\x01" + self.adapter.encode()
        fields = frame(b"isthmus/prefix-root/v1", self.model.encode(), adapter)
        return PrefixKey(blake3(fields, key=self.namespace).digest())


def prefix_key(
    scope: PrefixScope, parent: PrefixKey, token_ids: Sequence[int], media: Sequence[MediaRef] = ()
) -> PrefixKey:
    """The key of `parent` extended by one block. `media` are the references in the block, positions relative to it."""
    packed = array("I", token_ids).tobytes()
    extra = b"".join(frame(b"media", ref.position.to_bytes(8, "little"), ref.hash) for ref in media)
    return PrefixKey(blake3(frame(b"isthmus/prefix/v1", parent, packed, extra), key=scope.namespace).digest())


def prefix_chain(
    scope: PrefixScope, token_ids: Sequence[int], block_tokens: int, media: Sequence[MediaRef] = ()
) -> list[PrefixKey]:
    """The keys of every full block of `token_ids`, in order. A trailing partial block has no key."""
    keys: list[PrefixKey] = []
    parent = scope.root()
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        end = start + block_tokens
        inside = [MediaRef(m.position - start, m.hash) for m in media if start <= m.position < end] if media else ()
        parent = prefix_key(scope, parent, token_ids[start:end], inside)
        keys.append(parent)
    return keys


def block_key(scope: PrefixScope, prefix: PrefixKey, format_digest: bytes) -> BlockKey:
    """The key of the bytes of the block that ends the prefix `prefix`, in the format with this digest."""
    return BlockKey(blake3(frame(b"isthmus/block/v1", prefix, format_digest), key=scope.namespace).digest())
