"""`isthmus bench turns`: what a conversation gains from the block store, and what others pay for it.

Turns. One conversation grows turn by turn. Between two turns other prompts push its state off the device and out of
DRAM (the pool and the arena are smaller than what they leave). What was read often may stay in DRAM all the same: the
result says how many tokens came from which tier. The same prompts are
asked of a server without a store, whose device forgot them just the same, and of a peer that was restarted in between.
The time to the first token of turn N is compared; where the state came from is read from the metrics.

Paging. A few requests decode, first alone, then beside conversations that come back from the disk for one token each,
at several rates: the gaps between the tokens of the former against the bytes a second that the latter load. The same is
asked of a server whose device still has those conversations: what is dearer then is not paging, but computing for more.
"""

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.bench import model
from isthmus.bench.client import BadAnswer
from isthmus.bench.figures import figures
from isthmus.bench.targets import ServerTarget
from isthmus.bench.workloads import Ask

Say = Callable[[str], None]

SETTLE_S = 60.0
_POLL_S = 0.1
_REUSED = re.compile(r'^isthmus_reused_tokens_total\{[^}]*tier="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)
_GAUGE = re.compile(r'^isthmus_paging\{[^}]*what="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)
_BLOCKS = re.compile(
    r'^isthmus_store_blocks_total\{event="(\w+)",[^}]*reason="(\w+)",tier="(\w*)"\} (\S+)$', re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class TurnsPlan:
    """How long the conversation is and how it grows (tokens), and how much is asked in between to push it out."""

    turns: int = 20
    grow: int = 160
    output: int = 8
    filler: int = 3072
    fillers: int = 3
    seed: int = 1
    peer_turns: tuple[int, ...] = (5, 10, 15, 20)


@dataclass(slots=True)
class TurnsRun:
    """Seconds to the first token by turn (from 1), and tokens reused by tier in all of them."""

    ttft_s: dict[int, float] = field(default_factory=dict)
    tiers: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)


def conversation(plan: TurnsPlan) -> list[int]:
    """All tokens of the conversation; turn N asks with the first N * `grow` of them."""
    return _tokens(random.Random(f"turns {plan.seed}"), plan.turns * plan.grow)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(model.VOCABULARY // 64, model.VOCABULARY) for _ in range(count)]


def run_turns(target: ServerTarget, plan: TurnsPlan, say: Say, *, restart: bool = False) -> TurnsRun:
    """Hold the conversation with `target`, pushing it out between turns, or restarting the target before each turn that
    is measured. Raises `BadAnswer`.
    """
    found, text = TurnsRun(), conversation(plan)
    rng = random.Random(f"fillers {plan.seed} {target.name}")
    measured = plan.peer_turns if restart else range(1, plan.turns + 1)
    for turn in measured:
        if restart:
            target.stop()
            target.start()
            target.run([Ask(tuple(_tokens(rng, 64)), 2)])
        before = reused(target)
        trace = target.run([Ask(tuple(text[: turn * plan.grow]), plan.output)])[0]
        found.ttft_s[turn] = trace.arrivals[0][0] - trace.sent_s
        for tier, tokens in reused(target).items():
            found.tiers[tier] = found.tiers.get(tier, 0.0) + tokens - before.get(tier, 0.0)
        say(f"{target.name} turn {turn}: {found.ttft_s[turn] * 1000:.0f} ms")
        if not restart:
            push_out(target, plan, rng)
    found.gauges = gauges(target)
    return found


def push_out(target: ServerTarget, plan: TurnsPlan, rng: random.Random) -> None:
    """Ask other prompts until nothing else is left on the device and in DRAM; wait until all is written behind."""
    for _ in range(plan.fillers):
        target.run([Ask(tuple(_tokens(rng, plan.filler)), 1)])
    settle(target)


def settle(target: ServerTarget) -> None:
    """Wait until nothing is owed to the store. Raises `BadAnswer` when that takes too long."""
    until = time.monotonic() + SETTLE_S
    while gauges(target).get("keep_owed_bytes", 0.0):
        if time.monotonic() > until:
            raise BadAnswer(f"{target.name} still owes bytes to its store after {SETTLE_S:.0f} s")
        time.sleep(_POLL_S)


def reused(target: ServerTarget) -> dict[str, float]:
    """Prompt tokens whose state was reused since the start, by tier; empty when the target does not tell."""
    return {tier: float(value) for tier, value in _REUSED.findall(target.page("/metrics") or "")}


def gauges(target: ServerTarget) -> dict[str, float]:
    """The gauges of paging; empty when the target does not tell."""
    return {name: float(value) for name, value in _GAUGE.findall(target.page("/metrics") or "")}


def loaded_blocks(target: ServerTarget) -> float:
    """Blocks loaded from the store since the start."""
    found = _BLOCKS.findall(target.page("/metrics") or "")
    return sum(float(value) for event, reason, _, value in found if event == "load" and reason == "hit")


# ---- what others pay


@dataclass(frozen=True, slots=True)
class PagingPlan:
    """`decoders` requests decode `output` tokens each, beside returns of conversations of `length` tokens (all but the
    last in whole blocks) at `rates` a second (0: none).
    """

    decoders: int = 4
    output: int = 192
    length: int = 2049
    sessions: int = 24
    rates: Sequence[float] = (0.0, 2.0, 4.0, 8.0, 12.0, 16.0)
    seed: int = 1


def run_paging(target: ServerTarget, plan: PagingPlan, block_bytes: int, say: Say) -> list[dict[str, Any]]:
    """For each rate the gaps between the decoders' tokens, and the bytes a second that were loaded. Raises
    `BadAnswer`.
    """
    rng = random.Random(f"paging {plan.seed}")
    sessions = [tuple(_tokens(rng, plan.length)) for _ in range(plan.sessions)]
    for session in sessions:
        target.run([Ask(session, 1)])
    settle(target)
    rows = []
    for rate in plan.rates:
        asks = [Ask(tuple(_tokens(rng, 64)), plan.output) for _ in range(plan.decoders)]
        expected = plan.output * 0.06
        returns = (
            [Ask(sessions[n % len(sessions)], 1, 1.0 + n / rate) for n in range(int(rate * expected))] if rate else []
        )
        before = loaded_blocks(target)
        traces = target.run([*asks, *returns])
        seen = figures(traces[: plan.decoders])
        loaded = (loaded_blocks(target) - before) * block_bytes
        row = {
            "returns_per_s": rate,
            "loaded_bytes_per_s": round(loaded / seen.seconds),
            "gap_p50_s": round(seen.gap_p50_s, 5),
            "gap_p99_s": round(seen.gap_p99_s, 5),
            "decode_per_s": round(seen.decode_per_s, 2),
        }
        speed, p99 = loaded / seen.seconds / 1e6, seen.gap_p99_s * 1000
        say(f"{target.name}, {rate:g} returns/s: {speed:.0f} MB/s, p99 {p99:.1f} ms")
        rows.append(row)
    return rows
