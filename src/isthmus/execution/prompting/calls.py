"""Tells tool calls from the text of an answer, a character at a time, for each dialect.

Rules. A call is announced when it is certain: after its mark when its name is known; for Llama's bare JSON when the
name is known (of an offered tool, if the names are given) and its parameters have begun. What begins like a call and
turns out to be none before that is given back as text, mark included. After that nothing is taken back: what the model
writes up to the end of the call is its arguments, valid JSON or not. White space before the first call, between calls
and after the last, and one line break between text and a call, belong to no text. At most `MAX_TOOL_CALLS` calls of an
output are read, more are text. What is held back is bounded: `MAX_HELD_CHARS` of a call without a name yet, a mark, and
`MAX_BLANKS` of white space.
"""

from collections.abc import Callable, Collection

from isthmus.contracts.prompting import MAX_TOOL_CALLS, MAX_TOOL_NAME_CHARS
from isthmus.execution.prompting.dialects import (
    HERMES_CLOSE,
    HERMES_OPEN,
    MISTRAL_ARGS,
    MISTRAL_CALLS,
    MISTRAL_ID,
    PYTHON_TAG,
    ToolDialect,
)
from isthmus.execution.prompting.findings import Findings
from isthmus.execution.prompting.json_calls import CallObject, JsonValue, Step, is_tool_name

MAX_BLANKS = 64
MAX_CALL_ID_CHARS = 64
# White space before a mark, the mark, and white space after it.
_MAX_FRAME_CHARS = 3 * MAX_BLANKS


class CallParser:
    """What the dialects share: text with opening marks in it, giving back, and arguments that broke. By itself it finds
    no calls.

    `starts` are the marks that open a call; `ends` those that end arguments which are not JSON. `hidden` are marks that
    are left out of text, as special tokens are.
    """

    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def __init__(self, found: Findings, names: Collection[str] = (), hidden: Collection[str] = ()) -> None:
        self._found = found
        self._names = names
        self._hidden = tuple(hidden)
        self._state: Callable[[str], None] = self._in_text
        self._mark = ""
        self._blank = ""
        self._said = False
        self._held = ""
        self._object: CallObject | None = None

    def feed(self, text: str) -> None:
        """Take more of the answer."""
        for char in text:
            self._state(char)

    def finish(self) -> None:
        """The answer has ended: what was held is text, or the end of some arguments."""
        if self._state == self._broken:
            self._found.arguments(self._mark)
        elif self._object is not None and self._object.announced:
            self._object.finish()
        else:
            self._give_back()
            self._speak(self._mark)
        self._mark = ""
        if self._blank and not self._found.calls:
            self._found.content(self._blank)
        self._blank = ""

    def _opened(self) -> None:
        """An opening mark is complete."""

    def _in_text(self, char: str) -> None:
        held = self._mark + char
        starts = self.starts if self._found.calls < MAX_TOOL_CALLS else ()
        if held in starts:
            self._mark = ""
            self._held, self._blank = self._blank + held, ""
            self._opened()
            return
        if held in self._hidden:
            self._mark = ""
            return
        while held and not any(mark.startswith(held) for mark in (*starts, *self._hidden)):
            self._speak(held[0])
            held = held[1:]
        self._mark = held

    def _speak(self, text: str) -> None:
        """Text of the answer; white space waits until something follows."""
        for char in text:
            if not self._said and char.isspace() and len(self._blank) < MAX_BLANKS:
                self._blank += char
                continue
            self._said = True
            self._found.content(self._blank + char)
            self._blank = ""

    def _give_back(self, *again: str) -> None:
        """No call after all: what was held is text, and the characters `again` are looked at anew."""
        held = self._held + (self._object.raw if self._object is not None else "")
        for mark in self._hidden:
            held = held.replace(mark, "")
        self._held, self._object = "", None
        self._speak(held)
        self._resume(*again)

    def _resume(self, *again: str) -> None:
        """Back to text."""
        self._state = self._in_text
        for char in again:
            self._state(char)

    def _ended(self) -> None:
        """A call is complete: white space after it belongs to no text."""
        self._held, self._object = "", None
        self._said = False
        self._blank = ""

    def _is_blank(self, char: str) -> bool:
        """Whether `char` is white space that may be held within the frame of a call."""
        return char.isspace() and len(self._held) < _MAX_FRAME_CHARS

    def _begin_object(self, *, early: bool, names: Collection[str] = ()) -> None:
        """A `{` is due: read the object that it opens."""
        self._object = CallObject(self._found, early=early, names=names)
        self._state = self._in_object
        self._state("{")

    def _in_object(self, char: str) -> None:
        if self._object is None:
            self._resume(char)
            return
        step = self._object.push(char)
        if step is Step.LAST:
            self._ended()
            self._after_object()
        elif step is Step.BROKEN and self._object.announced:
            self._break(char)
        elif step is Step.BROKEN:
            self._give_back(char)

    def _after_object(self) -> None:
        """What follows an object."""

    def _break(self, char: str) -> None:
        """The arguments are no JSON: take everything until the call must be over."""
        self._object = None
        self._state = self._broken
        self._state(char)

    def _broken(self, char: str) -> None:
        held = self._mark + char
        if held in self.ends:
            self._mark = ""
            self._ended()
            self._state = self._in_text
            if held in self.starts:
                self._in_text_again(held)
            return
        while held and not any(end.startswith(held) for end in self.ends):
            self._found.arguments(held[0])
            held = held[1:]
        self._mark = held

    def _in_text_again(self, mark: str) -> None:
        """The mark that ended a call opens the next one."""
        for char in mark:
            self._in_text(char)


class HermesCalls(CallParser):
    """`<tool_call>{...}</tool_call>`; several objects in one pair of marks, and no closing mark, are let pass."""

    starts = (HERMES_OPEN, "\n" + HERMES_OPEN)
    ends = (HERMES_CLOSE,)

    def _opened(self) -> None:
        self._state = self._before_object

    def _before_object(self, char: str) -> None:
        if char == "{":
            self._begin_object(early=True)
        elif self._is_blank(char):
            self._held += char
        else:
            self._give_back(char)

    def _after_object(self) -> None:
        self._state = self._before_close

    def finish(self) -> None:
        """See `CallParser`. Half a closing mark is no text."""
        if self._state == self._before_close:
            self._mark = ""
        super().finish()

    def _before_close(self, char: str) -> None:
        held = self._mark + char
        if not self._mark and self._is_blank(char):
            return
        if held == HERMES_CLOSE:
            self._mark = ""
            self._state = self._in_text
        elif HERMES_CLOSE.startswith(held):
            self._mark = held
        elif held == "{" and self._found.calls < MAX_TOOL_CALLS:
            self._begin_object(early=True)
        else:
            self._mark = ""
            self._resume(*held)


class LlamaCalls(CallParser):
    """`{...}` at the start of an answer or after `<|python_tag|>`; more after `;` or a comma."""

    starts = (PYTHON_TAG,)

    def _in_text(self, char: str) -> None:
        if char == "{" and not self._said and not self._mark and self._found.calls < MAX_TOOL_CALLS:
            self._held, self._blank = self._blank, ""
            self._begin_object(early=False, names=self._names)
        else:
            super()._in_text(char)

    def _opened(self) -> None:
        self._state = self._before_object

    def _before_object(self, char: str) -> None:
        if char == "{" and self._found.calls < MAX_TOOL_CALLS:
            self._begin_object(early=False, names=self._names)
        elif self._is_blank(char):
            self._held += char
        else:
            self._give_back(char)

    def _after_object(self) -> None:
        self._state = self._between

    def _between(self, char: str) -> None:
        if char in ";,":
            self._held = char
            self._state = self._before_object
        elif char.isspace():
            self._speak(char)
        else:
            self._resume(char)


class MistralCalls(CallParser):
    """`[TOOL_CALLS]` and then an array of objects, or a name, `[ARGS]` and an object."""

    starts = (MISTRAL_CALLS,)
    ends = (MISTRAL_CALLS,)

    def __init__(self, found: Findings, names: Collection[str] = (), hidden: Collection[str] = ()) -> None:
        super().__init__(found, names, hidden)
        self._name = ""
        self._value = JsonValue()

    def _opened(self) -> None:
        self._state = self._before_list

    def _before_list(self, char: str) -> None:
        if self._is_blank(char):
            self._held += char
        elif char == "[":
            self._held += char
            self._state = self._before_item
        elif char == "{":
            self._begin_object(early=True)
        else:
            self._name = ""
            self._state = self._in_name
            self._state(char)

    def _before_item(self, char: str) -> None:
        if char == "{" and self._found.calls < MAX_TOOL_CALLS:
            self._begin_object(early=True)
        elif self._is_blank(char):
            self._held += char
        else:
            self._give_back(char)

    def _after_object(self) -> None:
        self._state = self._after_item

    def _after_item(self, char: str) -> None:
        if char == ",":
            self._held = char
            self._state = self._before_item
        elif char == "]":
            self._state = self._in_text
        elif not self._is_blank(char):
            self._resume(char)

    def _in_name(self, char: str) -> None:
        """The name ends at a mark, or where the arguments begin."""
        if char in "[{" and not is_tool_name(self._name):
            self._give_back(char)
        elif char == "{":
            self._announce()
            self._before_arguments(char)
        elif char == "[":
            self._mark = char
            self._state = self._in_tag
        elif char.isprintable() and not char.isspace() and len(self._name) < MAX_TOOL_NAME_CHARS:
            self._name += char
            self._held += char
        else:
            self._give_back(char)

    def _in_tag(self, char: str) -> None:
        tag = self._mark + char
        if tag == MISTRAL_ARGS:
            self._announce()
        elif tag == MISTRAL_ID:
            self._held += tag
            self._mark = ""
            self._state = self._in_id
        elif MISTRAL_ARGS.startswith(tag) or MISTRAL_ID.startswith(tag):
            self._mark = tag
        else:
            self._mark = ""
            self._give_back(*tag)

    def _in_id(self, char: str) -> None:
        """An id of the model's own is skipped."""
        self._mark += char
        if self._mark.endswith(MISTRAL_ARGS):
            self._announce()
        elif len(self._mark) > MAX_CALL_ID_CHARS + len(MISTRAL_ARGS):
            tail, self._mark = self._mark, ""
            self._give_back(*tail)

    def _announce(self) -> None:
        self._mark = ""
        self._found.call(self._name)
        self._ended()
        self._value = JsonValue()
        self._state = self._before_arguments

    def _before_arguments(self, char: str) -> None:
        if char == "{":
            self._state = self._in_arguments
            self._state(char)
        elif not self._is_blank(char):
            self._break(char)

    def _in_arguments(self, char: str) -> None:
        step = self._value.push(char)
        if step is Step.BROKEN:
            self._break(char)
            return
        self._found.arguments(char)
        if step is Step.LAST:
            self._state = self._in_text


PARSERS: dict[ToolDialect, type[CallParser]] = {
    ToolDialect.HERMES: HermesCalls,
    ToolDialect.LLAMA: LlamaCalls,
    ToolDialect.MISTRAL: MistralCalls,
}
