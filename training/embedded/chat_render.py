"""Renders conversations with the chat template that ships with the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from training.embedded.world import MARK_CLOSE, MARK_OPEN

Message = dict[str, Any]
Tool = dict[str, Any]

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
THINK, THINK_END = "<think>", "</think>"
_ANSWER = re.compile(rf"(?<=<\|assistant\|>)({THINK})?(.*?<\|end\|>)", re.DOTALL)
# The template drops the reasoning of earlier turns; in a lesson it stands where the model writes it.
_HELD, _HELD_END = "\x03", "\x04"


class Renderer:
    """Turns messages into the text that the model reads, as `transformers` would."""

    def __init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template: jinja2.Template = environment.from_string(TEMPLATE.read_text().strip())

    def prompt(self, messages: list[Message], tools: list[Tool] | None = None, *, thinking: bool = False) -> str:
        """The text after which the assistant is to speak."""
        return self._template.render(
            messages=messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
        )

    def conversation(self, messages: list[Message], tools: list[Tool] | None = None) -> str:
        """The text of a conversation so far, with nobody's turn begun."""
        return self._template.render(messages=messages, tools=tools, add_generation_prompt=False)

    def lesson(self, messages: list[Message], tools: list[Tool] | None = None) -> str:
        """A whole conversation without the opening bos, everything that the assistant says marked.

        What a message holds as ``reasoning_content`` comes before its answer; the tag that opens it is part of the
        prompt, so it is not marked: nothing teaches the model to think unasked.
        """
        shown = [_with_reasoning(message) for message in messages]
        text = self.conversation(shown, tools).removeprefix("<|bos|>")
        text = text.replace(_HELD, THINK).replace(_HELD_END, THINK_END)
        return _ANSWER.sub(lambda m: f"{m.group(1) or ''}{MARK_OPEN}{m.group(2)}{MARK_CLOSE}", text)


def _with_reasoning(message: Message) -> Message:
    if not message.get("reasoning_content"):
        return message
    content = message.get("content") or ""
    return {**message, "content": f"{_HELD}{message['reasoning_content']}{_HELD_END}{content}"}
