"""What a GPU gets beyond the plain path: attention over block tables, and decode steps as CUDA graphs.

Promise: neither is used before it has given, on this very device, what the plain path gives. What fails to compile, to
be captured or to agree is left out; the engine serves by the plain path, and `reason` says so to metrics and status.
"""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch

from isthmus.contracts.errors import EngineFailed
from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.attention.base import AttentionBackend, Span
from isthmus.execution.inference.attention.paged import PagedAttention, PagedKernel
from isthmus.execution.inference.batch import Batch, SampleTask, SequenceSlice, TokenHistory
from isthmus.execution.inference.graphs import MOST_SEQUENCES, Capture, DecodeGraphs
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.model_config import ModelConfig
from isthmus.execution.inference.models.decoder import Decoder
from isthmus.execution.inference.packing import block_rows_of, pack

READY, FAILED = "ready", "failed"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""The largest difference from the plain path that is taken for rounding, as part of the largest value."""
TRIED_TOKENS = 40
FAILURES = (RuntimeError, ValueError, OSError, ImportError, EngineFailed, subprocess.SubprocessError)
"""What compiling, launching and capturing raise: no Triton, no compiler, a device without the resources."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What a device offers: `make` its kernel of attention (raises one of `FAILURES`), and how work is captured."""

    make: Callable[[], PagedKernel]
    capture: Capture


@dataclass(slots=True)
class GpuPath:
    """What is used, and why no more. `state` is `ready` or `failed`."""

    kernel: PagedKernel | None = None
    graphs: DecodeGraphs | None = None
    state: str = FAILED
    reason: str = ""

    def attention(self, gathered: AttentionBackend) -> AttentionBackend:
        """The attention to build the model with."""
        return gathered if self.kernel is None else PagedAttention(self.kernel, gathered)


def open_gpu(
    make: Callable[[], PagedKernel], gathered: AttentionBackend, memory: KvMemory, config: ModelConfig
) -> GpuPath:
    """Try attention over block tables. Before the first step: the first blocks are overwritten."""
    try:
        kernel = make()
        _try_kernel(PagedAttention(kernel, gathered), gathered, memory, config)
    except FAILURES as error:
        return GpuPath(reason=f"paged attention: {type(error).__name__}: {str(error)[:200]}")
    return GpuPath(kernel=kernel, state=READY, reason="paged attention")


def add_graphs(
    path: GpuPath,
    decoder: Decoder,
    memory: KvMemory,
    *,
    most: int,
    capture: Capture,
    progress: Callable[[float], None],
) -> None:
    """Capture decode steps of up to `most` sequences, where the model and `path` allow it. As `open_gpu`."""
    config = decoder.config
    if path.kernel is None:
        return
    if config.moe is not None or config.delta is not None:
        path.reason += "; no graphs: the host has a part in each step of this family"
        return
    graphs = DecodeGraphs(decoder, memory, path.kernel, graph_sizes(min(most, MOST_SEQUENCES)))
    try:
        graphs.prepare(capture, progress)
        _try_graph(graphs, decoder, memory)
    except FAILURES as error:
        path.state = FAILED
        path.reason += f"; no graphs: {type(error).__name__}: {str(error)[:200]}"
        return
    path.graphs = graphs
    path.reason += f", decode graphs up to {graphs.most} sequences"


def graph_sizes(most: int) -> list[int]:
    """The sizes captured for steps of up to `most` sequences: near enough that filling up costs little."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 16)]
    return [size for size in sizes if size < most] + [most]


def _try_kernel(paged: AttentionBackend, gathered: AttentionBackend, memory: KvMemory, config: ModelConfig) -> None:
    """Raises `EngineFailed` where the two differ, with every window that the model has."""
    tokens = min(TRIED_TOKENS, memory.blocks * memory.block_tokens)
    blocks = range(-(-tokens // memory.block_tokens))
    generator = torch.Generator(memory.rows.device).manual_seed(0)
    used = memory.rows[: len(blocks) * memory.block_rows]
    used.copy_(torch.randn(used.shape, generator=generator, device=used.device).to(used.dtype))
    rows = block_rows_of(blocks, memory)
    ends = [(tokens - 1, tokens), (tokens // 2, tokens // 2 + min(3, tokens - tokens // 2)), (0, 1)]
    spans, first = [], 0
    for start, end in ends:
        spans.append(Span(first, end - start, start, rows[:end]))
        first += end - start
    shape = (first, config.heads, config.head_dim)
    query = torch.randn(shape, generator=generator, device=used.device).to(used.dtype)
    for window in {0, *config.windows}:
        found, expected = (one.plan(spans, memory, config.heads)(0, query, window) for one in (paged, gathered))
        _compare(found, expected, f"attention with window {window}")


def _try_graph(graphs: DecodeGraphs, decoder: Decoder, memory: KvMemory) -> None:
    """Raises `EngineFailed` where a replayed step of any size and a plain one differ."""
    count = min(TRIED_TOKENS, memory.blocks * memory.block_tokens, decoder.cos.shape[0])
    tokens = [place * 7 % decoder.config.vocab_size for place in range(count)]
    blocks = list(range(-(-count // memory.block_tokens)))
    task = SampleTask(SamplingParams(max_tokens=1, seed=0), 0, TokenHistory(tokens, []))
    decoder.forward(pack(Batch([SequenceSlice("", tokens[:-1], 0, blocks)]), decoder, memory), memory)
    part = SequenceSlice("", tokens[-1:], count - 1, blocks, task)
    final = decoder.finish(decoder.forward(pack(Batch([part]), decoder, memory), memory))
    expected = decoder.head(final).float()
    for size in graphs.sizes:
        # The same sequence in every place: all write the same K and V to the same place.
        replayed = graphs.run(Batch([part] * size))
        if replayed is None:
            raise EngineFailed(f"a decode step of {size} sequences was not replayed")
        _compare(replayed.logits, expected, f"a replayed step of {size} sequences", memory.rows.dtype)


def _compare(found: torch.Tensor, expected: torch.Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    apart = float((found.float() - expected.float()).abs().max())
    allowed = TOLERANCE[dtype or expected.dtype] * max(1.0, float(expected.float().abs().max()))
    if not apart <= allowed:  # NaN is not either
        raise EngineFailed(f"{what} is {apart:.3g} off the plain path, {allowed:.3g} is taken for rounding")
