"""Decode steps of fixed shapes, captured once as CUDA graphs and replayed: one launch in place of hundreds.

A decode step of a small model is a few hundred kernels of some microseconds each; launching them takes longer than
running them. A graph replays them all at once, but always over the same memory. So a step's tokens, positions and block
tables go into one fixed buffer, in one copy, and everything else (angles, where K and V go, attention over the tables)
is computed from it within the graph. Sizes are captured at the start; a step takes the next larger one, its last
sequence repeated to fill it: that writes the same K and V to the same place again.

What cannot be captured takes the plain way: prompts, drafts, recurrent state, experts (the host decides which run),
and slices whose layers are still being loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from isthmus.execution.inference.attention.paged import PagedKernel, TableAttention, Tables
from isthmus.execution.inference.batch import Batch, SequenceSlice
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.models.decoder import Decoder
from isthmus.execution.inference.models.step import StepTensors
from isthmus.execution.inference.packing import check_slice, check_tokens

MOST_SEQUENCES = 256
"""In the largest graph: beyond it a step's kernels are long enough to hide their launches."""
WARM = 2
"""Runs before a capture: libraries choose their kernels and make their workspaces in the first."""


@dataclass(frozen=True, slots=True)
class Output:
    """Of a step's rows: final hidden states [rows, hidden], and logits [rows, vocabulary] float32."""

    final: torch.Tensor
    logits: torch.Tensor


class Capture(Protocol):
    """Makes a piece of work repeatable."""

    def __call__(self, work: Callable[[], Output]) -> Callable[[], Output]:
        """What does `work` again whenever it is called, with the numbers that its inputs have then.

        Its output is overwritten by the next call of it.
        """
        ...


class CudaCapture:
    """`Capture` by CUDA graphs, all of one memory pool: they never run at the same time."""

    def __init__(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Callable[[], Output]) -> Callable[[], Output]:
        """See `Capture`."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = work()
        self._graphs.append(graph)

        def replay() -> Output:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    """The graphs of one model. Used by the thread that runs steps."""

    def __init__(self, decoder: Decoder, memory: KvMemory, kernel: PagedKernel, sizes: Sequence[int]) -> None:
        self._decoder, self._memory, self._kernel = decoder, memory, kernel
        self._sizes = sorted(sizes)
        self._longest = decoder.cos.shape[0]
        # A row a sequence: token, position, blocks.
        shape = (self._sizes[-1], 2 + -(-self._longest // memory.block_tokens))
        device = memory.rows.device
        self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._replays: dict[int, Callable[[], Output]] = {}
        self.replayed = 0
        """Steps so far."""

    @property
    def sizes(self) -> Sequence[int]:
        """Sequences in each graph, ascending."""
        return self._sizes

    @property
    def most(self) -> int:
        """Sequences in the largest graph."""
        return self._sizes[-1]

    def prepare(self, capture: Capture, progress: Callable[[float], None]) -> None:
        """Capture all sizes. Before the first step: block 0 is overwritten. Raises `RuntimeError`."""
        # The largest first: the smaller ones find their memory in its pool.
        for done, size in enumerate(reversed(self._sizes)):
            progress(done / len(self._sizes))
            self._replays[size] = capture(partial(self._step, size))
        progress(1.0)

    def run(self, batch: Batch) -> Output | None:
        """The step, if it is one that was captured: the rows of its slices, in order; overwritten by the next."""
        count = len(batch.slices)
        if not self._replays or count > self.most or not all(_captured(part) for part in batch.slices):
            return None
        rows = self._host.numpy()
        size = next(size for size in self._sizes if size >= count)
        for place, part in enumerate(batch.slices):
            check_slice(part, self._decoder, self._memory)
            covered = part.start // self._memory.block_tokens + 1
            rows[place, 0], rows[place, 1] = part.token_ids[0], part.start
            rows[place, 2 : 2 + covered] = part.blocks[:covered]
        check_tokens(rows[:count, 0], self._decoder)
        rows[count:size] = rows[count - 1]
        # Waits for the copy, so that the next step may write to the buffer.
        self._device[:size].copy_(self._host[:size])
        output = self._replays[size]()
        self.replayed += 1
        return Output(output.final[:count], output.logits[:count])

    def _step(self, size: int) -> Output:
        """One decode step of the sequences in the first rows of the buffer, on the device alone."""
        decoder, memory, given = self._decoder, self._memory, self._device[:size]
        positions, blocks = given[:, 1].long(), given[:, 2:]
        block = blocks.gather(1, (positions // memory.block_tokens)[:, None])[:, 0].long()
        write = block * memory.block_rows + positions % memory.block_tokens
        tables = Tables(blocks, given[:, 1] + 1, queries=1, longest=self._longest)
        step = StepTensors(
            tokens=given[:, 0].long(),
            cos=decoder.cos.index_select(0, positions),
            sin=decoder.sin.index_select(0, positions),
            write=memory.in_layers(torch.stack((write, write + memory.value_offset))),
            real_rows=size,
            attention=TableAttention(self._kernel, memory, tables),
        )
        final = decoder.finish(decoder.forward(step, memory))
        return Output(final, decoder.head(final).float())


def _captured(part: SequenceSlice) -> bool:
    """Whether it is one token behind keys that are all there."""
    return len(part.token_ids) == 1 and not part.drafts and part.state is None and part.arrivals is None
