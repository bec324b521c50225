"""Token ids to text as they come: never half a character, never text that a stop string can still take back.

Promise: the pieces of one output, concatenated, equal the decoding of all its ids (cut at the first stop string),
however the ids were grouped into `feed` calls; each token costs constant time. State is a function of the ids fed, so
an output is resumed by feeding them again. An incomplete character at the end becomes U+FFFD.

With an `OutputParse`, reasoning and tool calls are told from the answer's text first (`reasoning`, `calls`); stop
strings are looked for in that text only, and none spans a call.
"""

import codecs
from collections.abc import Collection, Iterable, Sequence

from isthmus.contracts.prompting import OutputParse, Piece, ToolDelta
from isthmus.contracts.sampling import TextParams
from isthmus.execution.prompting.calls import PARSERS, CallParser
from isthmus.execution.prompting.dialects import Dialect, opening
from isthmus.execution.prompting.findings import Content, Finding, Findings, Reasoning
from isthmus.execution.prompting.reasoning import ReasoningSplitter
from isthmus.execution.prompting.vocabulary import Vocabulary


class Detokenizer:
    """Bytes of tokens to whole characters, with the decoder's lead rule unless the text `continues` another.

    `shown` are special tokens that are not left out whatever `skip_special_tokens` says.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        skip_special_tokens: bool,
        shown: Collection[int] = (),
        continues: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = frozenset(shown)
        self._first = not continues
        self._strip = 0 if continues else vocabulary.rule.strip

    def feed(self, token_id: int) -> str:
        """The characters that `token_id` completed."""
        if self._skip and self._vocabulary.is_special(token_id) and token_id not in self._shown:
            return ""
        if self._first:
            self._first = False
            data = self._vocabulary.first_bytes(token_id)
        else:
            data = self._vocabulary.token_bytes(token_id)
        return self._stripped(self._decoder.decode(data))

    def finish(self) -> str:
        """U+FFFD when the bytes so far end within a character, else nothing."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
            else:
                self._strip -= 1
                text = text[1:]
        return text


class StopMatcher:
    """Finds the first of some strings in a text that comes in parts (Knuth, Morris and Pratt 1977, one automaton each).

    The first is the one that ends first; of several that end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in stops)
        self._states = [0] * len(self._stops)

    @property
    def pending(self) -> int:
        """How many of the last characters may be the start of a stop string."""
        return max(self._states, default=0)

    def reset(self) -> None:
        """Forget what came so far."""
        self._states = [0] * len(self._stops)

    def push(self, char: str) -> int:
        """Take one more character. The length of the stop string that it completes, or 0."""
        found = 0
        for index, stop in enumerate(self._stops):
            border, state = self._borders[index], self._states[index]
            while state and stop[state] != char:
                state = border[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                found = max(found, state)
                state = border[state - 1]
            self._states[index] = state
        return found


def _borders(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        if text[index] == text[length]:
            length += 1
        borders[index] = length
    return borders


class OutputParser:
    """Tells reasoning and calls from the text of one output."""

    def __init__(self, vocabulary: Vocabulary, dialect: Dialect, parse: OutputParse, *, hide: bool) -> None:
        tools = dialect.tools if parse.tools else None
        marks = (dialect.reasoning_marks or ()) if parse.reasoning else ()
        known = (*marks, *(dialect.tool_marks if parse.tools else ()))
        ids = {mark: vocabulary.added_id(mark) for mark in known}
        special = {mark: found for mark, found in ids.items() if found is not None and vocabulary.is_special(found)}
        self.shown = frozenset(special.values())
        """Special tokens that the parser must see."""
        self._found = Findings()
        parser = CallParser if tools is None else PARSERS[tools]
        self._calls = parser(self._found, parse.names, tuple(special) if hide else ())
        self._reasoning: ReasoningSplitter | None = None
        if parse.reasoning and dialect.reasoning_marks is not None:
            state = opening(dialect, vocabulary, parse.prompt_tail)
            self._reasoning = ReasoningSplitter(dialect.reasoning_marks, state, self._found, self._calls.feed)

    def feed(self, text: str) -> list[Finding]:
        """What `text` made certain."""
        if self._reasoning is not None:
            self._reasoning.feed(text)
        else:
            self._calls.feed(text)
        return self._found.take()

    def finish(self) -> list[Finding]:
        """What was held back."""
        if self._reasoning is not None:
            self._reasoning.finish()
        self._calls.finish()
        return self._found.take()


class _Parts:
    """A piece in the making."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolDelta] = []

    def text(self, text: str) -> None:
        self._text.append(text)

    def reasoning(self, text: str) -> None:
        self._reasoning.append(text)

    def call(self, delta: ToolDelta) -> None:
        last = self._calls[-1] if self._calls else None
        if last is not None and last.name is None and delta.name is None and last.index == delta.index:
            self._calls[-1] = ToolDelta(delta.index, None, last.arguments + delta.arguments)
        else:
            self._calls.append(delta)

    def piece(self, stop: str) -> Piece:
        return Piece("".join(self._text), stop != "", "".join(self._reasoning), tuple(self._calls), stop)


class Assembler:
    """Implements `ports.TextAssembler`. Ids without a token add no text. After a stop, everything fed is ignored."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        params: TextParams,
        parse: OutputParse | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        self._params = params
        self._parser: OutputParser | None = None
        if parse is not None and dialect is not None and (parse.tools or parse.reasoning):
            self._parser = OutputParser(vocabulary, dialect, parse, hide=params.skip_special_tokens)
        self._detokenizer = Detokenizer(
            vocabulary,
            skip_special_tokens=params.skip_special_tokens,
            shown=self._parser.shown if self._parser is not None else (),
            continues=parse is None,
        )
        self._matcher = StopMatcher(params.stop)
        self._held = ""
        self._tokens = 0
        self._stop = ""

    def feed(self, token_ids: Sequence[int]) -> Piece:
        """See `ports.TextAssembler`."""
        parts = _Parts()
        for token_id in token_ids:
            if self._stop:
                break
            self._tokens += 1
            text = self._detokenizer.feed(token_id)
            self._sort(self._parsed(text), parts, search=self._tokens > self._params.min_tokens)
        return parts.piece(self._stop)

    def finish(self) -> Piece:
        """See `ports.TextAssembler`."""
        parts = _Parts()
        if not self._stop:
            self._sort(self._parsed(self._detokenizer.finish()), parts, search=True)
        if not self._stop and self._parser is not None:
            self._sort(self._parser.finish(), parts, search=True)
        if not self._stop:
            parts.text(self._released())
        return parts.piece(self._stop)

    def _parsed(self, text: str) -> Iterable[Finding]:
        if self._parser is not None:
            return self._parser.feed(text)
        return (Content(text),) if text else ()

    def _sort(self, found: Iterable[Finding], parts: _Parts, *, search: bool) -> None:
        """Put findings into `parts`, up to a stop string."""
        for finding in found:
            if self._stop:
                return
            if isinstance(finding, Content):
                parts.text(self._search(finding.text) if search else finding.text)
            elif isinstance(finding, Reasoning):
                parts.reasoning(finding.text)
            else:
                # The text is interrupted: what could have become a stop string no longer can.
                parts.text(self._released())
                parts.call(finding)

    def _released(self) -> str:
        """The text held back for stop strings, which are then looked for anew."""
        held, self._held = self._held, ""
        self._matcher.reset()
        return held

    def _search(self, text: str) -> str:
        """What of the held text and `text` may be sent."""
        if not self._params.stop:
            return text
        window = self._held + text
        for index in range(len(self._held), len(window)):
            length = self._matcher.push(window[index])
            if length:
                self._stop = window[index + 1 - length : index + 1]
                self._held = ""
                return window[: index + 1 if self._params.include_stop else index + 1 - length]
        keep = len(window) - self._matcher.pending
        self._held = window[keep:]
        return window[:keep]
