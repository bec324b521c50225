"""A whole answer, collected: reasoning, text and tool calls in the order in which the model wrote them.

Every dialect shows it in its own way. A step that added text alone has no parts: `Delta.text` says it all.
"""

from dataclasses import dataclass, field

from isthmus.contracts.clock import Entropy
from isthmus.contracts.prompting import Piece, ToolDelta
from isthmus.gateway.sequence import Delta

CALL_ID_CHARS = 24
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def call_id(entropy: Entropy, prefix: str = "call_") -> str:
    """A fresh id of a tool call: `prefix` and 24 random letters and digits (142 bits)."""
    number = int.from_bytes(entropy.token_bytes(CALL_ID_CHARS), "little")
    chars = []
    for _ in range(CALL_ID_CHARS):
        number, place = divmod(number, len(_ALPHABET))
        chars.append(_ALPHABET[place])
    return prefix + "".join(chars)


@dataclass(slots=True)
class CollectedText:
    """Text, or reasoning, without interruption."""

    pieces: list[str]
    reasoning: bool

    @property
    def text(self) -> str:
        """As one string."""
        return "".join(self.pieces)


@dataclass(slots=True)
class CollectedCall:
    """A whole tool call. Its arguments are JSON text, unless the model was cut off or left the form."""

    id: str
    name: str
    pieces: list[str]

    @property
    def arguments(self) -> str:
        """As one string."""
        return "".join(self.pieces)


@dataclass(slots=True)
class CollectedAnswer:
    """Collects one whole answer: its parts in order, text and reasoning each put together as far as they are adjacent.

    `prefix` starts the ids of calls. `finish` is OpenAI's reason (`stop` or `length`); `stop` is the stop string met.
    """

    entropy: Entropy
    prefix: str = "call_"
    parts: list[CollectedText | CollectedCall] = field(default_factory=list)
    finish: str = "stop"
    stop: str = ""
    _calls: dict[int, CollectedCall] = field(default_factory=dict)

    async def add(self, delta: Delta) -> None:
        """Take what a step added."""
        if delta.parts:
            for part in delta.parts:
                self._take(part)
        elif delta.text:
            self._text(delta.text, reasoning=False)
        if delta.finish is not None:
            self.finish, self.stop = delta.finish, delta.stop

    def _take(self, part: Piece) -> None:
        if part.reasoning:
            self._text(part.reasoning, reasoning=True)
        if part.text:
            self._text(part.text, reasoning=False)
        for call in part.calls:
            self._call(call)

    def _text(self, text: str, *, reasoning: bool) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, CollectedText) and last.reasoning == reasoning:
            last.pieces.append(text)
        else:
            self.parts.append(CollectedText([text], reasoning))

    def _call(self, delta: ToolDelta) -> None:
        call = self._calls.get(delta.index)
        if call is None:
            call = self._calls[delta.index] = CollectedCall(call_id(self.entropy, self.prefix), "", [])
            self.parts.append(call)
        call.name += delta.name or ""
        call.pieces.append(delta.arguments)

    @property
    def text(self) -> str:
        """Everything that is neither reasoning nor a call."""
        return "".join(part.text for part in self.parts if isinstance(part, CollectedText) and not part.reasoning)

    @property
    def reasoning(self) -> str:
        """All of the reasoning."""
        return "".join(part.text for part in self.parts if isinstance(part, CollectedText) and part.reasoning)

    @property
    def calls(self) -> list[CollectedCall]:
        """The tool calls, in order."""
        return [part for part in self.parts if isinstance(part, CollectedCall)]
