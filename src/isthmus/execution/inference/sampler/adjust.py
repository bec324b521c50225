"""Logit bias, penalties and bans: sparse changes of one row of logits, in the order that `SamplingParams` states."""

from collections.abc import Sequence

import numpy as np

from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import TokenHistory


def adjust(
    row: np.ndarray, params: SamplingParams, history: TokenHistory, guessed: Sequence[int], banned: Sequence[int]
) -> None:
    """Change `row` [vocabulary] float32 in place: bias, repetition, frequency, presence; then ban.

    `guessed` are drafts that count as output already. Repetition divides positive logits and multiplies negative ones
    (Keskar et al. 2019); frequency subtracts a penalty a count, presence one penalty for any count (OpenAI). Token ids
    outside the vocabulary are without effect.
    """
    for token, bias in params.logit_bias.items():
        if token < row.size:
            row[token] += np.float32(bias)
    if params.penalised:
        output = np.array([*history.output, *guessed], np.int64)
        if params.repetition_penalty != 1.0:
            seen = np.unique(np.concatenate((np.asarray(history.prompt, np.int64), output)))
            seen = seen[seen < row.size]
            values, penalty = row[seen], np.float32(params.repetition_penalty)
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        counted, counts = np.unique(output, return_counts=True)
        inside = counted < row.size
        counted, counts = counted[inside], counts[inside].astype(np.float32)
        row[counted] -= np.float32(params.frequency_penalty) * counts
        row[counted] -= np.float32(params.presence_penalty)
    for token in banned:
        if 0 <= token < row.size:
            row[token] = -np.inf
