"""A runner without a model whose KV memory can be checked.

Each KV slot remembers the token and position written to it. Before computing a slice the fake verifies that the blocks
hold exactly the sequence's own tokens for every position below the slice: a wrong, stale or unwritten block is an
error. The next token is a function of all tokens read *through the block table*, so an output also depends on it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from blake3 import blake3

from isthmus.contracts.events import ModelInfo
from isthmus.contracts.layout import Codec, Dtype
from isthmus.execution.inference.batch import Batch, SequenceSlice, SliceResult, StepResult


class WrongState(Exception):
    """A block does not hold what the sequence needs."""


def fake_info(
    blocks: int = 16, block_tokens: int = 4, vocab: int = 2, max_len: int = 64, exact: bool = True
) -> ModelInfo:
    return ModelInfo(
        name="fake",
        model_type="fake",
        dtype=Dtype.F32,
        device="cpu",
        exact=exact,
        parameters=1,
        vocab_size=vocab,
        max_model_len=max_len,
        weights=b"w" * 32,
        layers=1,
        kv_heads=1,
        head_dim=1,
        block_tokens=block_tokens,
        block_bytes=block_tokens * 8,
        blocks=blocks,
        codec=Codec.RAW,
        eos_token_ids=[],
    )


def next_token(tokens: list[int], seed: int, vocab: int) -> int:
    """What the fake model says after `tokens`."""
    text = b",".join(str(token).encode() for token in tokens)
    return blake3(text + b"|" + str(seed).encode()).digest()[0] % vocab


def reference(prompt: list[int], seed: int, count: int, vocab: int) -> list[int]:
    """The first `count` output tokens of a request, computed alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed, vocab))
    return tokens[len(prompt) :]


@dataclass
class FakeRunner:
    """See the module."""

    info: ModelInfo = field(default_factory=fake_info)
    on_execute: Callable[[Batch], None] = lambda batch: None
    computed_slots: int = 0

    def __post_init__(self) -> None:
        self.memory: list[list[tuple[int, int] | None]] = [
            [None] * self.info.block_tokens for _ in range(self.info.blocks)
        ]
        self.batches: list[Batch] = []
        self.prefilled: list[tuple[tuple[int, ...], str]] = []

    def execute(self, batch: Batch) -> "FakeHandle":
        self.on_execute(batch)
        self.batches.append(batch)
        written = [block for part in batch.slices for block in self._own_blocks(part)]
        if len(written) != len(set(written)):
            raise WrongState("two slices of a step write the same block")
        return FakeHandle(self, batch)

    def _own_blocks(self, part: SequenceSlice) -> list[int]:
        size = self.info.block_tokens
        return list(part.blocks[part.start // size : -(-part.end // size)])

    def compute(self, part: SequenceSlice) -> SliceResult:
        size = self.info.block_tokens
        if len(part.blocks) * size < part.end:
            raise WrongState("the block table does not cover the slice")
        if len(set(part.blocks)) != len(part.blocks):
            raise WrongState("a block stands twice in one table")
        for offset, token in enumerate(part.token_ids):
            position = part.start + offset
            self.memory[part.blocks[position // size]][position % size] = (position, token)
            self.computed_slots += 1
        read = [self.memory[part.blocks[position // size]][position % size] for position in range(part.end)]
        for position, slot in enumerate(read):
            if slot is None or slot[0] != position:
                raise WrongState(f"position {position} of {part.request_id} holds {slot}")
        tokens = [slot[1] for slot in read if slot is not None]
        hidden = len(tokens).to_bytes(4, "little") if part.hidden else None
        if part.sample is None:
            return SliceResult(hidden=hidden)
        known = [*part.sample.history.prompt, *part.sample.history.output]
        if tokens[: len(known)] != known[: part.end]:
            raise WrongState(f"the blocks of {part.request_id} hold another sequence")
        seed, vocab = part.sample.params.seed, self.info.vocab_size
        out: list[int] = []
        for index in range(part.drafts + 1):
            seen = tokens[: part.end - part.drafts + index]
            out.append(next_token(seen, seed, vocab))
            if index < part.drafts and part.token_ids[len(part.token_ids) - part.drafts + index] != out[-1]:
                break
        digests = [bytes([token]) * 32 for token in out] if part.sample.digest else None
        return SliceResult(out, len(out) - 1, digests=digests)

    def read_block(self, block: int) -> bytes:
        return repr(self.memory[block]).encode()

    def write_block(self, block: int, record: bytes) -> None:
        raise WrongState("the engine core does not write blocks")

    def close(self) -> None:
        pass


@dataclass
class FakeHandle:
    """Computes when asked for the result, like a step that takes its time."""

    runner: FakeRunner
    batch: Batch

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        return StepResult([self.runner.compute(part) for part in self.batch.slices])
