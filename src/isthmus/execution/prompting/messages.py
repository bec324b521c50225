"""What travels between the prompting pool and its helper processes: bounded msgpack frames, tagged by `type`.

pool -> helper      Setup, then Render | Encode, one at a time
helper -> pool      Loaded | Refused, then TokenIds | Refused, one for each
"""

import msgspec

from isthmus.contracts.events import ErrorInfo
from isthmus.contracts.prompting import ChatMessage, ChatOptions


class Limits(msgspec.Struct, frozen=True):
    """What one request may cost a helper. Exceeding `cpu_s` ends the process; the pool has its own wall deadline."""

    cpu_s: int
    memory_bytes: int
    output_chars: int
    tokens: int


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """Load this: `tokenizer.json`'s bytes, the template's source, the special tokens by name."""

    tokenizer: bytes
    template: str | None
    specials: dict[str, str]
    limits: Limits


class Render(msgspec.Struct, frozen=True, tag="render"):
    """Apply the chat template, then tokenise. `now` is seconds since the Unix epoch, for `strftime_now` (UTC)."""

    messages: list[ChatMessage]
    options: ChatOptions
    now: float


class Encode(msgspec.Struct, frozen=True, tag="encode"):
    """Tokenise a text."""

    text: str
    add_special_tokens: bool


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The helper takes requests."""


class TokenIds(msgspec.Struct, frozen=True, tag="token_ids"):
    """The answer: token ids as packed 32-bit words in the machine's order (both ends are on one machine)."""

    packed: bytes


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request (or the set-up) failed, and why."""

    error: ErrorInfo


Question = Setup | Render | Encode
Answer = Loaded | TokenIds | Refused
