"""`isthmus bench turns`: what a conversation gains from the block store, and what others pay for it.

Turns. One conversation grows turn by turn. Before each turn its state is pushed out: other prompts take all of the
device's pool, what is owed to the store is waited for, and the store's administrator evicts DRAM until nothing is left
in it. What was reused is read from the metrics and reported turn by turn, in tokens by tier and in bytes loaded by
tier: all of it came from NVMe, or the turn is named. The same prompts are asked of a server without a store,
whose device forgot them just the same, and of a peer that was restarted for each: the time that its start took is
reported apart from the time to the first token of the first real prompt.

Paging. A few requests decode, first alone, then beside conversations that come back from the disk for one token each,
at several rates: the gaps between the tokens of the former against the bytes a second that the latter load. The same is
asked of a server whose device still has those conversations: what is dearer then is not paging, but computing for more.
"""

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from isthmus.bench import model
from isthmus.bench.client import BadAnswer
from isthmus.bench.figures import figures
from isthmus.bench.targets import ServerTarget
from isthmus.bench.workloads import Ask
from isthmus.contracts.blocks import Tier
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.errors import DeadlineExceeded, StoreUnavailable
from isthmus.state.kv.administrator import Administrator

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
    """How long the conversation is and how it grows (tokens); the other prompts that push it off the device, together
    longer than its pool; `compared`: the turns that those without a store are asked as well.
    """

    turns: int = 20
    grow: int = 409
    output: int = 8
    filler: int = 2048
    fillers: int = 5
    seed: int = 1
    compared: tuple[int, ...] = (5, 10, 20)

    @property
    def filled(self) -> int:
        """Tokens that are asked between two turns."""
        return self.filler * self.fillers


@dataclass(slots=True)
class Turn:
    """One turn: the length of its prompt, seconds to the first token, what was reused by tier in tokens, and what was
    loaded from the store by tier in bytes. Before it: bytes that were evicted from DRAM, bytes that stayed there, and
    seconds that the server took to start (0: it was not started for this turn).
    """

    tokens: int
    ttft_s: float
    reused_tokens: dict[str, float] = field(default_factory=dict)
    loaded_bytes: dict[str, float] = field(default_factory=dict)
    evicted_bytes: int = 0
    left_in_dram_bytes: int = 0
    start_s: float = 0.0

    @property
    def from_disk(self) -> bool:
        """Whether everything that was reused came from NVMe (and something was)."""
        return bool(self.reused_tokens.get("nvme")) and set(self.reused_tokens) == {"nvme"}


@dataclass(slots=True)
class TurnsRun:
    """Turns by number (from 1), and the gauges of paging after the last."""

    turns: dict[int, Turn] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evicted:
    """What evicting did: bytes that went, and that are still there."""

    bytes: int = 0
    left: int = 0


class Memory(Protocol):
    """DRAM of a target's store."""

    def empty(self) -> Evicted:
        """Evict all of it. Raises `BadAnswer` when that cannot be asked for."""
        ...


class NoMemory:
    """Of a target that has no store."""

    def empty(self) -> Evicted:
        """See `Memory`."""
        return Evicted()


class StoreMemory:
    """Of a server whose store answers administrators at `socket`."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def empty(self) -> Evicted:
        """See `Memory`. What is being read or written down cannot go at once: asks again for a while."""
        admin, gone, until = Administrator(self._socket, SystemClock()), 0, time.monotonic() + SETTLE_S
        try:
            while True:
                (dram,) = [tier for tier in admin.status().tiers if tier.tier == Tier.DRAM.value]
                if not dram.used or time.monotonic() > until:
                    return Evicted(gone, dram.used)
                gone += admin.evict(Tier.DRAM, dram.capacity, SETTLE_S)
                time.sleep(_POLL_S)
        except (StoreUnavailable, DeadlineExceeded) as error:
            raise BadAnswer(f"the store does not evict: {error}") from error
        finally:
            admin.close()


def conversation(plan: TurnsPlan) -> list[int]:
    """All tokens of the conversation; turn N asks with the first N * `grow` of them."""
    return _tokens(random.Random(f"turns {plan.seed}"), plan.turns * plan.grow)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(model.VOCABULARY // 64, model.VOCABULARY) for _ in range(count)]


def run_turns(
    target: ServerTarget, plan: TurnsPlan, memory: Memory, block_bytes: int, say: Say, *, every: bool
) -> TurnsRun:
    """Hold the conversation with a running target, pushing it out before each turn: every turn, or those that are
    compared. Raises `BadAnswer`.
    """
    found, text = TurnsRun(), conversation(plan)
    rng = random.Random(f"fillers {plan.seed} {target.name}")
    for number in range(1, plan.turns + 1) if every else compared(plan):
        push_out(target, plan, rng)
        evicted = memory.empty()
        turn = _ask(target, plan, text[: number * plan.grow], block_bytes)
        turn.evicted_bytes, turn.left_in_dram_bytes = evicted.bytes, evicted.left
        found.turns[number] = turn
        say(f"{target.name} turn {number} of {plan.turns}: {_said(turn)}")
    found.gauges = gauges(target)
    return found


def run_restarted(target: ServerTarget, plan: TurnsPlan, say: Say) -> TurnsRun:
    """Start the target anew for each turn that is compared, and end it. One short prompt of other tokens comes first,
    so that what a server does at its first request is not counted. Raises `BadAnswer`.
    """
    found, text = TurnsRun(), conversation(plan)
    rng = random.Random(f"fillers {plan.seed} {target.name}")
    for number in compared(plan):
        say(f"{target.name}: starting")
        try:
            start_s = target.start()
            target.run([Ask(tuple(_tokens(rng, 64)), 2)])
            turn = _ask(target, plan, text[: number * plan.grow], 0)
        finally:
            target.stop()
        turn.start_s = start_s
        found.turns[number] = turn
        say(f"{target.name} turn {number} of {plan.turns}: {_said(turn)} after {start_s:.1f} s of start")
    return found


def compared(plan: TurnsPlan) -> list[int]:
    """Those turns that there are; the last one when there are none."""
    return [turn for turn in plan.compared if turn <= plan.turns] or [plan.turns]


def _ask(target: ServerTarget, plan: TurnsPlan, prompt: list[int], block_bytes: int) -> Turn:
    before, blocks = reused(target), loaded(target)
    trace = target.run([Ask(tuple(prompt), plan.output)])[0]
    return Turn(
        len(prompt),
        round(trace.arrivals[0][0] - trace.sent_s, 5),
        risen(before, reused(target)),
        {tier: count * block_bytes for tier, count in risen(blocks, loaded(target)).items()},
    )


def risen(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What counters rose by, without those that did not."""
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value > before.get(name, 0.0)}


def _said(turn: Turn) -> str:
    reused_, bytes_ = turn.reused_tokens, sum(turn.loaded_bytes.values())
    said = f"{turn.tokens} tokens, {turn.ttft_s * 1000:.0f} ms"
    return f"{said}, reused {json.dumps(reused_)}, {bytes_ / 1e6:.1f} MB loaded" if reused_ else said


def times(run: TurnsRun) -> dict[int, float]:
    """Seconds to the first token by turn."""
    return {number: turn.ttft_s for number, turn in run.turns.items()}


def not_from_disk(run: TurnsRun) -> list[int]:
    """Turns after the first for which something came from elsewhere than NVMe, or nothing was reused."""
    return [number for number, turn in run.turns.items() if number > 1 and not turn.from_disk]


def push_out(target: ServerTarget, plan: TurnsPlan, rng: random.Random) -> None:
    """Ask other prompts until nothing else is left on the device; wait until all is written behind."""
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


def loaded(target: ServerTarget) -> dict[str, float]:
    """Blocks loaded from the store since the start, by tier."""
    found: dict[str, float] = {}
    for event, reason, tier, value in _BLOCKS.findall(target.page("/metrics") or ""):
        if event == "load" and reason == "hit":
            found[tier] = found.get(tier, 0.0) + float(value)
    return found


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
        before = sum(loaded(target).values())
        traces = target.run([*asks, *returns])
        seen = figures(traces[: plan.decoders])
        bytes_ = (sum(loaded(target).values()) - before) * block_bytes
        row = {
            "returns_per_s": rate,
            "loaded_bytes_per_s": round(bytes_ / seen.seconds),
            "gap_p50_s": round(seen.gap_p50_s, 5),
            "gap_p99_s": round(seen.gap_p99_s, 5),
            "decode_per_s": round(seen.decode_per_s, 2),
        }
        speed, p99 = bytes_ / seen.seconds / 1e6, seen.gap_p99_s * 1000
        say(f"{target.name}, {rate:g} returns/s: {speed:.0f} MB/s, p99 {p99:.1f} ms")
        rows.append(row)
    return rows
