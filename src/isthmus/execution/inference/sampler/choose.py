"""The choice of a token from one row of probabilities, by inverse CDF in a fixed order.

With top-k or top-p the order is descending probability, ties by token id; without them it is the token id. The two
never mix within a request's parameters, so a choice is a function of (row, parameters, draw).
"""

import numpy as np

_SIGN = np.uint32(1 << 31)


def ranked(values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted by descending value, ties by ascending id. float32 without NaN, ids from 0 to 2^32 - 1.

    Value and id are sorted as one integer: NumPy does that several times as fast as it sorts by two keys (measured: 0.9
    against 3.7 ms for 32,000). As integers floats ascend from 0 on and descend below it: the sign is turned, or all.
    """
    bits = (np.ascontiguousarray(values, np.float32) + np.float32(0.0)).view(np.uint32)  # + 0.0: of zeros there is one
    descending = np.where(bits >> 31, bits, ~(bits | _SIGN))
    both = descending.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64)
    both.sort()
    found = (both >> np.uint64(32)).astype(np.uint32)
    ordered = np.where(found >> 31, found, ~found & ~_SIGN)
    return ordered.view(np.float32), (both & np.uint64(0xFFFFFFFF)).astype(np.int64)


def kept(values: np.ndarray, top_k: int, top_p: float, min_p: float) -> int | None:
    """How many of the leading `values` (ranked probabilities of a whole row, or its head) survive the cuts.

    top-k first; top-p keeps the smallest head whose share of what top-k left reaches it; min-p drops what is under
    min_p times the best (Nguyen et al. 2024). None when the head is too short to tell.
    """
    count = min(top_k, values.size) if top_k else values.size
    complete = bool(top_k) and top_k <= values.size
    if top_p < 1.0:
        total = np.cumsum(values[:count], dtype=np.float64)
        # Without top-k the whole row sums to 1 by softmax's definition.
        target = top_p * (total[-1] if complete else 1.0)
        reached = int(np.searchsorted(total, target, side="left")) + 1
        complete = complete or reached <= count
        count = min(reached, count)
    if min_p > 0.0:
        above = int(np.searchsorted(-values[:count], -np.float64(min_p) * values[0], side="right"))
        complete = complete or above < count
        count = min(count, above)
    return max(count, 1) if complete else None


def inverse_cdf(values: np.ndarray, draw: float) -> int:
    """The index whose interval of the cumulative sum holds draw * total. Zero values are never chosen."""
    total = np.cumsum(values, dtype=np.float64)
    index = int(np.searchsorted(total, draw * total[-1], side="right"))
    return min(index, int(np.searchsorted(total, total[-1], side="left")))
