"""From a `Batch` to flat tensors: one row a token, padded to the kernels' row tile, and the rows to sample from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from isthmus.contracts.errors import EngineFailed
from isthmus.execution.inference.attention.base import Span
from isthmus.execution.inference.batch import SAMPLED, Batch, SequenceSlice
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.models.decoder import Decoder
from isthmus.execution.inference.models.delta_plan import StateSpan, plan_delta
from isthmus.execution.inference.models.step import StepStates, StepTensors
from isthmus.execution.inference.state_memory import StateMemory


@dataclass(frozen=True, slots=True)
class Wanted:
    """`picked` are the packed rows whose final state is wanted.

    `sampled[i]` and `hidden[i]` say where slice i's rows are in `picked`.
    """

    picked: np.ndarray
    sampled: Sequence[range]
    hidden: Sequence[int | None]


def with_sampled(batch: Batch, sampled: Mapping[int, int]) -> Batch:
    """The batch, `SAMPLED` replaced by the token of its serial. Raises `EngineFailed` where there is none."""
    if not batch.ahead:
        return batch
    slices = []
    for part in batch.slices:
        if part.token_ids[0] != SAMPLED:
            slices.append(part)
        elif part.serial in sampled:
            slices.append(replace(part, token_ids=[sampled[part.serial]]))
        else:
            raise EngineFailed(f"{part.request_id}: the step before sampled no token for it")
    return Batch(slices)


def pack(batch: Batch, decoder: Decoder, memory: KvMemory, states: StateMemory | None = None) -> StepTensors:
    """Lay the slices out one after the other. Raises `EngineFailed` on a slice that breaks the contract."""
    spans: list[Span] = []
    first = 0
    _check_states(batch, states)
    for part in batch.slices:
        check_slice(part, decoder, memory)
        spans.append(Span(first, len(part.token_ids), part.start, _rows(part, memory), part.serial))
        first += len(part.token_ids)
    tile = decoder.kernels.row_tile
    padded = -(-first // tile) * tile
    tokens = np.zeros(padded, np.int64)
    positions = np.zeros(padded, np.int64)
    for span, part in zip(spans, batch.slices, strict=True):
        tokens[span.first : span.first + span.count] = part.token_ids
        positions[span.first : span.first + span.count] = np.arange(span.start, span.end)
    check_tokens(tokens, decoder)
    write = np.concatenate([span.rows[span.start :] for span in spans])
    device = memory.rows.device
    index = torch.from_numpy(positions).to(device)
    return StepTensors(
        tokens=torch.from_numpy(tokens).to(device),
        cos=decoder.cos.index_select(0, index),
        sin=decoder.sin.index_select(0, index),
        write=memory.in_layers(torch.from_numpy(np.stack((write, write + memory.value_offset))).to(device)),
        real_rows=first,
        attention=decoder.kernels.attention.plan(spans, memory, decoder.config.heads),
        states=_states(batch, spans, decoder, states),
        arrivals=[part.arrivals for part in batch.slices if part.arrivals is not None],
    )


def _states(batch: Batch, spans: Sequence[Span], decoder: Decoder, memory: StateMemory | None) -> StepStates | None:
    """What the step does with recurrent states; the slices were checked."""
    if memory is None:
        return None
    wanted = []
    for span, part in zip(spans, batch.slices, strict=True):
        work = part.state
        source = memory.empty if work is None or work.source is None else work.source
        captures = [] if work is None else [(capture.end, capture.slot) for capture in work.captures]
        wanted.append(StateSpan(span.first, span.count, span.start, source, captures))
    cells = decoder.kernels.delta.cells
    return StepStates(memory, plan_delta(wanted, memory.shape.history, memory.device, cells=cells))


def wanted_rows(batch: Batch) -> Wanted:
    """Rows whose final state is needed, and where each slice finds its own."""
    end = 0
    picked: list[int] = []
    sampled: list[range] = []
    hidden: list[int | None] = []
    for part in batch.slices:
        end += len(part.token_ids)
        last = end - 1
        count = 0 if part.sample is None else part.drafts + 1
        sampled.append(range(len(picked), len(picked) + count))
        picked.extend(range(last - count + 1, last + 1))
        hidden.append(None if not part.hidden else len(picked) - 1 if count else len(picked))
        if part.hidden and not count:
            picked.append(last)
    return Wanted(np.array(picked, np.int64), sampled, hidden)


def _rows(part: SequenceSlice, memory: KvMemory) -> np.ndarray:
    """The K row in layer 0 of each position [0, end)."""
    return block_rows_of(part.blocks[: -(-part.end // memory.block_tokens)], memory)[: part.end]


def block_rows_of(blocks: Sequence[int], memory: KvMemory) -> np.ndarray:
    """The K row in layer 0 of each token of the blocks, in order."""
    starts = np.asarray(blocks, np.int64)[:, None] * memory.block_rows
    return (starts + np.arange(memory.block_tokens)).reshape(-1)


def check_tokens(tokens: np.ndarray, decoder: Decoder) -> None:
    """Raises `EngineFailed` on one that the model does not know."""
    if tokens.min() < 0 or tokens.max() >= decoder.config.vocab_size:
        raise EngineFailed("a token id is outside the vocabulary")


def check_slice(part: SequenceSlice, decoder: Decoder, memory: KvMemory) -> None:
    """The scheduler's side of the contract; a breach must not read or write memory of another request.

    Raises `EngineFailed`.
    """
    count = len(part.token_ids)
    covered = -(-part.end // memory.block_tokens)
    if count < 1 or part.start < 0 or part.end > decoder.cos.shape[0] or len(part.blocks) < covered:
        raise EngineFailed(f"{part.request_id}: a slice of {count} tokens at {part.start} does not fit")
    if min(part.blocks[:covered]) < 0 or max(part.blocks[:covered]) >= memory.blocks:
        raise EngineFailed(f"{part.request_id}: a block id is outside the pool")
    if not 0 <= part.drafts < count or (part.drafts and part.sample is None):
        raise EngineFailed(f"{part.request_id}: {part.drafts} drafts in a slice of {count} tokens")


def _check_states(batch: Batch, memory: StateMemory | None) -> None:
    """The contract of `StateWork`; a breach must not read or write the state of another request."""
    taken: set[int] = set()
    for part in batch.slices:
        work = part.state
        if (work is None) != (memory is None):
            raise EngineFailed(f"{part.request_id}: a slice has recurrent state if and only if the model has")
        if work is None or memory is None:
            continue
        if (work.source is None) != (part.start == 0):
            raise EngineFailed(f"{part.request_id}: a slice at {part.start} has the wrong kind of source")
        ends = [part.start, *(capture.end for capture in work.captures)]
        if any(low >= high for low, high in pairwise(ends)) or ends[-1] > part.end:
            raise EngineFailed(f"{part.request_id}: captures do not ascend within the slice")
        slots = [capture.slot for capture in work.captures]
        used = slots if work.source is None else [work.source, *slots]
        if any(not 0 <= slot < memory.slots for slot in used):
            raise EngineFailed(f"{part.request_id}: a state slot is outside the memory")
        if work.source in slots[:-1] or len(set(slots)) < len(slots) or not taken.isdisjoint(slots):
            raise EngineFailed(f"{part.request_id}: a state slot is written twice")
        taken.update(slots)
    for part in batch.slices:
        work = part.state
        if work is not None and work.source in taken and work.source not in {item.slot for item in work.captures}:
            raise EngineFailed(f"{part.request_id}: its source is written by another slice")
