"""Sample conversations with a model, answered greedily: the failures stay in."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer
from training.embedded.chat_render import Message, Renderer, Tool
from training.embedded.generate import greedy
from training.embedded.models import Network

_MOST = 120
_LIGHTHOUSE = "The old lighthouse was built in 1871 by Maren Olsen. It stands in Bergen and is 31 metres high."
_PEOPLE = "Greta Holm lives in Porto. Greta Holm works as a painter. Tom Reed lives in Oslo and plays the harp."
EXCHANGES: tuple[tuple[str, ...], ...] = (
    ("Hello!", "Who are you?", "What can you do?", "Thank you!"),
    ("My name is Greta and I live in Porto.", "What is 3 + 4?", "Where do I live?", "What is my name?"),
    ("The pass key is 48213. Remember it.", "What is a dog?", "What is the pass key?"),
    ("Remember these: Falcon: 7719, Comet: 3054, Willow: 8826", "What is the value of Comet?"),
    (f"Passage: {_LIGHTHOUSE}\nWho built the lighthouse?", "How high is it?", "How much does a ticket cost?"),
    (f"Passage: {_PEOPLE}\nWhere does Tom Reed live?", "What does Greta Holm work as?", "What does Tom Reed work as?"),
    ("What is the capital of Portugal?", "Who won the election?"),
    ("What is a database?", "Count from 3 to 9.", "Spell harbor."),
    ("Repeat after me: the quiet fox crossed the narrow bridge.",),
    ("Tell me about cats.", "Name three colours."),
    ("I am tired today.", "Goodbye!"),
)
_RESULTS = {
    "get_weather": {"temperature": 17, "condition": "sunny"},
    "find_person": {"city": "Lisbon", "room": 214},
    "play": {"status": "playing"},
}


def _tool(name: str, about: str, /, **parameters: str) -> Tool:
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS = [
    _tool("get_weather", "The weather in a city", city="string"),
    _tool("find_person", "Where a person lives", name="string"),
    _tool("play", "Play a song at a volume", title="string", volume="integer"),
]
ERRANDS = (
    "What is the weather in Rome?",
    "Play Silver River at volume 7.",
    "What is the weather in the city where Maria Holm lives?",
    "Thank you!",
)


def transcript(model: Network, tokenizer: Tokenizer, stops: set[int]) -> list[list[Message]]:
    """The sample exchanges, and errands for which tools are offered."""
    renderer, found = Renderer(), []

    def say(messages: list[Message], tools: list[Tool] | None = None) -> str:
        prompt = tokenizer.encode(renderer.prompt(messages, tools)).ids
        return str(tokenizer.decode(greedy(model, prompt, _MOST, stops)))

    for turns in EXCHANGES:
        messages: list[Message] = []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": say(messages)})
        found.append(messages)
    for errand in ERRANDS:
        messages = [{"role": "user", "content": errand}]
        for _ in range(3):
            messages.append({"role": "assistant", "content": say(messages, TOOLS)})
            calls = re.findall(r"<tool_call>(.*?)</tool_call>", messages[-1]["content"])
            if not calls:
                break
            messages += [{"role": "tool", "content": json.dumps(_result(call))} for call in calls]
        found.append(messages)
    return found


def _result(call: str) -> dict[str, Any]:
    try:
        name = json.loads(call)["name"]
    except (ValueError, KeyError, TypeError):
        return {"error": "no such tool"}
    return dict(_RESULTS.get(name, {"error": "no such tool"}))
