"""Bitmasks of allowed tokens, applied to logits before the choice. Log probabilities stay those of the raw logits."""

from collections.abc import Sequence

import numpy as np
import torch


def masked(logits: torch.Tensor, masks: Sequence[bytes | None]) -> torch.Tensor:
    """`logits` [rows, vocabulary] with minus infinity where a row's mask does not allow the token.

    A mask has ceil(vocabulary / 32) little-endian words; None leaves the row as it is. `logits` is not changed; it is
    what is returned when no row has a mask.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    packed = np.frombuffer(b"".join(mask for mask in masks if mask is not None), np.uint8).reshape(len(rows), -1)
    allowed = _unpack(packed, logits.shape[1], logits.device)
    if len(rows) == logits.shape[0]:
        return logits.masked_fill(~allowed, -torch.inf)
    index = torch.tensor(rows, device=logits.device)
    return logits.index_copy(0, index, logits[index].masked_fill(~allowed, -torch.inf))


def _unpack(packed: np.ndarray, size: int, device: torch.device) -> torch.Tensor:
    """Bits to booleans [rows, size]. On an accelerator this is done there: an eighth of the bytes travels."""
    if device.type == "cpu":
        bits = np.unpackbits(packed, axis=1, count=size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    words = torch.from_numpy(packed.copy()).to(device)
    shifts = torch.arange(8, device=device, dtype=torch.uint8)
    return (words[:, :, None] >> shifts & 1).to(torch.bool).flatten(1)[:, :size]
