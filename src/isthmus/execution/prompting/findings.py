"""What the parsers of an output found so far, in the order of the output."""

from dataclasses import dataclass

from isthmus.contracts.prompting import ToolDelta


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text before the answer."""

    text: str


Finding = Content | Reasoning | ToolDelta


class Findings:
    """Collects findings; neighbours of one kind are joined. `calls` is how many calls were announced in all."""

    def __init__(self) -> None:
        self.calls = 0
        self._done: list[Finding] = []
        self._kind: type[Finding] | None = None
        self._parts: list[str] = []

    def content(self, text: str) -> None:
        """More of the answer."""
        self._add(Content, text)

    def reasoning(self, text: str) -> None:
        """More of the reasoning."""
        self._add(Reasoning, text)

    def call(self, name: str) -> None:
        """A call of the tool `name` begins."""
        self._flush()
        self._done.append(ToolDelta(self.calls, name))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        self._add(ToolDelta, text)

    def take(self) -> list[Finding]:
        """What was found since the last time."""
        self._flush()
        done, self._done = self._done, []
        return done

    def _add(self, kind: type[Finding], text: str) -> None:
        if not text:
            return
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        self._parts.append(text)

    def _flush(self) -> None:
        if self._parts:
            text = "".join(self._parts)
            if self._kind is Content:
                self._done.append(Content(text))
            elif self._kind is Reasoning:
                self._done.append(Reasoning(text))
            else:
                self._done.append(ToolDelta(self.calls - 1, None, text))
        self._parts.clear()
        self._kind = None
