"""Runs the parsers of an output over text, in parts of any size."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from isthmus.contracts.prompting import ToolDelta
from isthmus.execution.prompting.calls import PARSERS
from isthmus.execution.prompting.dialects import Dialect, Opening, ReasoningDialect, ToolDialect
from isthmus.execution.prompting.findings import Content, Finding, Findings
from isthmus.execution.prompting.reasoning import ReasoningSplitter


@dataclass
class Outcome:
    """What a client would have at the end."""

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        if isinstance(finding, Content):
            self.content += finding.text
        elif isinstance(finding, ToolDelta):
            if finding.name is not None:
                assert finding.index == len(self.calls)
                self.calls.append([finding.name, ""])
            assert finding.index == len(self.calls) - 1
            self.calls[-1][1] += finding.arguments
        else:
            self.reasoning += finding.text


def parse(
    dialect: ToolDialect,
    parts: Sequence[str],
    *,
    names: Collection[str] = (),
    hidden: Collection[str] = (),
    reasoning: ReasoningDialect | None = None,
    opening: Opening = Opening.UNSAID,
) -> tuple[Outcome, list[list[Finding]]]:
    """What a client has at the end, and what each part added (the last entry: the end)."""
    found = Findings()
    calls = PARSERS[dialect](found, names, hidden)
    marks = Dialect(None, reasoning).reasoning_marks
    splitter = ReasoningSplitter(marks, opening, found, calls.feed) if marks is not None else None
    steps: list[list[Finding]] = []
    for part in parts:
        (splitter or calls).feed(part)
        steps.append(found.take())
    if splitter is not None:
        splitter.finish()
    calls.finish()
    steps.append(found.take())
    outcome = Outcome()
    for step in steps:
        for finding in step:
            outcome.add(finding)
    return outcome, steps


def whole(dialect: ToolDialect, text: str, names: Collection[str] = (), hidden: Collection[str] = ()) -> Outcome:
    return parse(dialect, [text], names=names, hidden=hidden)[0]
