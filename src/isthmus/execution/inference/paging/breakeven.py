"""Load or recompute: whichever is expected to be faster, by rates measured here. Pure.

    loading      wait for the loads before it + latency of the tier + bytes / rate of the tier
    computing    tokens / rate of prompts, times the requests that it delays: its own and those that run

Rates are moving averages over bytes (tokens) and seconds, so that a large sample counts for more than a small one. The
latency of a tier is what small loads took beyond their bytes. Until a rate is measured its cautious guess stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.contracts.blocks import Tier

FADE = 0.9
SMALL_BYTES = 1 << 18
ASSUMED = {Tier.DRAM: (2e9, 0.001), Tier.NVME: (5e8, 0.004), Tier.REMOTE: (5e7, 0.05)}
"""Bytes a second and seconds, of a tier that nothing was loaded from yet."""


@dataclass(slots=True)
class _Rate:
    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self.amount = self.amount * FADE + amount
        self.seconds = self.seconds * FADE + seconds

    def value(self, assumed: float) -> float:
        """Per second."""
        return self.amount / self.seconds if self.seconds > 0 else assumed


class BreakEven:
    """The rates of one engine and what follows from them."""

    def __init__(self) -> None:
        self._prompt = _Rate()
        self._tiers = {tier: _Rate() for tier in ASSUMED}
        self._latency = {tier: seconds for tier, (_, seconds) in ASSUMED.items()}

    def computed(self, tokens: int, seconds: float) -> None:
        """A step computed `tokens` tokens of prompts in `seconds`."""
        if tokens > 0 and seconds > 0:
            self._prompt.add(tokens, seconds)

    def loaded(self, tier: Tier, count: int, seconds: float) -> None:
        """`count` bytes came from `tier` in `seconds`."""
        if tier not in self._tiers or count <= 0 or seconds <= 0:
            return
        if count <= SMALL_BYTES:
            beyond = max(0.0, seconds - count / self._tiers[tier].value(ASSUMED[tier][0]))
            self._latency[tier] = FADE * self._latency[tier] + (1 - FADE) * beyond
        else:
            self._tiers[tier].add(count, max(1e-9, seconds - self._latency[tier]))

    def load_s(self, sizes: Mapping[Tier, int], queued: float = 0.0) -> float:
        """Seconds to load so many bytes from each tier, behind loads that take `queued` seconds."""
        total = queued
        for tier, count in sizes.items():
            if count and tier in self._tiers:
                total += self._latency[tier] + count / self._tiers[tier].value(ASSUMED[tier][0])
        return total

    def compute_s(self, tokens: int) -> float | None:
        """Seconds to compute so many tokens of a prompt; None while nothing is known."""
        return tokens / self._prompt.value(0.0) if self._prompt.seconds > 0 else None

    def worth(self, sizes: Mapping[Tier, int], tokens: int, queued: float = 0.0, others: int = 0) -> bool:
        """Whether to load these bytes rather than compute these tokens, beside `others` that wait for every step. While
        nothing was computed yet: yes.
        """
        compute = self.compute_s(tokens)
        return compute is None or self.load_s(sizes, queued) < compute * (1 + others)

    def lengths(self, token_bytes: float) -> dict[str, float]:
        """The length from which loading pays, in tokens, by tier; -1: never. Empty while nothing was computed."""
        compute = self.compute_s(1)
        if compute is None:
            return {}
        found = {}
        for tier, rate in self._tiers.items():
            gain = compute - token_bytes / rate.value(ASSUMED[tier][0])
            found[tier.value] = self._latency[tier] / gain if gain > 0 else -1.0
        return found
