"""Tells the reasoning at the start of an output from the answer, a character at a time.

Rules: reasoning is only at the start. Line breaks around it are not part of it, nor of the answer: templates put their
own there. (vLLM leaves them in; without them a conversation that is sent back renders as it was.) Reasoning that never
closes is all there is: the answer is empty. A mark that the template wrote already may be repeated by the model.
What is held back is at most one mark and `MAX_HELD_BREAKS` line breaks.
"""

from collections.abc import Callable

from isthmus.execution.prompting.dialects import Opening
from isthmus.execution.prompting.findings import Findings

MAX_HELD_BREAKS = 64


class ReasoningSplitter:
    """Gives reasoning to `found` and everything else to `answer`."""

    def __init__(
        self, marks: tuple[str, str], opening: Opening, found: Findings, answer: Callable[[str], None]
    ) -> None:
        self._open, self._close = marks
        self._found = found
        self._answer = answer
        self._held = ""
        self._breaks = 0
        self._begun = False
        states = {Opening.UNSAID: self._start, Opening.OPENED: self._reopened, Opening.CLOSED: self._gap}
        self._state: Callable[[str], None] = states[opening]

    def feed(self, text: str) -> None:
        """Take more of the output."""
        for index, char in enumerate(text):
            if self._state == self._outside:
                self._answer(text[index:])
                return
            self._state(char)

    def finish(self) -> None:
        """The output has ended: what was held is what it looks like."""
        if self._state == self._start:
            self._answer(self._held)
        elif self._state in (self._inside, self._reopened):
            for char in self._held:
                self._reason(char)
        self._held = ""

    def _outside(self, char: str) -> None:
        self._answer(char)

    def _start(self, char: str) -> None:
        """White space, then perhaps the opening mark."""
        self._held += char
        mark = self._held.lstrip()
        if mark == self._open:
            self._held = ""
            self._state = self._inside
        elif not self._open.startswith(mark) or len(self._held) > MAX_HELD_BREAKS:
            held, self._held = self._held, ""
            self._state = self._outside
            self._answer(held)

    def _reopened(self, char: str) -> None:
        """The template opened the reasoning; the model may open it once more."""
        self._held += char
        mark = self._held.lstrip("\n")
        if mark == self._open:
            self._held = ""
            self._state = self._inside
        elif not self._open.startswith(mark) or len(self._held) > MAX_HELD_BREAKS:
            held, self._held = self._held, ""
            self._state = self._inside
            self.feed(held)

    def _inside(self, char: str) -> None:
        held = self._held + char
        if held == self._close:
            self._held = ""
            self._breaks = 0
            self._state = self._gap
            return
        while held and not self._close.startswith(held):
            self._reason(held[0])
            held = held[1:]
        self._held = held

    def _reason(self, char: str) -> None:
        """Line breaks wait until it is known that they are within the reasoning."""
        if char == "\n" and self._breaks < MAX_HELD_BREAKS:
            self._breaks += 1
            return
        if self._begun:
            self._found.reasoning("\n" * self._breaks)
        self._begun = True
        self._breaks = 0
        self._found.reasoning(char)

    def _gap(self, char: str) -> None:
        """Line breaks between the reasoning and the answer."""
        if char != "\n":
            self._state = self._outside
            self._answer(char)
