"""A runner without a model whose KV memory can be checked.

Each KV slot remembers the token and position written to it. Before computing a slice the fake verifies that the blocks
hold exactly the sequence's own tokens for every position below the slice: a wrong, stale or unwritten block is an
error. The next token is a function of all tokens read *through the block table*, so an output also depends on it.

With `states` in its info the fake is hybrid: its recurrent state is a hash chain over the tokens, kept in slots, and
the next token is a function of it, too. A slot remembers its position, and a wrong one is an error; a state of other
tokens gives other outputs from there on. It also holds the scheduler to the contract of `StateWork` and to the grid.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from blake3 import blake3

from isthmus.contracts.blocks import RecordKind
from isthmus.contracts.events import ModelInfo, StateInfo
from isthmus.contracts.layout import Codec, Dtype
from isthmus.execution.inference.batch import SAMPLED, Batch, SequenceSlice, SliceResult, StepResult
from isthmus.execution.inference.paging.jobs import Arrivals

EMPTY = bytes(32)


class WrongState(Exception):
    """A block or a slot does not hold what the sequence needs, or the scheduler breaks a rule."""


def fake_info(
    blocks: int = 16,
    block_tokens: int = 4,
    vocab: int = 2,
    max_len: int = 64,
    exact: bool = True,
    states: StateInfo | None = None,
    layers: int = 1,
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
        layers=layers,
        kv_heads=1,
        head_dim=1,
        block_tokens=block_tokens,
        block_bytes=block_tokens * 8,
        blocks=blocks,
        codec=Codec.RAW,
        eos_token_ids=[],
        states=states,
    )


def fake_states(slots: int, grid: int = 6) -> StateInfo:
    return StateInfo(slots, 32, grid, format_digest=b"s" * 32)


def advance_state(state: bytes, tokens: list[int]) -> bytes:
    """The fake's recurrence."""
    for token in tokens:
        state = blake3(state + token.to_bytes(4, "little")).digest()
    return state


def next_token(tokens: list[int], seed: int, vocab: int, state: bytes = b"") -> int:
    """What the fake model says after `tokens`, with its recurrent `state` if it has one."""
    text = b",".join(str(token).encode() for token in tokens)
    return blake3(text + b"|" + str(seed).encode() + state).digest()[0] % vocab


def reference(prompt: list[int], seed: int, count: int, vocab: int, *, hybrid: bool = False) -> list[int]:
    """The first `count` output tokens of a request, computed alone."""
    tokens = list(prompt)
    state = advance_state(EMPTY, tokens) if hybrid else b""
    for _ in range(count):
        tokens.append(next_token(tokens, seed, vocab, state))
        state = advance_state(state, tokens[-1:]) if hybrid else b""
    return tokens[len(prompt) :]


@dataclass
class FakeRunner:
    """See the module."""

    info: ModelInfo = field(default_factory=fake_info)
    on_execute: Callable[[Batch], None] = lambda batch: None
    computed_slots: int = 0
    on_gate: Callable[[Arrivals], None] = lambda arrivals: arrivals.fail()
    """Called where a step needs layers that have not arrived."""
    eager: bool = False
    """Steps are done when they are handed in; else when they are waited for, and can be taken back until then."""
    prompt_ends: set[int] = field(default_factory=set)
    """Lengths of prompts that are only prefilled: their last chunk samples nothing."""

    def __post_init__(self) -> None:
        self.memory: list[list[tuple[int, int] | None]] = [
            [None] * self.info.block_tokens for _ in range(self.info.blocks)
        ]
        self.slots: dict[int, tuple[int, bytes]] = {}
        self.batches: list[Batch] = []
        self.handed_in: list[FakeHandle] = []
        self.sampled: dict[int, int] = {}
        self.prefilled: list[tuple[tuple[int, ...], str]] = []

    def execute(self, batch: Batch) -> "FakeHandle":
        self.on_execute(batch)
        self.batches.append(batch)
        written = [block for part in batch.slices for block in self._own_blocks(part)]
        if len(written) != len(set(written)):
            raise WrongState("two slices of a step write the same block")
        if self.info.states is not None:
            self._check_states(batch, self.info.states)
        handle = FakeHandle(self, batch)
        self.handed_in.append(handle)
        if self.eager:
            handle.compute()
        return handle

    def _own_blocks(self, part: SequenceSlice) -> list[int]:
        size = self.info.block_tokens
        return list(part.blocks[part.start // size : -(-part.end // size)])

    def _check_states(self, batch: Batch, states: StateInfo) -> None:
        """The rules of `StateWork`, and the grid: a chunk ends on it or is the last before a token is sampled."""
        writers: dict[int, str] = {}
        for part in batch.slices:
            work = part.state
            if work is None:
                raise WrongState("a slice without its work on states")
            ends = [capture.end for capture in work.captures]
            if ends != sorted(set(ends)) or not ends or ends[0] <= part.start or ends[-1] != part.end:
                raise WrongState(f"captures at {ends} of a slice from {part.start} to {part.end}")
            for capture in work.captures:
                if not 0 <= capture.slot < states.slots or capture.slot in writers:
                    raise WrongState(f"slot {capture.slot} is written twice or does not exist")
                writers[capture.slot] = part.request_id
            if work.source in [capture.slot for capture in work.captures[:-1]]:
                raise WrongState("the source is overwritten before the end of the slice")
            if part.drafts and ends[-part.drafts - 1 :] != list(range(part.end - part.drafts, part.end + 1)):
                raise WrongState("no state after some of the drafts")
            whole = self.ends_known(part)
            if part.end % states.grid_tokens and not whole:
                raise WrongState(f"a chunk ends at {part.end}, off the grid")
        for part in batch.slices:
            if part.state is not None and writers.get(part.state.source, part.request_id) != part.request_id:
                raise WrongState("a slot is read by one slice and written by another")

    def ends_known(self, part: SequenceSlice) -> bool:
        """Whether a slice reaches the last known token: it samples, gives a hidden state, or ends a prompt."""
        return part.sample is not None or part.hidden or part.end in self.prompt_ends

    def _states(self, part: SequenceSlice) -> list[bytes]:
        """The states after each position from `start` on; the one at `start` first. Captures what is asked for."""
        work = part.state
        if work is None:
            return [b""] * (len(part.token_ids) + 1)
        position, state = (0, EMPTY) if work.source is None else self.slots[work.source]
        if position != part.start:
            raise WrongState(f"the source of {part.request_id} is the state after {position}, not {part.start}")
        states = [state]
        for token in part.token_ids:
            states.append(advance_state(states[-1], [token]))
        for capture in work.captures:
            self.slots[capture.slot] = (capture.end, states[capture.end - part.start])
        return states

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
        if part.arrivals is not None and not part.arrivals.wait(self.info.layers - 1, 0):
            self.on_gate(part.arrivals)
            if part.arrivals.failed:
                return SliceResult([0] if part.sample is not None else [])
        read = [self.memory[part.blocks[position // size]][position % size] for position in range(part.end)]
        for position, slot in enumerate(read):
            if slot is None or slot[0] != position:
                raise WrongState(f"position {position} of {part.request_id} holds {slot}")
        tokens = [slot[1] for slot in read if slot is not None]
        states = self._states(part)
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
            out.append(next_token(seen, seed, vocab, states[len(seen) - part.start]))
            if index < part.drafts and part.token_ids[len(part.token_ids) - part.drafts + index] != out[-1]:
                break
        digests = [bytes([token]) * 32 for token in out] if part.sample.digest else None
        return SliceResult(out, len(out) - 1, digests=digests)

    def view(self, kind: RecordKind, place: int) -> memoryview | None:
        return None

    def read_block(self, block: int) -> bytes:
        return repr(self.memory[block]).encode()

    def write_block(self, block: int, record: bytes) -> None:
        raise WrongState("the engine core does not write blocks")

    def read_state(self, slot: int) -> bytes:
        return self.slots[slot][1]

    def write_state(self, slot: int, record: bytes) -> None:
        raise WrongState("the engine core does not write states")

    def close(self) -> None:
        pass


@dataclass
class FakeHandle:
    """Computes when asked for the result, like a step that takes its time, or at once (`eager`); always in order."""

    runner: FakeRunner
    batch: Batch
    got: StepResult | None = None
    cancelled: bool = False

    def done(self) -> bool:
        return self.got is not None

    def when_done(self, call: Callable[[], None]) -> None:
        call()

    def cancel(self) -> bool:
        if self.got is None:
            self.cancelled = True
            self.runner.handed_in.remove(self)
            self.runner.batches.remove(self.batch)
        return self.cancelled

    def compute(self) -> StepResult:
        if self.runner.handed_in.pop(0) is not self:
            raise WrongState("steps are not waited for in the order handed in")
        slices = [self.known(part) for part in self.batch.slices]
        results = [self.runner.compute(part) for part in slices]
        pairs = zip(slices, results, strict=True)
        self.runner.sampled = {part.serial: got.token_ids[-1] for part, got in pairs if got.token_ids}
        self.got = StepResult(results)
        return self.got

    def known(self, part: SequenceSlice) -> SequenceSlice:
        if list(part.token_ids) != [SAMPLED]:
            return part
        return replace(part, token_ids=[self.runner.sampled[part.serial]])

    def result(self) -> StepResult:
        if self.cancelled:
            raise WrongState("the result of a step that was taken back is waited for")
        return self.got or self.compute()
