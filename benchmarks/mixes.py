"""Random mixes of requests, and what running one must give: shared by the exactness benchmark and its tests.

A mix is 32 requests with random arrivals, lengths, shared prefixes, sampling, aborts and priorities, run by an engine
with a random token budget (chunk size), a random small pool (preemptions) and random drafting. The reference of a
request is the same request run alone in an engine of its own.
"""

import random
from dataclasses import dataclass, field

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.events import Finish, RequestOutput, TokenLogprob
from isthmus.contracts.ids import Namespace, RequestId
from isthmus.contracts.keys import PrefixScope
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import Runner
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.settings import SchedulerSettings

REQUESTS = 32
SCOPE = PrefixScope(Namespace(b"\x07" * 32), "mix")
MAX_STEPS = 20_000


@dataclass(frozen=True)
class Item:
    """A request of the library, by its place there."""

    serial: int
    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass
class Trace:
    """What one request gave."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    digest: bytes | None = None
    finish: Finish | None = None


@dataclass
class Mix:
    """Requests with their arrival steps, abort steps and priorities, and the engine they meet."""

    items: list[Item]
    arrivals: list[int]
    aborts: dict[int, int]
    priorities: list[int]
    settings: SchedulerSettings


def library(rng: random.Random, vocab: int, count: int, longest: int) -> list[Item]:
    """`count` requests, most of which share a prefix of some length with others."""
    stems = [[rng.randrange(vocab) for _ in range(rng.choice([16, 33, 48, 100, 160]))] for _ in range(8)]
    items = []
    for serial in range(count):
        stem = rng.choice(stems) if rng.random() < 0.7 else []
        cut = rng.randint(1, len(stem)) if stem else 0
        tail = [rng.randrange(vocab) for _ in range(rng.choice([1, 2, 7, 15, 16, 17, 40, 90]))]
        prompt = (stem[:cut] + tail)[:longest]
        items.append(Item(serial, tuple(prompt), _sampling(rng, vocab)))
    return items


def _sampling(rng: random.Random, vocab: int) -> SamplingParams:
    common = {"max_tokens": rng.randint(2, 20), "seed": rng.getrandbits(64), "logprobs": 2, "ignore_eos": True}
    if rng.random() < 0.5:
        return SamplingParams(temperature=0.0, **common)  # type: ignore[arg-type]
    return SamplingParams(
        temperature=rng.choice([0.7, 1.0, 1.3]),
        top_k=rng.choice([0, 0, 5, 40]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logit_bias={rng.randrange(vocab): 1.5} if rng.random() < 0.2 else {},
        **common,  # type: ignore[arg-type]
    )


def random_mix(rng: random.Random, items: list[Item]) -> Mix:
    """32 of the library's requests under random circumstances."""
    chosen = [rng.choice(items) for _ in range(REQUESTS)]
    arrivals = sorted(rng.choice([0, 0, rng.randint(0, 60)]) for _ in range(REQUESTS))
    aborts = {index: rng.randint(0, 80) for index in range(REQUESTS) if rng.random() < 0.12}
    settings = SchedulerSettings(
        max_batch_tokens=rng.choice([32, 48, 100, 256, 2048]),
        max_running=rng.choice([2, 8, 32]),
        max_waiting=REQUESTS,
        draft_tokens=rng.choice([0, 0, 3]),
    )
    return Mix(chosen, arrivals, aborts, [rng.randint(-1, 1) for _ in range(REQUESTS)], settings)


def run_mix(runner: Runner, mix: Mix) -> tuple[list[Trace], int]:
    """Every request's trace, and how often one was preempted. The engine's conservation law is checked at the end."""
    clock = ManualClock()
    core = EngineCore(runner, mix.settings, clock)
    traces = [Trace() for _ in mix.items]
    for step in range(MAX_STEPS):
        for index, arrival in enumerate(mix.arrivals):
            if arrival == step:
                _take(traces, core.submit(_request(index, mix.items[index], mix.priorities[index])))
            if mix.aborts.get(index) == step and arrival <= step:
                core.abort(RequestId(str(index)))
        clock.advance(0.001)
        for output in core.step():
            _take(traces, output)
        if core.idle and step >= mix.arrivals[-1]:
            core.check()
            return traces, core.stats().preemptions
    raise RuntimeError(f"a mix did not end within {MAX_STEPS} steps")


def run_alone(runner: Runner, item: Item) -> Trace:
    """The reference: the request alone in a fresh engine, its prompt in one chunk."""
    mix = Mix([item], [0], {}, [0], SchedulerSettings(max_batch_tokens=4096, max_running=1, max_waiting=1))
    traces, _ = run_mix(runner, mix)
    return traces[0]


def _request(index: int, item: Item, priority: int) -> EngineRequest:
    return EngineRequest(RequestId(str(index)), SCOPE, list(item.prompt), item.sampling, priority=priority)


def _take(traces: list[Trace], output: RequestOutput | None) -> None:
    if output is None:
        return
    trace = traces[int(output.request_id)]
    trace.tokens += output.token_ids
    trace.logprobs += output.logprobs or []
    if output.finish is not None:
        trace.finish = output.finish
        trace.digest = output.logits_digest
