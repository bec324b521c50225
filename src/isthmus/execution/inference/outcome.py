"""What a step's result means for one request: which tokens count, and whether it ended."""

import msgspec

from isthmus.contracts.events import Finish, ModelInfo, RequestOutput
from isthmus.contracts.requests import Work
from isthmus.execution.inference.batch import SliceResult
from isthmus.execution.inference.sequence import Sequence


def take_result(
    sequence: Sequence, got: SliceResult, info: ModelInfo, now: float
) -> tuple[RequestOutput | None, Finish | None]:
    """Append the sampled tokens up to the first that ends the request. Returns the output, if any, and the end, if any.

    Tokens after an end are dropped. An end or stop token is part of the ids (`stop_token` says so), not of the text.
    """
    if sequence.request.work is not Work.GENERATE:
        if sequence.remaining:
            return None, None
        final = sequence.final_output(Finish.DONE, now)
        return msgspec.structs.replace(final, hidden=got.hidden), Finish.DONE
    if not got.token_ids:
        return None, None
    kept, finish, stopped = _cut(sequence, got.token_ids, info)
    first = sequence.first_token is None
    if first:
        sequence.first_token = now
    sequence.append(kept)
    sequence.chain_digests((got.digests or [])[: len(kept)])
    logprobs = None if got.logprobs is None else got.logprobs[: len(kept)]
    if finish is None:
        cached = sequence.cached_tokens if first else None
        return RequestOutput(sequence.id, kept, logprobs, cached_tokens=cached), None
    final = sequence.final_output(finish, now)
    return msgspec.structs.replace(final, token_ids=kept, logprobs=logprobs, stop_token=stopped), finish


def _cut(sequence: Sequence, token_ids: list[int], info: ModelInfo) -> tuple[list[int], Finish | None, bool]:
    """The tokens up to and including the first that ends the request, the end, whether it is a stop token."""
    params = sequence.request.sampling
    output = len(sequence.history.output)
    ends = set(params.stop_token_ids) if params.ignore_eos else {*params.stop_token_ids, *info.eos_token_ids}
    for index, token in enumerate(token_ids):
        count = output + index + 1
        if token in ends and count > params.min_tokens:
            return token_ids[: index + 1], Finish.STOP, True
        if count >= params.max_tokens or sequence.length + index + 1 >= info.max_model_len:
            return token_ids[: index + 1], Finish.LENGTH, False
    return token_ids, None, False
