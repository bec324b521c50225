"""The workloads of `isthmus bench engine`: what is asked, and when. A seed makes the same asks again.

A: 16 prompts of 512 tokens at once, 64 tokens each. B: one of 1024, 64 tokens. C: 16 prompts that share their first
1024 tokens and have 32 of their own, 32 tokens each: cold (a prefix never seen) and warm (after one request with it).
mixed: Poisson arrivals of mixed lengths, half of them with one of a few shared prefixes.
"""

import random
from dataclasses import dataclass

from isthmus.contracts.errors import InvalidInput

NAMES = ("A", "B", "C-cold", "C-warm", "mixed")
MIXED_REQUESTS = 64
MIXED_PER_S = 2.5
_PREFIXES = 4


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: token ids, how many tokens to generate, and how many seconds after the first it is sent."""

    prompt: tuple[int, ...]
    output: int
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """`prime` is asked before, and not measured; `asks` are in the order of their times."""

    name: str
    prime: tuple[Ask, ...]
    asks: tuple[Ask, ...]

    @property
    def output_tokens(self) -> int:
        """Tokens that all asks generate."""
        return sum(ask.output for ask in self.asks)


def build(name: str, seed: int, vocabulary: int, *, per_s: float = MIXED_PER_S) -> Workload:
    """The workload called `name`; another seed has other tokens, so nothing of an earlier one is in a cache.

    `per_s` is the rate of arrivals of `mixed`. Raises `InvalidInput` for an unknown name.
    """
    rng = random.Random(f"{name} {seed}")

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary // 64, vocabulary) for _ in range(count))

    if name == "A":
        return Workload(name, (), tuple(Ask(tokens(512), 64) for _ in range(16)))
    if name == "B":
        return Workload(name, (), (Ask(tokens(1024), 64),))
    if name in ("C-cold", "C-warm"):
        prefix = tokens(1024)
        prime = (Ask(prefix + tokens(32), 1),) if name == "C-warm" else ()
        return Workload(name, prime, tuple(Ask(prefix + tokens(32), 32) for _ in range(16)))
    if name == "mixed":
        prefixes = [tokens(rng.randint(192, 512)) for _ in range(_PREFIXES)]
        asks, at = [], 0.0
        for _ in range(MIXED_REQUESTS):
            own = tokens(min(1024, max(16, round(rng.lognormvariate(4.8, 0.8)))))
            prefix = rng.choice(prefixes) if rng.random() < 0.5 else ()
            asks.append(Ask(prefix + own, rng.randint(16, 112), at))
            at += rng.expovariate(per_s)
        return Workload(name, (), tuple(asks))
    raise InvalidInput(f"{name!r} is no workload; there are {', '.join(NAMES)}", "workload")
