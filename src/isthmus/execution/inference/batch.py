"""What the scheduler hands the runner for one step, and what comes back. Plain values only: no tensors, no torch.

    schedule -> Batch -> Runner.execute -> StepHandle.result() -> StepResult -> update

A `SequenceSlice` computes positions [start, start + len(token_ids)) of one request; its last `drafts` ids are guesses
to be verified. Where `sample` is set, the runner samples after the last non-draft id and, while guesses hold, after
each draft: 1 to drafts + 1 tokens. Draft verification is by equality with the token that sampling at that output index
would give, so speculation never changes an output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from isthmus.contracts.blocks import RecordKind
from isthmus.contracts.events import ModelInfo, TokenLogprob
from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.host_memory import HostMemory
from isthmus.execution.inference.paging.jobs import Arrivals

SAMPLED = -1
"""Stands in a slice for the token that the step handed in before samples for the same `serial`."""


@dataclass(slots=True)
class TokenHistory:
    """The tokens a request has so far, for penalties. Owned by the request; rebuilt by replaying ids on a resume."""

    prompt: Sequence[int]
    output: list[int]


@dataclass(frozen=True, slots=True)
class SampleTask:
    """How to sample for one request. `index` is the output index of the first token to sample (0 for the first ever).

    `banned` are token ids that may not be chosen at output indexes below `banned_until` (end and stop tokens before
    min_tokens). `digest` asks for a BLAKE3 digest of each sampled position's float32 logits. `masks` has, where the
    output is constrained, one bitmask a sampled position (drafts + 1): bit t % 32 of little-endian word t // 32 is set
    when token t is allowed.
    """

    params: SamplingParams
    index: int
    history: TokenHistory
    banned: tuple[int, ...] = ()
    banned_until: int = 0
    digest: bool = False
    masks: Sequence[bytes] | None = None


@dataclass(frozen=True, slots=True)
class StateCapture:
    """Keep the recurrent state after positions [0, end) in `slot`."""

    end: int
    slot: int


@dataclass(frozen=True, slots=True)
class StateWork:
    """The recurrent state of one slice (hybrid models): `source` is the slot with the state after [0, start), None for
    the empty state (start == 0). `captures` are in ascending order, each with start < end <= the slice's end. The last
    one may write to `source`; no other slot appears twice.

    In a batch, slices may share a source (a fork); a slot is captured to at most once, and never while it is another
    slice's source. All sources are read before anything is captured. A state that no capture keeps is gone after the
    step. A capture on the grid (`StateInfo.grid_tokens`) is free; one off it makes its cell go token by token.
    """

    source: int | None
    captures: Sequence[StateCapture]


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One request's part of a step. `blocks` cover positions [0, start + len(token_ids)) in order.

    `token_ids` may be [`SAMPLED`] (ahead.py). `state` is there for hybrid models and only then. `serial` is the
    sequence's own number in its engine, never given twice (a request's id may come again); 0 when it is not known.
    `arrivals`: layers of its blocks are still being loaded; each is to be waited
    for, and when one fails the slice's result means nothing.
    """

    request_id: str
    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    sample: SampleTask | None = None
    drafts: int = 0
    hidden: bool = False
    state: StateWork | None = None
    serial: int = 0
    arrivals: Arrivals | None = None

    @property
    def end(self) -> int:
        """One past the last position computed."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: a packed list of slices, in the order they were scheduled."""

    slices: Sequence[SequenceSlice]

    @property
    def ahead(self) -> bool:
        """Whether it was scheduled before the tokens that it computes were known."""
        return any(part.token_ids[0] == SAMPLED for part in self.slices)

    @property
    def tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(len(part.token_ids) for part in self.slices)


@dataclass(frozen=True, slots=True)
class SliceResult:
    """What the step gave for one slice, in the batch's order.

    `token_ids` is empty when nothing was sampled; `accepted_drafts` of the slice's drafts were right. `hidden` is the
    last hidden state after the final norm of the slice's last position, little-endian float32. `digests` has 32 bytes
    a sampled token when asked for.
    """

    token_ids: list[int] = field(default_factory=list)
    accepted_drafts: int = 0
    logprobs: list[TokenLogprob] | None = None
    hidden: bytes | None = None
    digests: list[bytes] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One `SliceResult` for each slice of the batch."""

    slices: Sequence[SliceResult]


class StepHandle(Protocol):
    """A step that was handed in."""

    def done(self) -> bool:
        """Whether `result` would return at once."""
        ...

    def when_done(self, call: Callable[[], None]) -> None:
        """Have `call` called once, from any thread, when the step is done or taken back."""
        ...

    def cancel(self) -> bool:
        """Take the step back. False, and nothing happens, when it has begun."""
        ...

    def result(self) -> StepResult:
        """Wait for the step. Raises `EngineFailed` when it could not be computed."""
        ...


class Runner(Protocol):
    """Runs batches on a device; owns the weights, the KV memory of `info.blocks` blocks and, for a hybrid model, the
    state memory of `info.states.slots` slots.

    Block ids are 0 .. blocks-1, state slots 0 .. states.slots-1. The runner keeps no per-request state between steps,
    so any request may be resumed, preempted or dropped without telling it; but for the tokens of the last step, which
    the next may begin with (`SAMPLED`). Steps, reads and writes are carried out one by one, in the order handed in.
    """

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        ...

    def execute(self, batch: Batch) -> StepHandle:
        """Start a step and return at once."""
        ...

    def view(self, kind: RecordKind, place: int) -> memoryview | None:
        """The bytes of a block's or a state slot's record where they lie, writable, so that others than steps may copy
        them at any time (what is being copied must not be part of a step); None where the processor cannot address
        them.
        """
        ...

    def host(self) -> Mapping[RecordKind, HostMemory]:
        """The pools of block and state records, one record after the other, as another process may be given them; none
        where the device's memory is not the host's.
        """
        ...

    def read_block(self, block: int) -> bytes:
        """The canonical record of a block (see contracts.layout), `info.block_bytes` long."""
        ...

    def write_block(self, block: int, record: bytes) -> None:
        """Set a block from its canonical record. Raises `InvalidInput` on a wrong length."""
        ...

    def read_state(self, slot: int) -> bytes:
        """The canonical record of a state slot (see contracts.layout), `info.states.state_bytes` long."""
        ...

    def write_state(self, slot: int, record: bytes) -> None:
        """Set a state slot from its canonical record. Raises `InvalidInput` on a wrong length."""
        ...

    def close(self) -> None:
        """Release memory and threads."""
        ...
