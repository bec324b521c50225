"""Bounded msgpack frames: a 4-byte little-endian length, then one msgpack value of a fixed schema.

A frame over the reader's limit, or one that does not decode to the expected type, is a `WireViolation`: the connection
is closed, nothing of it is used. No pickle, no extension types.
"""

from typing import Any, Generic, TypeVar

import msgspec

from isthmus.contracts.errors import WireViolation

HEADER_BYTES = 4
MAX_FRAME_BYTES = 64 * 1024 * 1024

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


def encode_frame(value: Any, limit: int = MAX_FRAME_BYTES) -> bytes:
    """`value` as one frame. Raises `WireViolation` when it is over `limit` bytes."""
    body = _encoder.encode(value)
    if len(body) > limit:
        raise WireViolation(f"a frame of {len(body)} bytes is over the limit of {limit}")
    return len(body).to_bytes(HEADER_BYTES, "little") + body


class FrameReader(Generic[T]):
    """Cuts a byte stream into values of one type. Keeps at most one incomplete frame."""

    def __init__(self, type_: Any, limit: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(type_)
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """The values completed by `data`, in order. Raises `WireViolation`."""
        self._buffer += data
        values: list[T] = []
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            length = int.from_bytes(self._buffer[start : start + HEADER_BYTES], "little")
            if length > self._limit:
                raise WireViolation(f"a frame of {length} bytes is over the limit of {self._limit}")
            end = start + HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            try:
                values.append(self._decoder.decode(memoryview(self._buffer)[start + HEADER_BYTES : end]))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:  # the latter: text that is no UTF-8
                raise WireViolation(f"a frame does not fit its schema: {error}") from error
            start = end
        del self._buffer[:start]
        return values
