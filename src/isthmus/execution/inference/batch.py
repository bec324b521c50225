"""What the scheduler hands the runner for one step, and what comes back. Plain values only: no tensors, no torch.

    schedule -> Batch -> Runner.execute -> StepHandle.result() -> StepResult -> update

A `SequenceSlice` computes positions [start, start + len(token_ids)) of one request; its last `drafts` ids are guesses
to be verified. Where `sample` is set, the runner samples after the last non-draft id and, while guesses hold, after
each draft: 1 to drafts + 1 tokens. Draft verification is by equality with the token that sampling at that output index
would give, so speculation never changes an output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from isthmus.contracts.events import ModelInfo, TokenLogprob
from isthmus.contracts.sampling import SamplingParams


@dataclass(slots=True)
class TokenHistory:
    """The tokens a request has so far, for penalties. Owned by the request; rebuilt by replaying ids on a resume."""

    prompt: Sequence[int]
    output: list[int]


@dataclass(frozen=True, slots=True)
class SampleTask:
    """How to sample for one request. `index` is the output index of the first token to sample (0 for the first ever).

    `banned` are token ids that may not be chosen at output indexes below `banned_until` (end and stop tokens before
    min_tokens). `digest` asks for a BLAKE3 digest of each sampled position's float32 logits.
    """

    params: SamplingParams
    index: int
    history: TokenHistory
    banned: tuple[int, ...] = ()
    banned_until: int = 0
    digest: bool = False


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One request's part of a step. `blocks` cover positions [0, start + len(token_ids)) in order."""

    request_id: str
    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    sample: SampleTask | None = None
    drafts: int = 0
    hidden: bool = False

    @property
    def end(self) -> int:
        """One past the last position computed."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: a packed list of slices, in the order they were scheduled."""

    slices: Sequence[SequenceSlice]

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
    """A step under way."""

    def done(self) -> bool:
        """Whether `result` would return at once."""
        ...

    def result(self) -> StepResult:
        """Wait for the step. Raises `EngineFailed` when it could not be computed."""
        ...


class Runner(Protocol):
    """Runs batches on a device; owns the weights and the KV memory of `info.blocks` blocks.

    Block ids are 0 .. blocks-1. The runner keeps no per-request state between steps, so any request may be resumed,
    preempted or dropped without telling it. At most one step is under way at a time.
    """

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        ...

    def execute(self, batch: Batch) -> StepHandle:
        """Start a step and return at once."""
        ...

    def read_block(self, block: int) -> bytes:
        """The canonical record of a block (see contracts.layout), `info.block_bytes` long."""
        ...

    def write_block(self, block: int, record: bytes) -> None:
        """Set a block from its canonical record. Raises `InvalidInput` on a wrong length."""
        ...

    def close(self) -> None:
        """Release memory and threads."""
        ...
