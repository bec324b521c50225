"""The self-test of exact mode, at load and with the model's own weights.

Each request alone, in one batch, in chunks, token by token and in other blocks; a hybrid model's also from a state that
was kept in the middle, read and written back elsewhere; and generation with drafts, right and wrong ones, against plain
decoding, a wrong one rolled back. Logits must be bitwise the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from isthmus.contracts.errors import ExactUnavailable
from isthmus.contracts.framing import frame
from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import (
    Batch,
    Runner,
    SampleTask,
    SequenceSlice,
    SliceResult,
    StateCapture,
    StateWork,
    TokenHistory,
)
from isthmus.execution.inference.compiled.spec import Machine
from isthmus.execution.inference.models.decoder import Decoder

LENGTHS = (200, 70, 33, 9, 1)
GENERATED = 5
MAX_WINDOW = 1024
SPARE_SLOTS = 4
"""State slots that the self-test needs besides one a prompt: the states after each draft."""


@dataclass(slots=True)
class _Request:
    """A prompt with its place: blocks, and a state slot in a hybrid model."""

    prompt: Sequence[int]
    blocks: Sequence[int]
    slot: int | None
    computed: int = 0
    output: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.output]

    def part(self, chunk: int, drafts: Sequence[int] = (), slots: Sequence[int] = ()) -> SequenceSlice:
        """The next slice. With drafts, `slots` take the states after each token but the last."""
        tokens = self.tokens
        high = min(len(tokens), self.computed + chunk)
        task = None
        if high == len(tokens):
            params = SamplingParams(max_tokens=GENERATED, seed=0, temperature=0.0)
            task = SampleTask(params, len(self.output), TokenHistory(self.prompt, list(self.output)), digest=True)
        ids = [*tokens[self.computed : high], *drafts]
        work = None
        if self.slot is not None:
            end = self.computed + len(ids)
            ends = [*range(end - len(slots), end), end]
            places = [*slots, self.slot]
            captures = [StateCapture(at, place) for at, place in zip(ends, places, strict=True)]
            work = StateWork(self.slot if self.computed else None, captures)
        return SequenceSlice("self-test", ids, self.computed, self.blocks, task, len(drafts), state=work)

    def take(self, part: SequenceSlice, result: SliceResult) -> None:
        self.computed = part.end - part.drafts + result.accepted_drafts
        self.output.extend(result.token_ids)
        self.digests.extend(result.digests or [])


def exact_arithmetic(machine: Machine, threads: int) -> str:
    """The name of exact mode's bits: what they depend on besides the model. 32 hexadecimal digits.

    Another release of torch, other instructions or another number of threads may round otherwise; the self-test proves
    that the bits are the same within one of them, nothing between two.
    """
    parts = (machine.torch, machine.capability, machine.architecture, machine.flags, str(threads))
    return blake3(frame(b"isthmus/exact-arithmetic/v1", *(part.encode() for part in parts))).hexdigest(length=16)


def prove_exact(runner: Runner, decoder: Decoder) -> None:
    """Run the self-test. Raises `ExactUnavailable` naming what differed.

    Uses the runner's blocks and state slots; call it before anything is stored there.
    """
    info = runner.info
    lengths = _lengths(runner, decoder)
    generator = np.random.default_rng(20_240_229)
    prompts = [generator.integers(0, decoder.config.vocab_size, length).tolist() for length in lengths]
    per = -(-(max(lengths, default=0) + GENERATED) // info.block_tokens)
    slots = info.states.slots - SPARE_SLOTS if info.states else len(prompts)
    if slots < len(prompts):
        prompts = prompts[-1:]
    if not prompts or slots < 1:
        raise ExactUnavailable("the KV or state memory is too small for the self-test")
    places = [list(range(index * per, (index + 1) * per)) for index in range(len(prompts))]
    held = list(range(len(prompts))) if info.states else [None] * len(prompts)

    def made(turned: bool = False) -> list[_Request]:
        where = list(zip(places, held, strict=True))[:: -1 if turned else 1]
        return [_Request(prompt, *place) for prompt, place in zip(prompts, where, strict=True)]

    alone = []
    for prompt in prompts:
        request = _Request(prompt, places[0], held[0])
        _run(runner, [request], [len(prompt)])
        alone.append(request.digests)
    cases = {
        "a batch": [0] * len(prompts),
        "chunks of 7": [7] * len(prompts),
        "chunks of 40": [40] * len(prompts),
        "token by token": [50 if len(prompt) > 100 else 1 for prompt in prompts],
        "mixed chunks": [(64, 13, 40, 3, 1)[index % 5] for index in range(len(prompts))],
    }
    for name, chunks in cases.items():
        requests = made(turned=True)
        _run(runner, requests, [chunk or len(prompt) for chunk, prompt in zip(chunks, prompts, strict=True)])
        _compare([request.digests for request in requests], alone, name)
    if info.states:
        _prove_resume(runner, prompts[0], places[0], alone[0])
    _prove_drafts(runner, made())


def _lengths(runner: Runner, decoder: Decoder) -> list[int]:
    """Lengths of the prompts, longest first: as many as have room together. One goes past the sliding window, if that
    is at most MAX_WINDOW; a wider one hides keys by the same operators, and is not reached.
    """
    info = runner.info
    past = [window + 2 * GENERATED for window in decoder.config.windows if max(LENGTHS) <= window <= MAX_WINDOW]
    lengths = [length for length in (*past[:1], *LENGTHS) if length + GENERATED <= info.max_model_len]
    while lengths and -(-(lengths[0] + GENERATED) // info.block_tokens) * len(lengths) > info.blocks:
        del lengths[0]
    return lengths


def _compare(found: object, expected: object, name: str) -> None:
    if found != expected:
        raise ExactUnavailable(f"logits of the self-test differ bitwise between a request alone and {name}")


def _run(runner: Runner, requests: Sequence[_Request], chunks: Sequence[int], count: int = 1) -> None:
    """All together, each in its own chunk size, until each has `count` tokens."""
    while True:
        todo = [(one, one.part(size)) for one, size in zip(requests, chunks, strict=True) if len(one.output) < count]
        if not todo:
            return
        results = runner.execute(Batch([part for _, part in todo])).result().slices
        for (one, part), result in zip(todo, results, strict=True):
            one.take(part, result)


def _prove_resume(runner: Runner, prompt: Sequence[int], blocks: Sequence[int], expected: list[bytes]) -> None:
    """States kept inside a slice, off any grid, carried through their records to another slot.

    One has far to go; one is near the end, where even a head that forgets quickly shows a difference.
    """
    ends = sorted({len(prompt) * 2 // 5, len(prompt) - 2} & set(range(1, len(prompt))))
    work = StateWork(None, [StateCapture(end, slot) for slot, end in enumerate(ends)])
    runner.execute(Batch([SequenceSlice("self-test", prompt, 0, blocks, state=work)])).result()
    for slot, end in enumerate(ends):
        runner.write_state(len(ends), runner.read_state(slot))
        resumed = _Request(prompt, blocks, len(ends), computed=end)
        _run(runner, [resumed], [len(prompt)])
        _compare(resumed.digests, expected, "one resumed from a state")


def _prove_drafts(runner: Runner, requests: list[_Request]) -> None:
    """Three right drafts and a wrong one in one step for every request, then on from where the guesses ended."""
    plain = [_Request(one.prompt, one.blocks, one.slot) for one in requests]
    _run(runner, plain, [len(one.prompt) for one in plain], GENERATED)
    for index, (guessed, known) in enumerate(zip(requests, plain, strict=True)):
        _run(runner, [guessed], [len(guessed.prompt)])
        wrong = (known.output[3] + 1) % runner.info.vocab_size
        slots = range(len(requests), len(requests) + 3) if guessed.slot is not None else ()
        others = requests[index + 1 :]
        part = guessed.part(1, [*known.output[1:3], wrong], slots)
        batch = [part, *(one.part(len(one.prompt)) for one in others)]
        guessed.take(part, runner.execute(Batch(batch)).result().slices[0])
        # The state after what was accepted: slot 2 of those kept after each token but the last.
        resumed = _Request(guessed.prompt, guessed.blocks, slots[2] if slots else None)
        resumed.computed, resumed.output = guessed.computed, guessed.output
        _run(runner, [resumed], [1], GENERATED)
        found = [guessed.output[:GENERATED], guessed.digests + resumed.digests]
        _compare(found, [known.output, known.digests], "one with drafts")
