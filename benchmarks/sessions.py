"""Multi-turn loads for the benchmarks of reuse: sessions whose requests follow one another after a time of thought.

`chats` makes seeded chats: shared system prompts, several turns, regenerated answers, edited earlier messages.
`agents` reads recorded coding-agent sessions (see `read_agents`). Both give what to send and what is answered, so that
the next prompt goes on from the last answer.
"""

import json
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB = 1 << 30


@dataclass(frozen=True)
class Turn:
    """One request: sent `think_s` after the answer to the one before. Tokens are made when asked for: they are long."""

    think_s: float
    tokens: Callable[[], tuple[list[int], list[int]]]
    """Prompt and answer."""


@dataclass(frozen=True)
class Session:
    """Requests one after the other, the first at `start_s`."""

    start_s: float
    turns: list[Turn]


CHAT = {
    "system_prompts": 8,
    "system_tokens": [200, 1600],
    "turns_mean": 6,
    "user_tokens_median": 60,
    "answer_tokens_median": 60,
    "regenerated": 0.12,
    "edited": 0.08,
    "think_s_mean": 30,
    "sessions_per_s": 0.25,
}


def chats(seed: int, count: int) -> list[Session]:
    """`count` chats that start at random times (Poisson), as `CHAT` says."""
    rng = random.Random(f"chats/{seed}")
    systems = [_words(rng, rng.randint(*CHAT["system_tokens"])) for _ in range(CHAT["system_prompts"])]
    popularity = [1 / (rank + 1) for rank in range(len(systems))]
    sessions, start = [], 0.0
    for _ in range(count):
        start += rng.expovariate(CHAT["sessions_per_s"])
        history = list(rng.choices(systems, popularity)[0])
        sessions.append(Session(start, _chat(rng, history)))
    return sessions


def _chat(rng: random.Random, history: list[int]) -> list[Turn]:
    turns: list[Turn] = []
    before: list[list[int]] = []
    for _ in range(min(20, 1 + int(rng.expovariate(1 / CHAT["turns_mean"])))):
        if before and rng.random() < CHAT["edited"]:
            history = rng.choice(before)
        before.append(history)
        prompt = history + _words(rng, _length(rng, CHAT["user_tokens_median"]))
        answer = _words(rng, _length(rng, CHAT["answer_tokens_median"]))
        turns.append(_turn(rng, prompt, answer))
        if rng.random() < CHAT["regenerated"]:
            answer = _words(rng, _length(rng, CHAT["answer_tokens_median"]))
            turns.append(_turn(rng, prompt, answer))
        history = prompt + answer
    return turns


def _turn(rng: random.Random, prompt: list[int], answer: list[int]) -> Turn:
    return Turn(rng.expovariate(1 / CHAT["think_s_mean"]), lambda: (prompt, answer))


def _words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def _length(rng: random.Random, median: int) -> int:
    return max(4, min(8 * median, int(median * rng.lognormvariate(0, 0.8))))


AGENTS_BLOCK = 64
MAX_ANSWER = 160


def read_agents(folder: Path, seed: int, count: int, requests: int) -> list[Session]:
    """The first `requests` requests of `count` random sessions of `folder`/sessions.jsonl.zst, starts uniform over half
    an hour, times of thought as recorded. Sub-agents are left out.

    A block of the record is 64 tokens that stand for its id, so the engine's blocks have 64 tokens, too. The record has
    ids of full blocks of prompts only: answers, and what of a prompt is beyond its last full block, are taken to be
    what the next prompt has in their place (or are unique). At most 160 tokens of an answer are generated.
    """
    rng = random.Random(f"agents/{seed}")
    path = folder / "sessions.jsonl.zst"
    lines = subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=True).stdout.splitlines()
    sessions = []
    for place in sorted(rng.sample(range(len(lines)), count)):
        recorded = [r for r in json.loads(lines[place])["requests"] if r["type"] in "ns"][:requests]
        turns = [_recorded(place, index, recorded) for index in range(len(recorded))]
        sessions.append(Session(rng.uniform(0, 1800), turns))
    return sessions


def _recorded(session: int, index: int, recorded: list[dict[str, Any]]) -> Turn:
    request = recorded[index]
    return Turn(min(float(request["think_time"]), 3600.0), lambda: _tokens(session, index, recorded))


def _tokens(session: int, index: int, recorded: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    length, answer = recorded[index]["in"], min(max(1, recorded[index]["out"]), MAX_ANSWER)
    tokens = _filled(session, recorded[index]["hash_ids"])[:length]
    full = len(tokens)
    end = length + answer
    follows = _filled(session, recorded[index + 1]["hash_ids"]) if index + 1 < len(recorded) else []
    if follows[:full] == tokens:
        tokens += follows[full:end]
    unique = (1 << 29) + (session * 1000 + index) * 4096
    tokens += [(unique + position) % VOCAB for position in range(end - len(tokens))]
    return tokens[:length], tokens[length:end]


def _filled(session: int, ids: list[int]) -> list[int]:
    return [token for id_ in ids for token in (session, id_, *([0] * (AGENTS_BLOCK - 2)))]
