"""Token ids to text as they come: never half a character, never text that a stop string can still take back.

Promise: the pieces of one output, concatenated, equal the decoding of all its ids (cut at the first stop string),
however the ids were grouped into `feed` calls; each token costs constant time. State is a function of the ids fed, so
an output is resumed by feeding them again. An incomplete character at the end becomes U+FFFD.
"""

import codecs
from collections.abc import Sequence

from isthmus.contracts.prompting import Piece
from isthmus.contracts.sampling import TextParams
from isthmus.execution.prompting.vocabulary import Vocabulary


class Detokenizer:
    """Bytes of tokens to whole characters, with the decoder's lead rule."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._strip = vocabulary.rule.strip

    def feed(self, token_id: int) -> str:
        """The characters that `token_id` completed."""
        if self._skip and self._vocabulary.is_special(token_id):
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


class Assembler:
    """Implements `ports.TextAssembler`. Ids without a token add no text. After a stop, everything fed is ignored."""

    def __init__(self, vocabulary: Vocabulary, params: TextParams) -> None:
        self._params = params
        self._detokenizer = Detokenizer(vocabulary, skip_special_tokens=params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop)
        self._held = ""
        self._tokens = 0
        self._stopped = False

    def feed(self, token_ids: Sequence[int]) -> Piece:
        """See `ports.TextAssembler`."""
        parts: list[str] = []
        for token_id in token_ids:
            if self._stopped:
                break
            self._tokens += 1
            text = self._detokenizer.feed(token_id)
            parts.append(text if self._tokens <= self._params.min_tokens else self._search(text))
        return Piece("".join(parts), self._stopped)

    def finish(self) -> Piece:
        """See `ports.TextAssembler`."""
        if self._stopped:
            return Piece("", stopped=True)
        text = self._search(self._detokenizer.finish())
        if not self._stopped:
            text += self._held
            self._held = ""
        return Piece(text, self._stopped)

    def _search(self, text: str) -> str:
        """What of the held text and `text` may be sent."""
        if not self._params.stop:
            return text
        window = self._held + text
        for index in range(len(self._held), len(window)):
            length = self._matcher.push(window[index])
            if length:
                self._stopped = True
                self._held = ""
                return window[: index + 1 if self._params.include_stop else index + 1 - length]
        keep = len(window) - self._matcher.pending
        self._held = window[keep:]
        return window[:keep]
