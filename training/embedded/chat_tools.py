"""Conversations in which a tool is called: the call, its result, and what is made of it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from training.embedded.chat_render import Message
from training.embedded.chat_tasks import SYSTEMS, small_talk
from training.embedded.recall import digits
from training.embedded.world import World, spin


def _tool(name: str, about: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


@dataclass(frozen=True)
class Offer:
    """A tool, what it is asked about (``@``), and how its result (``#``) is told."""

    tool: dict[str, Any]
    group: str
    ask: str
    result: str
    answer: str


_OFFERS = (
    Offer(
        _tool("get_weather", "The weather in a city", "city"),
        "cities",
        "{What is the weather in|How is the weather in|Tell me the weather in} @?",
        "weather",
        "The weather in @ is #.",
    ),
    Offer(
        _tool("get_time", "The time in a city", "city"),
        "cities",
        "{What time is it in|What is the time in} @?",
        "time",
        "The time in @ is #.",
    ),
    Offer(
        _tool("find_person", "The room of a person", "name"),
        "names",
        "{Where is|Find|Which room is} @?",
        "room",
        "@ is in #.",
    ),
    Offer(
        _tool("get_price", "The price of an article", "article"),
        "foods",
        "{What is the price of|How much is} @?",
        "price",
        "The price of @ is #.",
    ),
    Offer(
        _tool("look_up", "The entry of a word", "word"),
        "common",
        "Look up {the word |}@.",
        "entry",
        "The entry of @ is #.",
    ),
)


def _result(world: World, rng: random.Random, kind: str) -> str:
    if kind == "weather":
        return f"{world.pick(rng, 'weather')}, {rng.randint(-9, 35)} degrees"
    if kind == "time":
        return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"
    if kind == "room":
        return f"room {rng.randint(1, 400)}"
    return digits(rng, 2, 4) if kind == "entry" else f"{rng.randint(1, 90)} euros"


def with_tools(world: World, rng: random.Random) -> tuple[list[Message], list[dict[str, Any]]]:
    """A question that a tool answers: the call, its result, and the answer."""
    offered = rng.sample(_OFFERS, rng.randint(1, 3))
    chosen = rng.choice(offered)
    what, result = world.pick(rng, chosen.group), _result(world, rng, chosen.result)
    function = chosen.tool["function"]
    argument = function["parameters"]["required"][0]
    call = {"function": {"name": function["name"], "arguments": {argument: what}}}
    messages: list[Message] = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.4 else []
    messages += [
        {"role": "user", "content": spin(chosen.ask, rng).replace("@", what)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result if rng.random() < 0.5 else json.dumps({chosen.result: result})},
        {"role": "assistant", "content": chosen.answer.replace("@", what).replace("#", result)},
    ]
    if rng.random() < 0.3:
        question, reply = small_talk(world, rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return messages, [offer.tool for offer in offered]
