"""Sampling: the meaning of each parameter against a slow reference, the distribution, and independence of the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import SampleTask, SequenceSlice, TokenHistory
from isthmus.execution.inference.sampler.choose import ranked
from isthmus.execution.inference.sampler.draws import uniform
from isthmus.execution.inference.sampler.sampler import Sampler


def params(**options: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1 << 20, "seed": 7, **options})


def part(task: SampleTask, drafts: tuple[int, ...] = ()) -> SequenceSlice:
    return SequenceSlice("r", [0, *drafts], 0, [0], task, len(drafts))


def sample_one(logits: torch.Tensor, chosen: SamplingParams, index: int = 0, **options: object) -> int:
    history = options.pop("history", TokenHistory([], []))
    task = SampleTask(chosen, index, history, **options)
    return Sampler().sample(logits[None], [part(task)], [range(1)])[0].token_ids[0]


def reference(logits: np.ndarray, p: SamplingParams, index: int, history: TokenHistory, banned: tuple[int, ...]) -> int:
    """The definition, token by token, in Python."""
    row = [float(value) for value in logits]
    for token, bias in p.logit_bias.items():
        row[token] += bias
    seen = set(history.prompt) | set(history.output)
    for token in range(len(row)):
        if token in seen:
            row[token] = row[token] / p.repetition_penalty if row[token] > 0 else row[token] * p.repetition_penalty
        count = history.output.count(token)
        row[token] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
    for token in banned:
        row[token] = -math.inf
    if p.greedy:
        return max(range(len(row)), key=lambda t: (row[t], -t))
    shares = np.exp((np.array(row) - max(row)) / p.temperature)
    shares = shares / shares.sum()
    ranked = p.top_k > 0 or p.top_p < 1
    order = sorted(range(len(row)), key=lambda t: (-shares[t], t)) if ranked else list(range(len(row)))
    if p.top_k:
        order = order[: p.top_k]
    if p.top_p < 1:
        whole, total, kept = sum(shares[t] for t in order), 0.0, []
        for token in order:
            kept.append(token)
            total += shares[token] / whole
            if total >= p.top_p:
                break
        order = kept
    order = [t for t in order if shares[t] >= p.min_p * shares.max()]
    whole, total = sum(shares[t] for t in order), 0.0
    for token in order:
        total += shares[token] / whole
        if uniform(p.seed, index) < total:
            return token
    return order[-1]


CASES = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 2.0},
    "cold": {"temperature": 0.05},
    "top_k": {"top_k": 5},
    "top_k_1": {"top_k": 1},
    "top_k_over_vocabulary": {"top_k": 100_000},
    "top_p": {"top_p": 0.7},
    "top_p_tiny": {"top_p": 1e-9},
    "min_p": {"min_p": 0.2},
    "all_cuts": {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    "bias": {"logit_bias": {3: 4.0, 5: -100.0}, "temperature": 0.0},
    "repetition": {"repetition_penalty": 1.8, "temperature": 0.0},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": 2.0},
    "everything": {
        "logit_bias": {1: 2.0},
        "repetition_penalty": 0.7,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.5,
        "top_k": 30,
        "top_p": 0.95,
    },
}


@pytest.mark.parametrize("vocabulary", [50, 600])
@pytest.mark.parametrize("name", CASES)
def test_parameters_mean_what_the_reference_says(name: str, vocabulary: int) -> None:
    generator = np.random.default_rng(11)
    for index in range(40):
        logits = generator.normal(0, 2.5, vocabulary).astype(np.float32)
        history = TokenHistory(generator.integers(0, 50, 20).tolist(), generator.integers(0, 12, 9).tolist())
        banned = (2, int(logits.argmax())) if index % 2 else ()
        chosen = params(seed=index * 2**58 + 3, **CASES[name])
        got = sample_one(torch.from_numpy(logits), chosen, index, history=history, banned=banned, banned_until=1000)
        assert got == reference(logits, chosen, index, history, banned)


def test_bans_end_at_their_output_index() -> None:
    logits = torch.tensor([5.0, 1.0, 0.0])
    assert sample_one(logits, params(temperature=0.0), 3, banned=(0,), banned_until=4) == 1
    assert sample_one(logits, params(temperature=0.0), 4, banned=(0,), banned_until=4) == 0


def test_ties_go_to_the_lowest_id_also_over_the_edge_of_the_head() -> None:
    logits = torch.zeros(5000)
    assert sample_one(logits, params(temperature=0.0)) == 0
    for seed in range(20):
        assert sample_one(logits, params(seed=seed, top_k=300)) == int(uniform(seed, 0) * 300)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 6}, {"temperature": 0.6}])
def test_the_distribution_is_the_models(options: dict[str, float]) -> None:
    """Chi-square at 1 - 1e-6 over 4,000 draws of one seed: successive output indexes are independent draws."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    chosen = params(**options)
    rows = [part(SampleTask(chosen, index, TokenHistory([], []))) for index in range(4000)]
    results = Sampler().sample(logits.repeat(4000, 1), rows, [range(i, i + 1) for i in range(4000)])
    counts = np.bincount([result.token_ids[0] for result in results], minlength=8)
    shares = torch.softmax(logits / chosen.temperature, -1).double().numpy()
    if "top_k" in options:
        shares[6:] = 0
    if "top_p" in options:
        shares[np.cumsum(shares) - shares >= 0.9] = 0
    shares /= shares.sum()
    assert counts[shares == 0].sum() == 0
    expected = shares[shares > 0] * 4000
    chi = ((counts[shares > 0] - expected) ** 2 / expected).sum()
    assert chi < 42.7  # the 1e-6 quantile for 8 classes; fewer classes only make it looser


def test_uniform_is_a_function_of_seed_and_index_in_the_unit_interval() -> None:
    values = [uniform(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(1000)]
    assert len(set(values)) == 3000
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 3000 - 0.5) < 0.03


params_strategy = st.builds(
    params,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 400]),
    top_p=st.sampled_from([1.0, 0.99, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(params_strategy, min_size=2, max_size=9), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_a_row_is_sampled_alike_alone_and_in_any_batch(
    chosen: list[SamplingParams], seed: int, shuffler: object
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(chosen), 1003, generator=generator) * 3
    tasks = [part(SampleTask(p, i, TokenHistory([i, 2], [3, 3, i]), digest=True)) for i, p in enumerate(chosen)]
    alone = [Sampler().sample(logits[i : i + 1], [tasks[i]], [range(1)])[0] for i in range(len(chosen))]
    order = list(range(len(chosen)))
    shuffler.shuffle(order)
    together = Sampler().sample(logits[order], [tasks[i] for i in order], [range(i, i + 1) for i in range(len(order))])
    assert together == [alone[i] for i in order]


def test_logprobs_are_of_the_raw_logits_best_first() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0])
    task = SampleTask(params(temperature=0.0, logprobs=3, logit_bias={3: 50.0}), 0, TokenHistory([], []))
    result = Sampler().sample(logits[None], [part(task)], [range(1)])[0]
    expected = torch.log_softmax(logits, -1).tolist()
    assert result.token_ids == [3]
    assert result.logprobs is not None
    assert result.logprobs[0].logprob == expected[3]
    assert result.logprobs[0].top == [(1, expected[1]), (2, expected[2]), (0, expected[0])]


def test_drafts_stand_up_to_the_first_wrong_one() -> None:
    logits = torch.full((4, 10), -5.0)
    for row, best in enumerate((4, 5, 6, 7)):
        logits[row, best] = 5.0
    task = SampleTask(params(temperature=0.0, logprobs=0), 0, TokenHistory([], []), digest=True)

    def verify(*drafts: int) -> tuple[list[int], int]:
        result = Sampler().sample(logits, [part(task, drafts)], [range(4)])[0]
        assert len(result.digests or []) == len(result.logprobs or []) == len(result.token_ids)
        return result.token_ids, result.accepted_drafts

    assert verify(4, 5, 6) == ([4, 5, 6, 7], 3)
    assert verify(4, 9, 6) == ([4, 5], 1)
    assert verify(9, 5, 6) == ([4], 0)


def test_penalties_count_accepted_drafts() -> None:
    """The third token sees the first two as output, as if they had been sampled one by one."""
    logits = torch.tensor([[2.0, 1.9, 1.8, 0.0]]).repeat(3, 1)
    task = SampleTask(params(temperature=0.0, presence_penalty=1.0), 0, TokenHistory([], []))
    assert Sampler().sample(logits, [part(task, (0, 1))], [range(3)])[0].token_ids == [0, 1, 2]


def test_logits_that_are_not_finite_are_counted_and_harm_no_other_row() -> None:
    logits = torch.stack((torch.full((50,), math.nan), torch.arange(50.0)))
    tasks = [part(SampleTask(params(top_k=3), 0, TokenHistory([], []))) for _ in range(2)]
    sampler = Sampler()
    both = sampler.sample(logits, tasks, [range(1), range(1, 2)])
    assert sampler.counters.not_finite == 1
    assert both[1] == Sampler().sample(logits[1:], tasks[1:], [range(1)])[0]


@given(
    values=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 0.25, 0.25, math.inf, -math.inf]), st.floats(width=32, allow_nan=False)),
        min_size=1,
        max_size=60,
    ),
    seed=st.integers(0, 9),
)
def test_ranking_is_by_value_then_by_id(values: list[float], seed: int) -> None:
    row = np.array(values, np.float32)
    ids = np.random.default_rng(seed).permutation(1 << 12)[: row.size].astype(np.int64)
    order = np.lexsort((ids, -row))
    found_values, found_ids = ranked(row, ids)
    assert np.array_equal(found_values, row[order])
    assert np.array_equal(found_ids, ids[order])
