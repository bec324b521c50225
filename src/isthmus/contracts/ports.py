"""The ports: what the planes ask of each other. `app.py` hands each its own; no plane imports another.

Ports pass buffers and plain values, never tensors, and have at most seven methods.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from isthmus.contracts.constraints import Constraint
from isthmus.contracts.events import EngineStats, ModelInfo, RequestOutput, SessionHint
from isthmus.contracts.ids import RequestId
from isthmus.contracts.journal import Append, LineageFact, StoredEvent
from isthmus.contracts.prompting import ChatMessage, ChatOptions, OutputParse, Piece
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.sampling import TextParams


class Engine(Protocol):
    """Runs requests. One port whether the engine is a process of its own or (in tests) in this one."""

    @property
    def info(self) -> ModelInfo:
        """What is served. Known once the engine is ready; raises `EngineFailed` before."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The engine's last snapshot."""
        ...

    def submit(self, request: EngineRequest) -> AsyncIterator[RequestOutput]:
        """Run `request`; its outputs as they come, the last one with a `finish`.

        The request is sent when iteration starts. Closing the iterator early aborts the request.
        Raises `Overloaded`, `Draining`, `InvalidInput` (over the model's limits), `EngineFailed`.
        """
        ...

    def abort(self, request_id: RequestId) -> None:
        """Stop a request by the end of the running step. Unknown ids are ignored."""
        ...

    def hint(self, hint: SessionHint) -> None:
        """Pass on what is known about the future of a session's state. Never fails."""
        ...

    async def drain(self) -> None:
        """Refuse new requests, return when every accepted one has ended."""
        ...

    async def close(self) -> None:
        """End the engine. Requests still running end with `EngineFailed`."""
        ...


class TextAssembler(Protocol):
    """Turns the token ids of one output into text, incrementally. Never gives half a character."""

    def feed(self, token_ids: Sequence[int]) -> Piece:
        """The text that `token_ids` added and that no stop string can still take back."""
        ...

    def finish(self) -> Piece:
        """The text held back so far (an incomplete character becomes U+FFFD)."""
        ...


class Prompting(Protocol):
    """Text to tokens and back for one model."""

    async def encode_chat(self, messages: Sequence[ChatMessage], options: ChatOptions | None = None) -> list[int]:
        """The token ids of a conversation, and of the tools offered in it, through the model's chat template.

        Raises `InvalidInput` when the template refuses the messages, or template or tokenizer took too long, `TooLarge`
        over a limit, `Unsupported` without a template, `Overloaded` when too many wait.
        """
        ...

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`. Raises as `encode_chat`."""
        ...

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`. Raises `InvalidInput` for an id outside the vocabulary."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token (special tokens: the UTF-8 of their name)."""
        ...

    def assembler(self, params: TextParams, parse: OutputParse | None = None) -> TextAssembler:
        """A new assembler for one output; with `parse` it tells tool calls and reasoning from text.

        Without `parse` the output continues a text; with it the output is an answer, whose first space (of tokenizers
        that write one before every word) is not part of it. Stop strings are looked for in the answer's text only.
        """
        ...

    def constraint(
        self, options: ChatOptions, response: Constraint | None, prompt_tail: Sequence[int] = ()
    ) -> Constraint | None:
        """What an output must look like so that it keeps `options.choice` (and the schemas of strict tools) in this
        model's way of writing calls, and otherwise keeps `response`. None when nothing is demanded. `prompt_tail` is
        as in `OutputParse`: reasoning that the template opened, or that the model may open, comes first.
        Raises `Unsupported` when the model has no known way of writing calls and one is demanded.
        """
        ...

    async def close(self) -> None:
        """End helper processes."""
        ...


class Journal(Protocol):
    """Append-only streams of events. An append is durable before it returns."""

    async def append(self, batch: Sequence[Append]) -> list[int]:
        """Append all of `batch` atomically; the new version of each stream, in order.

        An event whose id its stream holds already is not written again. Raises `JournalConflict` (nothing written)
        when a stream is not at its expected version, `JournalUnavailable` when it cannot be made durable.
        """
        ...

    async def read(self, stream: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """Events of `stream` with a version over `after`, in order, at most `limit`."""
        ...

    async def close(self) -> None:
        """Finish what was accepted and release the journal."""
        ...


class Lineage(Protocol):
    """Takes the lineage fact of each request without ever making it wait."""

    def record(self, fact: LineageFact) -> None:
        """Queue `fact` for the journal (bounded; an overflow is counted and written as a gap)."""
        ...
