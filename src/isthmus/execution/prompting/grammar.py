"""What an output must look like, as a grammar in llguidance's Lark notation (llguidance 1.x, docs/syntax.md).

Shape: reasoning, if the model may or must reason first; then calls, or calls or the response that was asked for, or
text that calls may follow. Promise: `calls` reads every call that the grammar accepts, with the name of an offered tool
and arguments that keep its schema. Marks that are tokens of their own are named by id, so that no other spelling of
them counts; the others are text. White space within the frame of a call is optional, as models differ; within
arguments it is bounded, so that no model can go on with it for ever.
"""

import json
from collections.abc import Sequence
from typing import Any

from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import InvalidInput, Unsupported
from isthmus.contracts.prompting import ChatOptions, ToolDefinition, ToolMode
from isthmus.execution.prompting.dialects import (
    HERMES_CLOSE,
    HERMES_OPEN,
    MISTRAL_ARGS,
    MISTRAL_CALLS,
    Dialect,
    Opening,
    ToolDialect,
    opening,
)
from isthmus.execution.prompting.vocabulary import Vocabulary

_SPACING = {"whitespace_pattern": "[ \\n\\t]{1,16}"}
_KEYS = {ToolDialect.HERMES: "arguments", ToolDialect.MISTRAL: "arguments", ToolDialect.LLAMA: "parameters"}


def chat_constraint(
    dialect: Dialect,
    vocabulary: Vocabulary,
    options: ChatOptions,
    response: Constraint | None,
    prompt_tail: Sequence[int],
) -> Constraint | None:
    """Implements `ports.Prompting.constraint`."""
    mode = options.choice.mode
    demanded = mode in (ToolMode.NAMED, ToolMode.REQUIRED)
    if demanded and dialect.tools is None:
        raise Unsupported("the model has no known way of writing tool calls, so none can be demanded", "tool_choice")
    offered = () if mode is ToolMode.NONE else options.tools
    if mode is ToolMode.NAMED:
        offered = tuple(tool for tool in offered if tool.name == options.choice.name)
    if dialect.tools is None:
        offered = ()
    held = any(tool.strict for tool in offered) or not options.choice.parallel
    free = response is None and not demanded
    if free and not (offered and held):
        return None
    writer = _Writer(dialect, vocabulary)
    reasons = writer.reasoning(opening(dialect, vocabulary, prompt_tail), thinking=options.thinking)
    if response is not None and not offered and not reasons:
        return response
    answer = ""
    if offered:
        # A call that is demanded keeps its schema; one of the model's own accord does when its tool is strict.
        answer = writer.calls(
            offered,
            parallel=options.choice.parallel,
            every=demanded or response is not None,
            headed=free and writer.starts_with_text,
        )
    if free:
        answer = writer.text_or(answer)
    elif response is not None and not demanded:
        answer = f"{answer} | {writer.response(response)}" if answer else writer.response(response)
    writer.rule("start", f"{reasons} answer" if reasons else "answer")
    writer.rule("answer", answer)
    return Constraint(ConstraintKind.GRAMMAR, writer.text())


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, dialect: Dialect, vocabulary: Vocabulary) -> None:
        self._dialect = dialect
        self._vocabulary = vocabulary
        self._rules: dict[str, str] = {}

    def rule(self, name: str, body: str) -> str:
        """Add a rule; its name."""
        self._rules[name] = body
        return name.partition("[")[0]

    def text(self) -> str:
        """The grammar."""
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())

    def reasoning(self, opened: Opening, *, thinking: bool | None) -> str:
        """The part before the answer, empty when there is to be none."""
        marks = self._dialect.reasoning_marks
        if marks is None or opened is Opening.CLOSED or (thinking is False and opened is not Opening.OPENED):
            return ""
        closing = self._vocabulary.added_id(marks[1])
        if closing is None:
            self.rule(f"thought[suffix={_quote(marks[1])}]", "/(?s:.*)/")
            body = "thought GAP"
        else:
            body = f"/(?s:.*)/ {self._mark(marks[1])} GAP"
        self.rule("GAP", r"/\n{0,3}/")
        if opened is Opening.OPENED:
            return self.rule("reasoning", body)
        self.rule("reasoning", f"{self._mark(marks[0])} {body}")
        return "reasoning?"

    def calls(self, tools: Sequence[ToolDefinition], *, parallel: bool, every: bool, headed: bool = False) -> str:
        """One call of one of `tools`, or several; `every` tool's schema holds, else that of strict ones.

        `headed`: the first call's opening mark has been written already.
        """
        self.rule("WS", r"/[ \n]{1,8}/")
        heads = []
        for index, tool in enumerate(tools):
            schema: dict[str, Any] = _arguments_schema(tool) if every or tool.strict else {"type": "object"}
            schema["x-guidance"] = _SPACING
            heads.append((tool.name, self.rule(f"args_{index}", f"%json {json.dumps(schema)}")))
        if self._dialect.tools is ToolDialect.LLAMA:
            # Its templates refuse a message with several calls.
            return self._object(heads)
        more = ""
        if self._dialect.tools is ToolDialect.HERMES:
            self.rule("rest", f"WS? {self._object(heads)} WS? {self._mark(HERMES_CLOSE)}")
            more = " (WS? call)*"
        elif self._dialect.named:
            self.rule("rest", self._named(heads))
            more = " call*"
        else:
            self.rule("item", self._object(heads, after="id?"))
            # The templates give calls an id of 9 letters and digits; models may write one too.
            self.rule("id", f'WS? "," WS? {_quote(_quote("id"))} WS? ":" WS? /"[a-zA-Z0-9]{{9}}"/')
            again = ' (WS? "," WS? item)*' if parallel else ""
            self.rule("rest", f'WS? "[" WS? item{again} WS? "]"')
        self.rule("call", f"{self._mark(self.start)} rest")
        return self.rule("calls", ("rest" if headed else "call") + (more if parallel else ""))

    @property
    def start(self) -> str:
        """The mark that opens a call, empty when none does."""
        starts = {ToolDialect.HERMES: HERMES_OPEN, ToolDialect.MISTRAL: MISTRAL_CALLS}
        return starts.get(self._dialect.tools or ToolDialect.LLAMA, "")

    @property
    def starts_with_text(self) -> bool:
        """Whether calls are opened by a mark that is not a token of its own."""
        return self.start != "" and self._vocabulary.added_id(self.start) is None

    def _named(self, heads: Sequence[tuple[str, str]]) -> str:
        for name, _ in heads:
            if any(char.isspace() or char in "[{" for char in name):
                raise Unsupported("this model cannot call a tool with white space or brackets in its name", "tools")
        return " | ".join(f"{_quote(name)} {self._mark(MISTRAL_ARGS)} {arguments}" for name, arguments in heads)

    def _object(self, heads: Sequence[tuple[str, str]], after: str = "") -> str:
        key = _KEYS[self._dialect.tools or ToolDialect.HERMES]
        self.rule("mid", f'WS? "," WS? {_quote(_quote(key))} WS? ":" WS?')
        self.rule("one", " | ".join(f"{_quote(_quote(name))} mid {arguments}" for name, arguments in heads))
        return self.rule("object", f'"{{" WS? {_quote(_quote("name"))} WS? ":" WS? one {after} WS? "}}"')

    def text_or(self, calls: str) -> str:
        """Text in which calls may follow (their first mark written already if it `starts_with_text`)."""
        if not self.start:
            # A bare call is told from text by its first character.
            self.rule("TEXT", r"/[^{\s](?s:.*)/")
            return f"WS? {calls} | WS? TEXT?"
        self.rule("TEXT", "/(?s:.+)/")
        if not self.starts_with_text:
            return f"TEXT? ({calls} WS?)?"
        # A lazy lexeme ends where the mark is complete; the rest of the call follows.
        self.rule("head[lazy]", f"TEXT? {_quote(self.start)}")
        return f"head {calls} WS? | TEXT?"

    def response(self, response: Constraint) -> str:
        """The response that was asked for."""
        if response.kind is ConstraintKind.JSON_SCHEMA:
            body = f"%json {_spaced(response.text)}"
        elif response.kind is ConstraintKind.REGEX:
            body = f"/{_delimited(response.text)}/"
        elif response.kind is ConstraintKind.CHOICE:
            body = " | ".join(map(_quote, response.choices()))
        else:
            body = f"%lark {{\n{response.text}\n}}"
        return self.rule("response", body)

    def _mark(self, text: str) -> str:
        token_id = self._vocabulary.added_id(text)
        return _quote(text) if token_id is None else f"<[{token_id}]>"


def _arguments_schema(tool: ToolDefinition) -> dict[str, Any]:
    """The tool's schema. Arguments are an object, whether it says so or not."""
    schema: dict[str, Any] = json.loads(tool.parameters)
    return schema if "type" in schema else {"type": "object", **schema}


def _spaced(schema: str) -> str:
    """The schema with bounded white space and nothing lenient, whatever it says itself. Raises `InvalidInput`."""
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("the response format is not JSON", "response_format") from error
    if isinstance(parsed, dict):
        parsed["x-guidance"] = _SPACING
    return json.dumps(parsed)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _delimited(regex: str) -> str:
    """`regex` between slashes: its own are escaped, and line breaks, which cannot stand in a literal."""
    parts = []
    escaped = False
    for char in regex:
        if char == "/" and not escaped:
            parts.append("\\/")
        elif char == "\n":
            parts.append("n" if escaped else "\\n")
        else:
            parts.append(char)
        escaped = char == "\\" and not escaped
    return "".join(parts)
