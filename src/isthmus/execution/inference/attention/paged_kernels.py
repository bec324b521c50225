"""Triton kernels of attention over block tables, for GPUs: K and V are read where they lie, no copy is made.

Two stages (flash decoding, Dao et al. 2023; paged, Kwon et al. 2023): `attend_part` has one program for each sequence,
KV head and part of the keys, which keeps a running softmax (Milakov & Gimelshein 2018) over its part; `join_parts`
merges the parts by their log-sum-exp. Query heads that share K and V are rows of one product, and so are the few
queries of a sequence that verifies drafts. The grid depends on shapes alone and how many keys a part has on the lengths
in device memory: a launch can be captured once and replayed for other sequences.

Imported only where Triton is: it comes with torch's CUDA builds.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def attend_part(
    query,  # [sequences * QUERIES, KV_HEADS * SHARED, DIM] contiguous
    memory,  # [token rows, KV_HEADS * DIM] contiguous
    tables,  # [sequences, table_width] int32: the blocks of each sequence
    lengths,  # [sequences] int32: keys of each, its queries' own with them; 0 for none
    out,  # [sequences * QUERIES, heads, PARTS, DIM] float32
    sums,  # [sequences * QUERIES, heads, PARTS] float32: log2 of the sum of exponentials
    scale,  # of the scores, times log2(e)
    table_width,
    block_rows,  # token rows of a block, all layers
    layer_rows,  # from a block's first row to the layer's K
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,  # at least QUERIES * SHARED, a power of two, at least 16
    DIM: tl.constexpr,
    WIDE: tl.constexpr,  # at least DIM, a power of two, at least 16
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a query sees, 0 for all
    PARTS: tl.constexpr,
    TILE: tl.constexpr,  # keys at a time
):
    """Attention of one sequence's queries in one KV head over one part of its keys."""
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    first = tl.maximum(0, length - QUERIES - WINDOW + 1) if WINDOW > 0 else 0
    tiles = tl.cdiv(length - first, TILE)
    each = tl.cdiv(tiles, PARTS) * TILE
    low = first + part * each
    high = tl.minimum(low + each, length)

    row = tl.arange(0, ROWS)
    real = row < QUERIES * SHARED
    dim = tl.arange(0, WIDE)
    inside = dim < DIM
    place = length - QUERIES + row // SHARED  # the position of each row's query
    token = sequence * QUERIES + row // SHARED
    slot = token * (KV_HEADS * SHARED) + head * SHARED + row % SHARED
    q = tl.load(query + slot[:, None] * DIM + dim[None, :], mask=real[:, None] & inside[None, :], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(low, high, TILE):
        key = start + tl.arange(0, TILE)
        known = key < high
        block = tl.load(tables + sequence * table_width + key // BLOCK_TOKENS, mask=known, other=0).to(tl.int64)
        at = (block * block_rows + layer_rows + key % BLOCK_TOKENS) * (KV_HEADS * DIM) + head * DIM
        here = known[:, None] & inside[None, :]
        k = tl.load(memory + at[:, None] + dim[None, :], mask=here, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        behind = place[:, None] - key[None, :]
        seen = known[None, :] & (behind >= 0)
        if WINDOW > 0:
            seen = seen & (behind < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen no key yet: 0 in place of -inf, so that no difference of infinities arises.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        v = tl.load(memory + at[:, None] + BLOCK_TOKENS * (KV_HEADS * DIM) + dim[None, :], mask=here, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        best = higher

    share = tl.where(total > 0, total, 1.0)
    to = slot * PARTS + part
    tl.store(out + to[:, None] * DIM + dim[None, :], mixed / share[:, None], mask=real[:, None] & inside[None, :])
    tl.store(sums + to, tl.where(total > 0, best + tl.log2(share), float("-inf")), mask=real)


@triton.jit
def join_parts(
    out,  # [rows, PARTS, DIM] float32; a row is a query in a head
    sums,  # [rows, PARTS] float32
    joined,  # [rows, DIM]
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts of one row put together; zero where no part has met a key."""
    row = tl.program_id(0)
    part, dim = tl.arange(0, PARTS), tl.arange(0, WIDE)
    inside = dim < DIM
    sum_of = tl.load(sums + row * PARTS + part)
    best = tl.max(sum_of, 0)
    weights = tl.exp2(sum_of - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(weights, 0)
    mixed = tl.load(out + (row * PARTS + part[:, None]) * DIM + dim[None, :], mask=inside[None, :], other=0.0)
    value = tl.sum(mixed * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(joined + row * DIM + dim, value.to(joined.dtype.element_ty), mask=inside)
