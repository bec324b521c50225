"""The prompting plane's front: implements `ports.Prompting` for a Hugging Face model folder.

Text to tokens goes through the helper processes (`pool`); tokens to text is a table lookup here (`vocabulary`),
because it is cheap, exact and needed for every token. Never imports torch, nor the tokenizers library.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from isthmus.contracts.clock import Clock
from isthmus.contracts.constraints import Constraint
from isthmus.contracts.errors import InvalidInput, TooLarge, Unsupported
from isthmus.contracts.prompting import (
    MAX_MESSAGES,
    MAX_TEXT_BYTES,
    PROMPT_TAIL_TOKENS,
    ChatMessage,
    ChatOptions,
    OutputParse,
    ToolDefinition,
)
from isthmus.contracts.sampling import TextParams
from isthmus.execution.prompting.assembler import Assembler, Detokenizer
from isthmus.execution.prompting.dialects import AUTO, Dialect, Opening, detect, opening
from isthmus.execution.prompting.folder import TextFiles, read_text_files
from isthmus.execution.prompting.grammar import chat_constraint
from isthmus.execution.prompting.messages import Encode, Render
from isthmus.execution.prompting.pool import HelperPool, PoolSettings, PoolStats, text_bytes
from isthmus.execution.prompting.vocabulary import Vocabulary

_DECODE_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class PromptingSettings:
    """Limits of the plane. `max_text_bytes` is of one request, in UTF-8.

    `tool_parser` and `reasoning_parser` name the dialect that the model writes (`dialects`), `auto` by its template.
    """

    pool: PoolSettings = field(default_factory=PoolSettings)
    max_text_bytes: int = MAX_TEXT_BYTES
    max_messages: int = MAX_MESSAGES
    tool_parser: str = AUTO
    reasoning_parser: str = AUTO


class FolderPrompting:
    """Implements `ports.Prompting`. `await start()` first; it takes as long as loading the tokenizer."""

    def __init__(self, files: TextFiles, settings: PromptingSettings, clock: Clock) -> None:
        self._files = files
        self._settings = settings
        self._clock = clock
        self._vocabulary = Vocabulary.from_json(files.tokenizer, str(files.folder / "tokenizer.json"))
        self._dialect = detect(files.template, settings.tool_parser, settings.reasoning_parser)
        self._pool = HelperPool(settings.pool, files.tokenizer, files.template, files.specials)
        self._thinks_when_asked = False

    @property
    def has_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._files.template is not None

    @property
    def dialect(self) -> Dialect:
        """How the model writes tool calls and reasoning."""
        return self._dialect

    @property
    def vocab_size(self) -> int:
        """One past the highest token id of the tokenizer (the model may have more rows)."""
        return self._vocabulary.size

    @property
    def stats(self) -> PoolStats:
        """Counters of the helper processes."""
        return self._pool.stats

    async def start(self) -> None:
        """Start the helper processes. Raises `ModelInvalid`."""
        await self._pool.start()
        self._thinks_when_asked = await self._opens_reasoning(thinking=True) and not await self._opens_reasoning()

    async def _opens_reasoning(self, *, thinking: bool | None = None) -> bool:
        """Whether the template's prompt ends within reasoning. A template that refuses a greeting does not."""
        if self._files.template is None or self._dialect.reasoning_marks is None:
            return False
        try:
            prompt = await self.encode_chat([ChatMessage("user", "Hello!")], ChatOptions(thinking=thinking))
        except InvalidInput:
            return False
        return opening(self._dialect, self._vocabulary, prompt[-PROMPT_TAIL_TOKENS:]) is Opening.OPENED

    async def encode_chat(self, messages: Sequence[ChatMessage], options: ChatOptions | None = None) -> list[int]:
        """See `ports.Prompting`."""
        if self._files.template is None:
            raise Unsupported("the model has no chat template: use /v1/completions", "messages")
        if not 1 <= len(messages) <= self._settings.max_messages:
            raise InvalidInput(
                f"messages has {len(messages)} entries, accepted: 1 to {self._settings.max_messages}", "messages"
            )
        options = options or ChatOptions()
        size = self._check_size(sum(map(_message_bytes, messages)), "messages")
        size += self._check_size(sum(map(_tool_bytes, options.tools)), "tools")
        return await self._pool.ask(Render(list(messages), options, self._clock.wall()), size)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `ports.Prompting`."""
        size = self._check_size(text_bytes(text), "prompt")
        return await self._pool.ask(Encode(text, add_special_tokens), size)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """See `ports.Prompting`. Long inputs let other tasks run in between."""
        if len(token_ids) > self._settings.pool.max_tokens:
            raise TooLarge(f"tokens has {len(token_ids)} ids, limit {self._settings.pool.max_tokens}", "tokens")
        detokenizer = Detokenizer(self._vocabulary, skip_special_tokens=skip_special_tokens)
        parts: list[str] = []
        for start in range(0, len(token_ids), _DECODE_CHUNK):
            chunk = token_ids[start : start + _DECODE_CHUNK]
            self._vocabulary.check(chunk)
            parts.extend(detokenizer.feed(token_id) for token_id in chunk)
            await self._clock.sleep(0)
        parts.append(detokenizer.finish())
        return "".join(parts)

    def token_bytes(self, token_id: int) -> bytes:
        """See `ports.Prompting`. Nothing for a row of the model that is no token."""
        return self._vocabulary.token_bytes(token_id)

    def assembler(self, params: TextParams, parse: OutputParse | None = None) -> Assembler:
        """See `ports.Prompting`."""
        return Assembler(self._vocabulary, params, parse, self._dialect)

    def constraint(
        self, options: ChatOptions, response: Constraint | None, prompt_tail: Sequence[int] = ()
    ) -> Constraint | None:
        """See `ports.Prompting`.

        Where the template opens the reasoning itself when asked to, a model that was not asked does not reason.
        """
        if self._thinks_when_asked and options.thinking is None:
            options = structs.replace(options, thinking=False)
        return chat_constraint(self._dialect, self._vocabulary, options, response, prompt_tail)

    async def close(self) -> None:
        """See `ports.Prompting`."""
        await self._pool.close()

    def _check_size(self, size: int, name: str) -> int:
        limit = self._settings.max_text_bytes
        if size > limit:
            raise TooLarge(f"{name} has {size} bytes, limit {limit}", name)
        return size


def _message_bytes(message: ChatMessage) -> int:
    calls = (text for call in message.tool_calls for text in (call.id, call.name, call.arguments))
    texts = (message.content, message.name or "", message.tool_call_id or "", message.reasoning or "", *calls)
    return sum(map(text_bytes, texts))


def _tool_bytes(tool: ToolDefinition) -> int:
    return sum(map(text_bytes, (tool.name, tool.description, tool.parameters)))


def open_prompting(folder: Path, settings: PromptingSettings, clock: Clock) -> FolderPrompting:
    """Read `folder`; `await start()` on the result before use. Raises `ModelInvalid` naming the file."""
    return FolderPrompting(read_text_files(folder), settings, clock)
