"""Held-out probes: recall, copying, passages and tools, each answered exactly or not; and bits per byte.

A probe is answered if every token of its answer is the model's first choice, which is what greedy decoding would
write. Words and values are of the held-out split (``held_out.toml``), prose is of held-out documents.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from training.embedded import chat_calls, chat_data, chat_passages, chat_tools
from training.embedded.chat_render import THINK_END, Message, Renderer, Tool
from training.embedded.chat_tasks import small_talk
from training.embedded.pools import Pool, parse_marks, weigh
from training.embedded.recall import digits, keys
from training.embedded.world import World, mark

Probe = Callable[[World, random.Random, Renderer, int], str]
Logits = Callable[[Tensor], Tensor]
Fitted = tuple[list[int], list[int]]
_TRIES = 50  # of which some are too long: a probe is drawn anew then
_THINKS = "The tool has answered."


def key_value(world: World, rng: random.Random, _renderer: Renderer, filler: int) -> str:
    """Eight pairs, filler, and one question in plain text."""
    table = {k: digits(rng, 4, 5) for k in keys(world, rng, 8)}
    asked = rng.choice(list(table))
    lines = "\n".join(f"The code for {k} is {v}." for k, v in table.items())
    return f"{lines}\n\n{world.fill(rng, filler)}\nThe code for {asked} is{mark(f' {table[asked]}.')}"


def key_value_chat(world: World, rng: random.Random, renderer: Renderer, filler: int) -> str:
    """The same in a conversation."""
    table = {k: digits(rng, 4, 5) for k in keys(world, rng, 8)}
    asked = rng.choice(list(table))
    lines = "\n".join(f"{k}: {v}" for k, v in table.items())
    messages = [
        {"role": "user", "content": f"{lines}\n\n{world.fill(rng, filler)}"},
        {"role": "assistant", "content": "I will remember that."},
        {"role": "user", "content": f"What is the value of {asked}?"},
        {"role": "assistant", "content": f"The value of {asked} is {table[asked]}."},
    ]
    return last_turn(renderer, messages)


def passkey(world: World, rng: random.Random, _renderer: Renderer, filler: int) -> str:
    """A passkey somewhere in filler, asked for in plain text."""
    number, before = digits(rng, 5, 5), int(filler * rng.random())
    text = f"{world.fill(rng, before)} The pass key is {number}. Remember it. {world.fill(rng, filler - before)}"
    return f"{text}\nWhat is the pass key? The pass key is{mark(f' {number}.')}"


def passkey_chat(world: World, rng: random.Random, renderer: Renderer, filler: int) -> str:
    """The same in a conversation."""
    number, before = digits(rng, 5, 5), int(filler * rng.random())
    text = f"{world.fill(rng, before)} The pass key is {number}. Remember it. {world.fill(rng, filler - before)}"
    messages = [
        {"role": "user", "content": f"{text}\nWhat is the pass key?"},
        {"role": "assistant", "content": f"The pass key is {number}."},
    ]
    return last_turn(renderer, messages)


def copying(world: World, rng: random.Random, _renderer: Renderer, filler: int) -> str:
    """Sixteen random words, filler, the first three words, and then the other thirteen."""
    words = [world.pick(rng, "common") for _ in range(16)]
    return f"{' '.join(words)}\n{world.fill(rng, filler)}\n{' '.join(words[:3])}{mark(' ' + ' '.join(words[3:]))}"


def last_turn(
    renderer: Renderer, messages: list[Message], tools: list[Tool] | None = None, *, thinking: bool = False
) -> str:
    """A conversation in which only the assistant's last turn is the answer; with ``thinking`` its thought too."""
    *before, last = messages
    opening = renderer.prompt(before, tools, thinking=thinking)
    turn = renderer.conversation(messages, tools).removeprefix(renderer.prompt(before, tools))
    thought = f"{last.get('reasoning_content', '')}{THINK_END}" if thinking else ""
    return opening.removeprefix("<|bos|>") + mark(thought + turn)


def facts(world: World, rng: random.Random, renderer: Renderer, filler: int) -> str:
    """Three facts told in as many turns, small talk and prose between, and one of them asked for."""
    kinds = chat_data.load_facts()
    messages: list[Message] = []
    told = {}
    # Facts that share their answer for "not told" are about one thing, and would overwrite each other.
    chosen = list({kinds[at]["unknown"]: at for at in rng.sample(range(len(kinds)), len(kinds))}.values())[:3]
    for at in chosen:
        fact = kinds[at]
        value = digits(rng, 3, 6) if fact["values"] == "number" else world.pick(rng, fact["values"])
        told[at] = fact["answer"][0].format(v=value)
        messages += _turn(rng.choice(fact["tell"]).format(v=value), rng.choice(fact["ack"]).format(v=value))
        messages += _turn(*small_talk(world, rng))
    messages += _turn(f"Read this: {world.fill(rng, filler)}", "I have read it.") if filler > 40 else []
    at = rng.choice(chosen)
    return last_turn(renderer, messages + _turn(kinds[at]["ask"][0], told[at]))


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Asked:
    """A conversation about a passage up to the answer, the value asked for, and the passage's other values."""

    messages: list[Message]
    value: str
    others: frozenset[str]


def asked(world: World, rng: random.Random, *, missing: bool = False, new: bool = False) -> Asked:
    """A passage of two to eight sentences and one question about it; ``new``: of relations made up for it."""
    kind = chat_passages.open_kind(world, rng) if new else rng.choice(chat_passages.kinds())
    given = chat_passages.passage(world, rng, rng.randint(2, 8), kind)
    told = rng.choice(given.told)
    question, answer, reason = given.question(rng, told), told.answer, f"The passage tells of {told.subject}."
    if missing:
        question, answer = chat_passages.missing(world, rng, given), chat_passages.REFUSAL
        reason = "The passage does not say it."
    messages: list[Message] = _turn(f"{given.text}\n{question}", answer)
    if rng.random() < 0.5:
        system: Message = {"role": "system", "content": f"Answer from the passage.\n{given.text}"}
        messages = [system, *_turn(question, answer)]
    messages[-1]["reasoning_content"] = reason
    return Asked(messages, told.value, frozenset(one.value for one in given.told) - {told.value})


def passage(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """A question that a passage answers: known relations between unseen subjects and values."""
    return last_turn(renderer, asked(world, rng).messages)


def passage_new(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """The same of relations that were made up for the probe."""
    return last_turn(renderer, asked(world, rng, new=True).messages)


def passage_missing(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """A question that a passage does not answer."""
    return last_turn(renderer, asked(world, rng, missing=True).messages)


def passage_thinking(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """A question that a passage answers, after a thought."""
    return last_turn(renderer, asked(world, rng).messages, thinking=True)


@dataclass(frozen=True)
class Called:
    """A conversation up to a tool's answer, and the values that the result gave."""

    talk: chat_calls.Talk
    values: tuple[str, ...]


def called(world: World, rng: random.Random, *, new: bool = False) -> Called:
    """One to three tools, a request, its call, its result and the answer; ``new``: the tool asked for is a new one."""
    fitting: list[chat_tools.Kind] = []
    while not fitting:
        kinds = chat_calls.offered(world, rng, rng.randint(1, 3))
        fitting = [kind for kind in kinds if kind.pattern != new]
    talk = chat_calls.Talk(kinds, thinking=True)
    asked = chat_tools.request(world, rng, rng.choice(fitting))
    found = chat_tools.outcome(world, rng, asked)
    talk.user(asked.text)
    talk.call(asked)
    talk.tool(found)
    talk.assistant(found.answer, _THINKS)
    return Called(talk, found.values)


def _tool_turn(
    world: World, rng: random.Random, renderer: Renderer, turns: int, *, thinking: bool = False, new: bool = False
) -> str:
    talk = called(world, rng, new=new).talk
    return last_turn(renderer, talk.messages[:turns], talk.tools(), thinking=thinking)


def tool_call(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """A request that one of a few tools answers, an everyday one: the whole call, as JSON, with unseen values."""
    return _tool_turn(world, rng, renderer, 2)


def tool_call_new(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """The same of a tool that was made up for the probe: its name, parameters and purpose are unseen too."""
    return _tool_turn(world, rng, renderer, 2, new=True)


def tool_call_thinking(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """The same with a thought before it."""
    return _tool_turn(world, rng, renderer, 2, thinking=True)


def tool_answer(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """The final answer, which tells what the tool returned."""
    return _tool_turn(world, rng, renderer, 4)


def tool_second(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """Two tools one after another: the second call, which needs the first's result."""
    talk = chat_calls.chained(world, rng)
    return last_turn(renderer, talk.messages[:4], talk.tools())


def tool_none(world: World, rng: random.Random, renderer: Renderer, _filler: int) -> str:
    """A statement to remember, or a request no tool can serve: answered in words."""
    while True:
        talk = chat_calls.Talk(chat_calls.offered(world, rng, rng.randint(1, 3)), thinking=False)
        chat_calls.no_call(world, rng, talk)
        if talk.messages and talk.messages[-1]["content"].startswith(("I have no tool", "I will remember")):
            return last_turn(renderer, talk.messages, talk.tools())


# By length of context: at 256, 512 and 1024 tokens.
PROBES: dict[str, Probe] = {
    "recall": key_value,
    "recall_chat": key_value_chat,
    "passkey": passkey,
    "passkey_chat": passkey_chat,
    "facts": facts,
    "copying": copying,
}
# Of their own length, which is under 512 tokens.
SKILLS: dict[str, Probe] = {
    "passage": passage,
    "passage_new": passage_new,
    "passage_missing": passage_missing,
    "passage_thinking": passage_thinking,
    "tool_call": tool_call,
    "tool_call_new": tool_call_new,
    "tool_call_thinking": tool_call_thinking,
    "tool_answer": tool_answer,
    "tool_second": tool_second,
    "tool_none": tool_none,
}
# What a run reports of itself now and then: name, and length.
_QUICK = (
    ("recall", 256),
    ("recall", 1024),
    ("recall_chat", 512),
    ("recall_chat", 1024),
    ("passkey_chat", 1024),
    ("facts", 512),
)


@dataclass(frozen=True)
class Answered:
    """How a probe went: exact answers and right tokens, out of how many; and answers that begin with a refusal."""

    exact: float
    tokens: float
    count: int
    refused: float = 0.0


def fit(probe: Probe, world: World, rng: random.Random, tokenizer: Tokenizer, length: int) -> Fitted:
    """One probe of at most ``length`` tokens and, if it has filler, close to it: ids and the answer's positions.

    Raises ``ValueError`` when probes of this kind are longer than that.
    """
    renderer = Renderer()
    for _ in range(_TRIES):
        filler, state = length * 4, rng.getstate()
        while filler >= 0:
            rng.setstate(state)
            text, spans = parse_marks("<|bos|>" + probe(world, rng, renderer, filler))
            encoding = tokenizer.encode(text)
            if len(encoding.ids) <= length:
                weights = weigh(encoding.offsets, spans, 1, 0)
                return encoding.ids, np.flatnonzero(weights).tolist()
            shorter = filler - (len(encoding.ids) - length) * 3 - 20
            filler = max(shorter, filler // 2) if filler > 1 else -1
    raise ValueError(f"no probe of {length} tokens or fewer in {_TRIES} tries")


@torch.no_grad()
def hits(made: list[Fitted], logits: Logits) -> list[list[int]]:
    """For each probe the first choices at its answer's positions; what is computed together is of similar length."""
    order = sorted(range(len(made)), key=lambda at: len(made[at][0]))
    found: list[list[int]] = [[] for _ in made]
    for at in range(0, len(order), 4):
        chunk = order[at : at + 4]
        tokens = torch.zeros(len(chunk), max(len(made[one][0]) for one in chunk), dtype=torch.long)
        for row, one in enumerate(chunk):
            tokens[row, : len(made[one][0])] = torch.tensor(made[one][0])
        best = logits(tokens).argmax(-1)
        for row, one in enumerate(chunk):
            found[one] = [int(best[row, position - 1]) for position in made[one][1]]
    return found


def ask(
    probe: Probe, world: World, tokenizer: Tokenizer, logits: Logits, length: int, count: int, seed: int
) -> Answered:
    """Asks ``count`` probes of at most ``length`` tokens."""
    rng = random.Random(seed * 100_003 + length)
    refusal = tokenizer.encode(chat_passages.REFUSAL).ids[0]
    made = [fit(probe, world, rng, tokenizer, length) for _ in range(count)]
    exact = right = total = refused = 0
    for (ids, answer), best in zip(made, hits(made, logits), strict=True):
        same = [token == ids[position] for token, position in zip(best, answer, strict=True)]
        exact, right, total = exact + all(same), right + sum(same), total + len(same)
        refused += best[0] == refusal
    return Answered(exact / count, right / max(1, total), count, refused / count)


def quick(world: World, tokenizer: Tokenizer, logits: Logits, count: int = 12, seed: int = 7) -> dict[str, float]:
    """A few probes of each kind, for a run's report: shares of exact answers, and of right tokens."""
    asked = [(f"{name}@{length}", PROBES[name], length) for name, length in _QUICK]
    asked += [
        (name, SKILLS[name], 512)
        for name in ("passage", "passage_missing", "tool_call", "tool_call_new", "tool_answer")
    ]
    found = {}
    for name, probe, length in asked:
        answered = ask(probe, world, tokenizer, logits, length, count, seed)
        found[name], found[f"{name}.tokens"] = answered.exact, answered.tokens
    return found


@torch.no_grad()
def bits_per_byte(pool: Pool, tokenizer: Tokenizer, logits: Logits, length: int, windows: int) -> float:
    """Held-out documents in windows of ``length`` tokens: bits for each byte of text."""
    bos, bits, size = tokenizer.token_to_id("<|bos|>"), 0.0, 0
    for at in range(0, min(windows * length, len(pool.tokens) - length), length):
        ids = pool.tokens[at : at + length].astype(np.int64)
        tokens = torch.from_numpy(ids)[None]
        inputs = torch.cat((torch.tensor([[bos]]), tokens[:, :-1]), 1)
        loss = torch.nn.functional.cross_entropy(logits(inputs)[0].float(), tokens[0], reduction="sum")
        bits += float(loss) / np.log(2)
        size += len(tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode())
    return bits / size
