"""The step after the one under way, scheduled before that one's tokens are known: overlapped scheduling.

While a step computes, what its successor will be can often be told already: one more token of every sequence. It is
handed to the runner at once, which runs steps in the order in which they came and puts the token that the first step
samples in the place of `SAMPLED` in the second. Meanwhile the first step's tokens are taken, sent, and so on.

Promises
- Outputs are those of scheduling step by step. Where the tokens decide what comes next (drafts, masks, penalties,
prompts that go on, layers that may fail to arrive, requests that wait and could start), nothing is scheduled ahead.
- A sequence that turns out to have ended is part of one step in vain: the result is dropped. Its blocks are free at
once; whoever gets them writes in a later step, and steps run in order.
- A step that was scheduled ahead and has not begun is taken back when a request arrives: none waits for it.
"""

from isthmus.contracts.events import ModelInfo
from isthmus.contracts.requests import Work
from isthmus.execution.inference.batch import SAMPLED, SampleTask, SequenceSlice
from isthmus.execution.inference.sequence import Sequence


def foreseeable(sequence: Sequence, part: SequenceSlice) -> bool:
    """Whether `part`, which is under way, leaves its sequence to decode one token, whatever token it samples."""
    request = sequence.request
    plain = request.work is Work.GENERATE and request.constraint is None and not request.sampling.penalised
    return plain and part.sample is not None and not part.drafts and part.arrivals is None


def ends(part: SequenceSlice, info: ModelInfo) -> bool:
    """Whether the token that `part` samples is its request's last, by length."""
    task = part.sample
    return task is None or task.index + 1 >= task.params.max_tokens or part.end + 1 >= info.max_model_len


def follow(sequence: Sequence, part: SequenceSlice, info: ModelInfo) -> SequenceSlice:
    """The slice that computes the token which `part` samples. The lease covers it.

    Raises `ValueError` when nothing is to follow.
    """
    task, lease = part.sample, sequence.lease
    if task is None or lease is None:
        raise ValueError("nothing follows this slice")
    index = task.index + 1
    banned = banned_tokens(sequence, info, index)
    until = task.params.min_tokens if banned else 0
    after = SampleTask(task.params, index, task.history, banned, until, task.digest)
    return SequenceSlice(part.request_id, [SAMPLED], part.end, list(lease.blocks), after, serial=part.serial)


def banned_tokens(sequence: Sequence, info: ModelInfo, index: int) -> tuple[int, ...]:
    """Tokens that may not be chosen at output index `index`: those that end it, before min_tokens."""
    params = sequence.request.sampling
    if index >= params.min_tokens:
        return ()
    return tuple(sorted({*info.eos_token_ids, *params.stop_token_ids}))
