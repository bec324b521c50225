"""Random draws as a function of (seed, output index), which batch, chunking and resume cannot change."""

from blake3 import blake3

from isthmus.contracts.framing import frame


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1): the top 53 bits of BLAKE3(seed, index)."""
    digest = blake3(frame(b"isthmus/draw/v1", seed.to_bytes(8, "little"), index.to_bytes(8, "little"))).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53
