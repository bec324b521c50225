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

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_ANSWER = re.compile(r"(?<=<\|assistant\|>)(.*?<\|end\|>)", re.DOTALL)


class Renderer:
    """Turns messages into the text that the model reads, as `transformers` would."""

    def __init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template: jinja2.Template = environment.from_string(TEMPLATE.read_text().strip())

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The text after which the assistant is to speak."""
        return self._template.render(messages=messages, tools=tools, add_generation_prompt=True)

    def lesson(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """A whole conversation without the opening bos, everything that the assistant says marked."""
        text = self._template.render(messages=messages, tools=tools, add_generation_prompt=False)
        return _ANSWER.sub(MARK_OPEN + r"\1" + MARK_CLOSE, text.removeprefix("<|bos|>"))
