"""Conversations and tools in the shape that chat templates expect: OpenAI's, as transformers hands it on.

Rules. A call's arguments are an object to the template, and `tojson` writes them as they came, so that a conversation
that is sent back renders to the tokens that the model wrote (and finds its state); arguments that are no JSON object
stay a string. A message without text has the empty string, which every template can add to something; only templates
that ask whether the content of a calling assistant is none are given none. Ids of calls are shortened to 9 letters and
digits for templates that insist on it (Mistral).

Text is text: special tokens typed into a message, a tool's answer or description do not become special tokens. Each is
split by `GUARD`, a character that Unicode keeps for use within programs; the tokenizer drops it after it has looked for
special tokens (`worker`), so the model reads the text as it was typed.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from isthmus.contracts.errors import TooLarge
from isthmus.contracts.prompting import ChatMessage, ChatOptions, ToolCall, ToolDefinition, ToolMode

GUARD = "\ufdd0"
_REPLACED = "\ufffd"
MAX_VALUE_DEPTH = 128
CALL_ID_CHARS = 9
_ASKS_FOR_NONE = re.compile(r"""content["']?\]?\s+is\s+(not\s+)?none""")
_SHORT_ID = re.compile(rf"[A-Za-z0-9]{{{CALL_ID_CHARS}}}")
_ASKS_FOR_SHORT_IDS = re.compile(rf"length\s*(!=|==)\s*{CALL_ID_CHARS}\b")


class Arguments(dict[str, Any]):
    """Arguments of a call that know how they were written."""

    def __init__(self, values: dict[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text


class Shaper:
    """Shapes conversations for one template. `specials` are the special tokens of the tokenizer."""

    def __init__(self, source: str, specials: Sequence[str]) -> None:
        # Models that do not know the newer role would drop such a message without a word; to them it is `system`.
        self._knows_developer = "developer" in source
        self._wants_none = _ASKS_FOR_NONE.search(source) is not None
        self._short_ids = _ASKS_FOR_SHORT_IDS.search(source) is not None
        longest_first = sorted((text for text in specials if text), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def values(self, messages: Sequence[ChatMessage], options: ChatOptions) -> dict[str, Any]:
        """What the template gets. Raises `TooLarge` for arguments or schemas that are nested too deeply."""
        offered = options.tools if options.choice.mode is not ToolMode.NONE else ()
        values: dict[str, Any] = {
            "messages": [self._message(message) for message in messages],
            "tools": [self._tool(tool) for tool in offered] or None,
            "add_generation_prompt": options.add_generation_prompt,
        }
        if options.thinking is not None:
            values["enable_thinking"] = options.thinking
        return values

    def _message(self, message: ChatMessage) -> dict[str, Any]:
        role = message.role if message.role != "developer" or self._knows_developer else "system"
        fields: dict[str, Any] = {"role": role, "content": self._plain(message.content)}
        if message.name is not None:
            fields["name"] = self._plain(message.name)
        if message.tool_call_id is not None:
            fields["tool_call_id"] = self._call_id(message.tool_call_id)
        if message.reasoning is not None:
            fields["reasoning_content"] = self._plain(message.reasoning)
        if message.tool_calls:
            fields["tool_calls"] = [self._call(call) for call in message.tool_calls]
            if not message.content and self._wants_none:
                fields["content"] = None
        return fields

    def _call(self, call: ToolCall) -> dict[str, Any]:
        function = {"name": self._plain(call.name), "arguments": self._arguments(call.arguments)}
        return {"id": self._call_id(call.id), "type": "function", "function": function}

    def _arguments(self, text: str) -> Arguments | str:
        try:
            values = json.loads(text or "{}")
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            return self._plain(text)
        return Arguments(self._plain_values(values, "messages.tool_calls"), self._plain(text or "{}"))

    def _tool(self, tool: ToolDefinition) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self._plain(tool.name)}
        if tool.description:
            function["description"] = self._plain(tool.description)
        function["parameters"] = self._plain_values(json.loads(tool.parameters), "tools.parameters")
        return {"type": "function", "function": function}

    def _call_id(self, text: str) -> str:
        if not self._short_ids or _SHORT_ID.fullmatch(text):
            return self._plain(text)
        digest = hashlib.sha256(text.encode(errors="replace")).digest()
        return base64.b32encode(digest).decode()[:CALL_ID_CHARS]

    def _plain_values(self, value: Any, field: str, depth: int = 0) -> Any:
        """`value` with every string in it made plain."""
        if depth > MAX_VALUE_DEPTH:
            raise TooLarge(f"{field} is nested deeper than {MAX_VALUE_DEPTH}", field)
        if isinstance(value, str):
            return self._plain(value)
        if isinstance(value, list):
            return [self._plain_values(one, field, depth + 1) for one in value]
        if isinstance(value, dict):
            return {self._plain(key): self._plain_values(one, field, depth + 1) for key, one in value.items()}
        return value

    def _plain(self, text: str) -> str:
        """`text` with `GUARD` after the first character of every special token in it."""
        text = text.replace(GUARD, _REPLACED)
        if self._specials is None or self._specials.search(text) is None:
            return text
        return self._specials.sub(lambda match: match[0][0] + GUARD + match[0][1:], text)
