"""Masks in the sampler: nothing that is not allowed is ever chosen, and nothing else changes."""

import numpy as np
import pytest
import torch

from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import SampleTask, SequenceSlice, TokenHistory
from isthmus.execution.inference.sampler.mask import masked
from isthmus.execution.inference.sampler.sampler import Sampler

VOCAB = 75


def mask_of(*tokens: int) -> bytes:
    bits = bytearray(-(-VOCAB // 32) * 4)
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
    return bytes(bits)


def part(
    params: SamplingParams, masks: list[bytes] | None, drafts: tuple[int, ...] = (), index: int = 0
) -> SequenceSlice:
    task = SampleTask(params, index, TokenHistory([1, 2], [3] * index), masks=masks)
    return SequenceSlice("a", [3, *drafts], 0, [0], task, len(drafts))


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 0.7, "min_p": 0.3},
        {"temperature": 1.0, "repetition_penalty": 3.0, "logit_bias": {50: 100.0, 7: -100.0}},
    ],
)
def test_only_allowed_tokens_are_chosen(options: dict[str, object]) -> None:
    allowed = {0, 7, 31, 32, 74}
    for seed in range(40):
        params = SamplingParams(max_tokens=4, seed=seed, **options)  # type: ignore[arg-type]
        (got,) = Sampler().sample(logits(1, seed), [part(params, [mask_of(*allowed)])], [range(1)])
        assert set(got.token_ids) <= allowed


def test_every_allowed_token_can_be_chosen_and_a_single_one_must() -> None:
    seen = set()
    for seed in range(200):
        params = SamplingParams(max_tokens=4, seed=seed, temperature=2.0)
        (got,) = Sampler().sample(torch.zeros(1, VOCAB), [part(params, [mask_of(5, 66)])], [range(1)])
        seen |= set(got.token_ids)
        (got,) = Sampler().sample(logits(1, seed), [part(params, [mask_of(74)])], [range(1)])
        assert got.token_ids == [74]
    assert seen == {5, 66}


def test_log_probabilities_stay_those_of_the_raw_logits() -> None:
    params = SamplingParams(max_tokens=4, seed=0, temperature=0.0, logprobs=3)
    row = logits(1)
    before = row.clone()
    (got,) = Sampler().sample(row, [part(params, [mask_of(9)])], [range(1)])
    assert torch.equal(row, before)
    assert got.logprobs is not None
    expected = torch.log_softmax(row[0], -1)
    assert got.logprobs[0].logprob == pytest.approx(float(expected[9]))
    assert got.logprobs[0].top[0][0] == int(row[0].argmax())


def test_each_draft_has_its_own_mask_and_other_rows_are_untouched() -> None:
    params = SamplingParams(max_tokens=9, seed=3, temperature=1.0)
    rows = logits(5, 1)
    held = part(params, [mask_of(10), mask_of(20), mask_of(30)], (10, 20))
    free = part(params, None)
    wrong = part(params, [mask_of(40), mask_of(41)], (44,))
    alone = Sampler().sample(rows[3:4], [free], [range(1)])[0]
    first, second, third = Sampler().sample(
        torch.cat([rows, logits(1, 9)]), [held, free, wrong], [range(3), range(3, 4), range(4, 6)]
    )
    assert first.token_ids == [10, 20, 30]
    assert first.accepted_drafts == 2
    assert second.token_ids == alone.token_ids
    assert third.token_ids == [40]


def test_a_mask_of_everything_changes_nothing() -> None:
    everything = mask_of(*range(VOCAB))
    for seed in range(20):
        params = SamplingParams(max_tokens=4, seed=seed, temperature=1.3, top_p=0.8)
        free = Sampler().sample(logits(1, seed), [part(params, None)], [range(1)])
        held = Sampler().sample(logits(1, seed), [part(params, [everything])], [range(1)])
        assert free[0].token_ids == held[0].token_ids


def test_bits_are_unpacked_in_the_order_of_token_ids() -> None:
    random = np.random.default_rng(0)
    for size in (1, 31, 32, 33, 75, 8192):
        bits = random.integers(0, 2, size).astype(bool)
        packed = np.packbits(np.pad(bits, (0, -size % 32)), bitorder="little").tobytes()
        got = masked(torch.zeros(2, size), [None, packed])
        assert torch.equal(got[0], torch.zeros(size))
        assert torch.equal(torch.isinf(got[1]), torch.from_numpy(~bits))
