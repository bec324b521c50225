"""The model runner: weights and KV memory on a device, and one worker thread that runs steps.

`execute` hands the step to the worker and returns; torch releases the interpreter lock inside its operators, so the
next step can be scheduled meanwhile. A step that raises fails its handle with `EngineFailed`, naming no content.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from isthmus.contracts.blocks import RecordKind
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.errors import ConfigInvalid, EngineFailed, InvalidInput, IsthmusError
from isthmus.contracts.events import ModelInfo, StateInfo
from isthmus.contracts.layout import BlockFormat, Codec, Dtype, StateFormat
from isthmus.execution.inference.attention.gathered import GatheredAttention
from isthmus.execution.inference.attention.paged import PagedKernel
from isthmus.execution.inference.batch import Batch, SliceResult, StepHandle, StepResult
from isthmus.execution.inference.compiled.service import Compiled, CompiledState, open_compiled
from isthmus.execution.inference.compiled.spec import this_machine
from isthmus.execution.inference.cores import choose_threads
from isthmus.execution.inference.exact import exact_kernels
from isthmus.execution.inference.exact_proof import exact_arithmetic, prove_exact
from isthmus.execution.inference.gpu import Accelerator, GpuPath, add_graphs, open_gpu
from isthmus.execution.inference.graphs import CudaCapture
from isthmus.execution.inference.heap import available_bytes
from isthmus.execution.inference.host_memory import HostMemory
from isthmus.execution.inference.kv_memory import KvMemory
from isthmus.execution.inference.linear.dense import computes_bf16, dense_linear
from isthmus.execution.inference.model_config import ModelConfig, load_config
from isthmus.execution.inference.models.decoder import Decoder
from isthmus.execution.inference.models.delta_plan import GRID_TOKENS
from isthmus.execution.inference.models.families import tensor_layout
from isthmus.execution.inference.models.pieces import eager_pieces
from isthmus.execution.inference.models.step import Kernels, rms_norm, swiglu
from isthmus.execution.inference.packing import pack, wanted_rows, with_sampled
from isthmus.execution.inference.profile import SAMPLING, StepProfile, profiled
from isthmus.execution.inference.sampler.sampler import Sampler
from isthmus.execution.inference.settings import EngineSettings
from isthmus.execution.inference.state_memory import StateMemory
from isthmus.execution.inference.weights import load_weights

TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
STORED_DTYPES = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.float16: Dtype.F16}
MAX_BLOCKS = 1 << 22
MAX_SLOTS = 1 << 20
SMALL_STEP = 100_000_000
"""Parameters times tokens of a step under which one thread beats several: waking the others costs more than they do
(measured: 2.1 against 4.4 ms a step at 9.6 million parameters and 1 token, even at 12 tokens)."""

COPIES_SHARE = 4
"""Copies of decoding sequences take at most this part of the block pool's memory, besides it."""

Progress = Callable[[str, float], None]


class _Step:
    """See `StepHandle`."""

    def __init__(self, future: "Future[StepResult]") -> None:
        self._future = future

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()

    def when_done(self, call: Callable[[], None]) -> None:
        """See `StepHandle`."""
        self._future.add_done_callback(lambda _: call())

    def cancel(self) -> bool:
        """See `StepHandle`."""
        return self._future.cancel()

    def result(self) -> StepResult:
        """Wait for the step. Raises `EngineFailed`."""
        try:
            return self._future.result()
        except IsthmusError:
            raise
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            # Messages of tensor operators hold shapes, not content.
            raise EngineFailed(f"the step failed: {type(error).__name__}: {str(error)[:200]}") from error


class TorchRunner:
    """`Runner` in PyTorch: one worker does everything in the order handed in."""

    def __init__(
        self,
        decoder: Decoder,
        memory: KvMemory,
        info: ModelInfo,
        threads: int,
        *,
        states: StateMemory | None = None,
        profile: StepProfile | None = None,
        compiled: Compiled | None = None,
        gpu: GpuPath | None = None,
    ) -> None:
        self.profile = profile or StepProfile()
        self.compiled = compiled
        self._gpu = gpu
        self._threads = threads
        self._states = states
        self._decoder = decoder
        self._memory = memory
        self._info = info
        use = partial(_use, memory.rows.device)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="isthmus-step", initializer=use)
        self.sampler = Sampler()
        self._sampled: dict[int, int] = {}

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return self._info

    def execute(self, batch: Batch) -> StepHandle:
        """Start a step and return at once."""
        return _Step(self._worker.submit(self._run, batch))

    def compiled_state(self) -> tuple[str, str]:
        """State and reason of what is compiled, for `EngineStats`. Has a build that ended taken up between steps."""
        if self.compiled is None:
            return ("", "") if self._gpu is None else (self._gpu.state, self._gpu.reason)
        if self.compiled.state is CompiledState.BUILDING:
            self._worker.submit(self.compiled.poll)
        return self.compiled.told()

    def view(self, kind: RecordKind, place: int) -> memoryview | None:
        """See `Runner`."""
        return self._memory.view(place) if kind is RecordKind.BLOCK else self._state_memory().view(place)

    def host(self) -> dict[RecordKind, HostMemory]:
        """The pools of records, as other processes may be given them; none of a device that is no CPU."""
        pools = {RecordKind.BLOCK: self._memory.host}
        if self._states is not None:
            pools[RecordKind.STATE] = self._states.host
        return {kind: pool for kind, pool in pools.items() if pool is not None}

    def read_block(self, block: int) -> bytes:
        """See `Runner`. After the steps handed in before it."""
        return self._worker.submit(self._memory.read_block, block).result()

    def write_block(self, block: int, record: bytes) -> None:
        """See `Runner`. After the steps handed in before it."""
        self._worker.submit(self._memory.write_block, block, record).result()

    def read_state(self, slot: int) -> bytes:
        """See `Runner`. After the steps handed in before it."""
        return self._worker.submit(self._state_memory().read_state, slot).result()

    def write_state(self, slot: int, record: bytes) -> None:
        """See `Runner`. After the steps handed in before it."""
        self._worker.submit(self._state_memory().write_state, slot, record).result()

    def _state_memory(self) -> StateMemory:
        if self._states is None:
            raise InvalidInput("this model has no recurrent state", "slot")
        return self._states

    def close(self) -> None:
        """Wait for the step under way, end the worker, and a build of compiled pieces."""
        self._worker.shutdown(wait=True)
        if self.compiled is not None:
            self.compiled.close()

    def _run(self, batch: Batch) -> StepResult:
        before, self._sampled = self._sampled, {}
        batch = with_sampled(batch, before)
        with self.profile.step(), torch.inference_mode():
            result = self._compute(batch)
        pairs = zip(batch.slices, result.slices, strict=True)
        self._sampled = {part.serial: got.token_ids[-1] for part, got in pairs if part.serial and got.token_ids}
        return result

    def _compute(self, batch: Batch) -> StepResult:
        # In exact mode never: how work is split over threads is part of what the self-test proved.
        small = not self._info.exact and self._info.parameters * batch.tokens < SMALL_STEP
        torch.set_num_threads(1 if small else self._threads)
        wanted = wanted_rows(batch)
        output = self._output(batch, wanted.picked)
        results = [SliceResult() for _ in batch.slices]
        if output is None:
            return StepResult(results)
        final, logits = output
        if logits is not None:
            with self.profile.part(SAMPLING):
                results = self.sampler.sample(logits, batch.slices, wanted.sampled)
        for place, (result, row) in enumerate(zip(results, wanted.hidden, strict=True)):
            if row is not None:
                state = final[row].float().cpu().numpy().astype("<f4").tobytes()
                results[place] = SliceResult(
                    result.token_ids, result.accepted_drafts, result.logprobs, state, result.digests
                )
        return StepResult(results)

    def _output(self, batch: Batch, picked: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Final hidden states of the picked rows, if there are any, and logits, if some slice is sampled."""
        sampling = any(part.sample is not None for part in batch.slices)
        replayed = None if self._gpu is None or self._gpu.graphs is None else self._gpu.graphs.run(batch)
        if replayed is not None:
            index = torch.from_numpy(picked).to(replayed.final.device)
            return replayed.final.index_select(0, index), replayed.logits.index_select(0, index) if sampling else None
        hidden = self._decoder.forward(pack(batch, self._decoder, self._memory, self._states), self._memory)
        if not picked.size:
            return None
        rows = hidden.index_select(0, torch.from_numpy(picked).to(hidden.device))
        tile = self._decoder.kernels.row_tile
        if picked.size % tile:
            rows = torch.cat((rows, rows.new_zeros(tile - picked.size % tile, rows.shape[1])))
        final = self._decoder.finish(rows)
        return final, self._decoder.head(final)[: picked.size].float() if sampling else None


def open_runner(settings: EngineSettings, progress: Progress, accelerator: Accelerator | None = None) -> TorchRunner:
    """Load the model and make its runner. `progress` is told stages with fractions from 0 to 1; `accelerator` stands
    for the one that the device has (in tests: a GPU has one, a CPU none).

    Raises `ModelInvalid` for a bad folder, `ConfigInvalid` for settings that do not fit the model or the machine, and
    `ExactUnavailable` when exact mode's self-test fails.
    """
    folder = Path(settings.model)
    config = load_config(folder)
    device = _device(settings)
    dtype = _dtype(settings, config, device)
    threads = settings.threads or choose_threads(dtype)
    torch.set_num_threads(threads)
    layout = tensor_layout(config)
    weights = load_weights(
        folder,
        layout.shapes,
        layout.ignored,
        dtype,
        progress,
        precise=layout.precise,
        ignored_prefix=layout.ignored_prefix,
    )
    profile, gpu = StepProfile(), None
    kernels = _kernels(settings, device, dtype, profile)
    positions = _max_model_len(settings, config)
    with torch.inference_mode():
        memory = _memory(settings, config, dtype, device, weights.digest)
        states = _state_memory(settings, config, device, weights.digest)
        accelerator = accelerator or _accelerator(settings, device)
        if accelerator is not None:
            gpu = open_gpu(accelerator.make, kernels.attention, memory, config)
            kernels = dataclasses.replace(kernels, attention=gpu.attention(kernels.attention))
        decoder = Decoder(config, layout, weights.tensors, kernels, positions=positions, device=device)
        if accelerator is not None and gpu is not None:
            most, told = settings.scheduler.max_running, partial(progress, "capturing decode graphs")
            add_graphs(gpu, decoder, memory, most=most, capture=accelerator.capture, progress=told)
    arithmetic = exact_arithmetic(this_machine(), threads) if settings.exact else ""
    info = ModelInfo(
        name=settings.name,
        model_type=config.model_type,
        dtype=STORED_DTYPES[dtype],
        device=str(device),
        exact=settings.exact,
        parameters=weights.parameters,
        vocab_size=config.vocab_size,
        max_model_len=positions,
        weights=weights.digest,
        layers=config.kv_layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        block_tokens=settings.block_tokens,
        block_bytes=memory.block_rows * config.kv_heads * config.head_dim * STORED_DTYPES[dtype].itemsize,
        blocks=memory.blocks,
        codec=Codec.RAW,
        eos_token_ids=list(config.eos_token_ids),
        states=None if states is None else _state_info(states, arithmetic),
        arithmetic=arithmetic,
    )
    compiled = open_compiled(settings, decoder, SystemClock()) if device.type == "cpu" else None
    runner = TorchRunner(decoder, memory, info, threads, states=states, profile=profile, compiled=compiled, gpu=gpu)
    if settings.exact:
        try:
            progress("proving exactness", 0.0)
            prove_exact(runner, decoder)
            progress("proving exactness", 1.0)
        except IsthmusError:
            runner.close()
            raise
    return runner


def _state_info(states: StateMemory, arithmetic: str) -> StateInfo:
    shape = dataclasses.replace(states.shape, arithmetic=arithmetic)
    return StateInfo(states.slots, shape.state_bytes, GRID_TOKENS, shape.layers, shape.digest())


def default_kernels(device: torch.device, dtype: torch.dtype, copies_bytes: int = 0) -> Kernels:
    """The fastest kernels in plain PyTorch for a device; see `GatheredAttention` for `copies_bytes`."""
    linear, attention = dense_linear(device, dtype), GatheredAttention(copies_bytes)
    return Kernels(linear, attention, rms_norm, swiglu, row_tile=1, pieces=eager_pieces(rms_norm))


def _kernels(settings: EngineSettings, device: torch.device, dtype: torch.dtype, profile: StepProfile) -> Kernels:
    kernels = exact_kernels() if settings.exact else default_kernels(device, dtype, settings.kv_bytes // COPIES_SHARE)
    return profiled(kernels, profile) if settings.profile else kernels


def _use(device: torch.device) -> None:
    """Have this thread's kernels and captures go to the device; a thread begins with the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _accelerator(settings: EngineSettings, device: torch.device) -> Accelerator | None:
    """What the device has beyond the plain path, if it is wanted; this thread is set to the device."""
    if device.type != "cuda" or settings.compiled == "off":
        return None
    _use(device)
    return Accelerator(partial(_triton_kernel, device), CudaCapture())


def _triton_kernel(device: torch.device) -> PagedKernel:
    """Raises `ImportError` without Triton, which only torch's CUDA builds bring."""
    from isthmus.execution.inference.attention.paged_launch import TritonKernel

    return TritonKernel(torch.cuda.get_device_properties(device).multi_processor_count)


def _device(settings: EngineSettings) -> torch.device:
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise ConfigInvalid(f"device {settings.device[:40]!r} is not known; accepted: cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigInvalid(f"device {settings.device[:40]!r} is not served; accepted: cpu, cuda, cuda:N")
    if settings.profile and device.type != "cpu":
        raise ConfigInvalid("profile is for device cpu: elsewhere only the launches of kernels would be timed")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ConfigInvalid(f"device {settings.device!r} is not on this machine")
    return device


def _dtype(settings: EngineSettings, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is the folder's dtype, but float32 where a CPU has no arithmetic for it; exact mode is float32.

    Measured: products of bfloat16 take seven to nine times as long as those of float32 with AVX2 alone, three to five
    times with AVX-512 alone.
    """
    if settings.exact:
        if settings.dtype not in ("auto", "f32") or device.type != "cpu":
            raise ConfigInvalid("exact is served with dtype f32 on device cpu only")
        return torch.float32
    name = config.dtype if settings.dtype == "auto" else settings.dtype
    if device.type == "cpu":
        if settings.dtype == "f16":
            raise ConfigInvalid("dtype f16 is not served on device cpu; accepted: auto, f32, bf16")
        if name == "f16" or (settings.dtype == "auto" and name == "bf16" and not computes_bf16()):
            name = "f32"
    return TORCH_DTYPES[name]


def _max_model_len(settings: EngineSettings, config: ModelConfig) -> int:
    if settings.max_model_len > config.max_positions:
        raise ConfigInvalid(f"max_model_len is {settings.max_model_len}, the model's limit is {config.max_positions}")
    return settings.max_model_len or config.max_positions


def _memory(
    settings: EngineSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device, digest: bytes
) -> KvMemory:
    shape = BlockFormat(
        digest, STORED_DTYPES[dtype], config.kv_layers, config.kv_heads, config.head_dim, settings.block_tokens
    )
    blocks = min(settings.kv_bytes // shape.block_bytes, MAX_BLOCKS)
    if blocks < 1:
        raise ConfigInvalid(f"kv_bytes is {settings.kv_bytes}, one block needs {shape.block_bytes}")
    available = available_bytes() if device.type == "cpu" else None
    if available is not None and blocks * shape.block_bytes > available:
        raise ConfigInvalid(f"kv_bytes is {settings.kv_bytes}, the machine has {available} bytes available")
    try:
        return KvMemory(
            blocks=blocks,
            layers=config.kv_layers,
            block_tokens=settings.block_tokens,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            device=device,
        )
    except (RuntimeError, MemoryError) as error:
        raise ConfigInvalid(f"kv_bytes is {settings.kv_bytes}: the device has no such memory free") from error


def _state_memory(
    settings: EngineSettings, config: ModelConfig, device: torch.device, digest: bytes
) -> StateMemory | None:
    delta = config.delta
    if delta is None:
        return None
    layers = sum(delta.recurrent)
    shape = StateFormat(digest, layers, delta.channels, delta.history, delta.heads, delta.key_dim, delta.value_dim)
    slots = min(settings.state_bytes // shape.state_bytes, MAX_SLOTS)
    if slots < 1:
        raise ConfigInvalid(f"state_bytes is {settings.state_bytes}, one state needs {shape.state_bytes}")
    try:
        return StateMemory(slots, shape, device)
    except (RuntimeError, MemoryError) as error:
        raise ConfigInvalid(f"state_bytes is {settings.state_bytes}: the device has no such memory free") from error
