"""State snapshots of hybrid models: hit tokens a MiB of snapshot memory, by policy and number of slots.

The real scheduler on a simulated clock, over a runner that computes nothing and answers as the load says. Policies:
`turns` (turn ends and shared branch points), `every-block`, `last-only`. KV blocks are ample, so that only snapshots
limit reuse; `ceiling` is the share of prompt tokens whose blocks match: what an attention model would reuse.
`python -m benchmarks.snapshots --help`.
"""

import argparse
import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common import Run
from benchmarks.sessions import AGENTS_BLOCK, CHAT, MAX_ANSWER, VOCAB, Session, chats, read_agents
from isthmus.contracts.clock import ManualClock
from isthmus.contracts.events import ModelInfo, StateInfo
from isthmus.contracts.ids import Namespace, RequestId
from isthmus.contracts.keys import PrefixScope
from isthmus.contracts.layout import Codec, Dtype
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import Batch, SliceResult, StepResult
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.settings import SNAPSHOT_POLICIES, SchedulerSettings
from isthmus.execution.inference.snapshots import Snapshot

SCOPE = PrefixScope(Namespace(b"\x09" * 32), "hybrid")
GRID = 64
STEP_S = 0.02
TOKEN_S = 1e-4
RUNNING = 32

# Qwen3-Next-80B: 48 layers, every fourth with attention.
QWEN3_NEXT = {
    "linear_layers": 36,
    "attention_layers": 12,
    "key_heads": 16,
    "value_heads": 32,
    "linear_head_dim": 128,
    "conv_kernel": 4,
    "kv_heads": 2,
    "head_dim": 256,
}


def state_size(dims: dict[str, int]) -> dict[str, float]:
    """Bytes of one state (float32), of the KV of one token (bf16), and the tokens whose KV is as large as one state."""
    size = dims["linear_head_dim"]
    channels = (2 * dims["key_heads"] + dims["value_heads"]) * size
    layer = 4 * (dims["value_heads"] * size * size + channels * (dims["conv_kernel"] - 1))
    state = dims["linear_layers"] * layer
    token = 2 * dims["attention_layers"] * dims["kv_heads"] * dims["head_dim"] * 2
    return {"state_bytes": state, "kv_bytes_per_token": token, "tokens_of_kv_per_state": round(state / token)}


class ScriptRunner:
    """A `Runner` that computes nothing: it answers from a script and says how long the step would take."""

    def __init__(self, info: ModelInfo, clock: ManualClock) -> None:
        self.info = info
        self.answers: dict[str, list[int]] = {}
        self._clock = clock

    def execute(self, batch: Batch) -> "ScriptStep":
        self._clock.advance(STEP_S + TOKEN_S * batch.tokens)
        results = []
        for part in batch.slices:
            task = part.sample
            results.append(SliceResult() if task is None else SliceResult([self.answers[part.request_id][task.index]]))
        return ScriptStep(StepResult(results))

    def close(self) -> None:
        pass


@dataclass
class ScriptStep:
    """Done at once."""

    step: StepResult

    def done(self) -> bool:
        return True

    def when_done(self, call: Callable[[], None]) -> None:
        call()

    def cancel(self) -> bool:
        return False

    def result(self) -> StepResult:
        return self.step


def make_info(block_tokens: int, blocks: int, slots: int) -> ModelInfo:
    """A hybrid model with ample blocks; without slots an attention model."""
    size = state_size(QWEN3_NEXT)
    return ModelInfo(
        name="hybrid",
        model_type="qwen3_next",
        dtype=Dtype.BF16,
        device="none",
        exact=False,
        parameters=1,
        vocab_size=VOCAB,
        max_model_len=1 << 24,
        weights=b"w" * 32,
        layers=QWEN3_NEXT["attention_layers"],
        kv_heads=QWEN3_NEXT["kv_heads"],
        head_dim=QWEN3_NEXT["head_dim"],
        block_tokens=block_tokens,
        block_bytes=block_tokens * int(size["kv_bytes_per_token"]),
        blocks=blocks,
        codec=Codec.RAW,
        eos_token_ids=[],
        states=StateInfo(slots, int(size["state_bytes"]), GRID) if slots else None,
    )


def replay(sessions: list[Session], info: ModelInfo, policy: str) -> dict[str, Any]:
    """Run the sessions to their ends. Counts, and the most slots that were in use."""
    clock = ManualClock()
    runner = ScriptRunner(info, clock)
    settings = SchedulerSettings(max_running=RUNNING, max_waiting=1 << 16, snapshots=policy)
    core = EngineCore(runner, settings, clock)  # type: ignore[arg-type]
    due = [(session.start_s, place, 0) for place, session in enumerate(sessions)]
    heapq.heapify(due)
    peak = 0
    while due or not core.idle:
        if core.idle:
            clock.advance(max(0.0, due[0][0] - clock.monotonic()))
        while due and due[0][0] <= clock.monotonic():
            _, place, turn = heapq.heappop(due)
            prompt, answer = sessions[place].turns[turn].tokens()
            name = RequestId(f"{place}.{turn}")
            runner.answers[name] = answer
            params = SamplingParams(max_tokens=len(answer), seed=0, ignore_eos=True)
            refused = core.submit(EngineRequest(name, SCOPE, prompt, params))
            if refused is not None:
                raise RuntimeError(f"{name} was refused: {refused.error}")
        for output in core.step():
            if output.finish is not None:
                del runner.answers[output.request_id]
                place, turn = (int(part) for part in output.request_id.split("."))
                if turn + 1 < len(sessions[place].turns):
                    think = sessions[place].turns[turn + 1].think_s
                    heapq.heappush(due, (clock.monotonic() + think, place, turn + 1))
                stats = core.stats()
                peak = max(peak, stats.states_total - stats.states_free)
    core.check()
    stats = core.stats()
    names = ("prompt_tokens", "cached_tokens", "computed_tokens", "preemptions", "dedup_waits", "finished")
    counts = {name: getattr(stats, name) for name in (*names, "snapshots_taken", "snapshots_evicted", "snapshot_hits")}
    return {**counts, "slots_used": peak, "seconds": round(clock.monotonic(), 1)}


@contextmanager
def by_age_alone() -> Iterator[None]:
    """Evict the least recently used snapshot, whatever it saves."""
    worth = Snapshot.saved_blocks
    Snapshot.saved_blocks = property(lambda snapshot: 0)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Snapshot.saved_blocks = worth  # type: ignore[method-assign]


def compare(name: str, sessions: list[Session], block_tokens: int, budgets: list[int]) -> dict[str, Any]:
    """Every policy at every number of slots, and what an attention model would reuse."""
    tokens = 0
    for session in sessions:
        for turn in session.turns:
            prompt, answer = turn.tokens()
            tokens += len(prompt) + len(answer) + block_tokens
    info = make_info(block_tokens, -(-tokens // block_tokens), 0)
    state = state_size(QWEN3_NEXT)["state_bytes"] / 2**20
    ceiling = replay(sessions, info, "turns")
    print(f"{name}: ceiling {ceiling['cached_tokens'] / ceiling['prompt_tokens']:.3f}")
    rows = []
    for slots in budgets:
        sized = replace_states(info, slots)
        variants = [(policy, False) for policy in SNAPSHOT_POLICIES] + [(SNAPSHOT_POLICIES[0], True)]
        for policy, aged in variants:
            if aged:
                with by_age_alone():
                    counts = replay(sessions, sized, policy)
            else:
                counts = replay(sessions, sized, policy)
            row = {
                "slots": slots,
                "policy": policy,
                "eviction": "age" if aged else "worth",
                "hit_rate": round(counts["cached_tokens"] / counts["prompt_tokens"], 4),
                "hit_tokens_per_mib": round(counts["cached_tokens"] / (slots * state), 2),
                "hit_tokens_per_mib_used": round(counts["cached_tokens"] / (counts["slots_used"] * state), 2),
                **counts,
            }
            rows.append(row)
            print(row)
    return {"ceiling": ceiling, "rows": rows, "ratios": ratios(rows)}


def replace_states(info: ModelInfo, slots: int) -> ModelInfo:
    """`info` with this many slots."""
    return msgspec.structs.replace(info, states=StateInfo(slots, int(state_size(QWEN3_NEXT)["state_bytes"]), GRID))


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hit tokens of `turns` over those of each other policy, at equal slots (so: equal MiB)."""
    found = []
    for row in rows:
        if (row["policy"], row["eviction"]) != ("turns", "worth"):
            others = [
                r for r in rows if r["slots"] == row["slots"] and (r["policy"], r["eviction"]) == ("turns", "worth")
            ]
            other = f"{row['policy']}/{row['eviction']}"
            ratio = others[0]["cached_tokens"] / max(1, row["cached_tokens"])
            found.append({"slots": row["slots"], "turns_over": other, "hit_tokens": round(ratio, 3)})
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run and write benchmarks/results/snapshots.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=60, help="synthetic chats (default 60)")
    parser.add_argument("--slots", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--traces", type=Path, help="a folder with sessions.jsonl.zst of recorded agents (needs zstd)")
    parser.add_argument("--trace-sessions", type=int, default=6)
    parser.add_argument("--trace-requests", type=int, default=12, help="of each recorded session, at most")
    parser.add_argument("--trace-slots", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    settings = {
        "model": {**QWEN3_NEXT, **state_size(QWEN3_NEXT)},
        "grid_tokens": GRID,
        "step_s": STEP_S,
        "token_s": TOKEN_S,
        "max_running": RUNNING,
        "chats": {"sessions": options.sessions, "block_tokens": 16, **CHAT},
        "agents": {
            "sessions": options.trace_sessions if options.traces else 0,
            "requests_each": options.trace_requests,
            "block_tokens": AGENTS_BLOCK,
            "answer_tokens_at_most": MAX_ANSWER,
            "starts": "uniform over 1800 s",
        },
    }
    run = Run("snapshots", options.seed, settings)
    results = {"chats": compare("chats", chats(options.seed, options.sessions), 16, options.slots)}
    run.write(results)
    if options.traces:
        recorded = read_agents(options.traces, options.seed, options.trace_sessions, options.trace_requests)
        results["agents"] = compare("agents", recorded, AGENTS_BLOCK, options.trace_slots)
        run.write(results)


if __name__ == "__main__":
    main()
