"""Chat templates in a sandbox. A template is a program that came with a model: it is not trusted.

Promise: a template sees the messages and the special tokens, nothing of the process; it cannot reach attributes of
internals, change what it was given, load other templates, or build more than a bounded output. What it can still do is
burn time and memory: the helper process that runs it has limits on both, and the pool a deadline.

Functions and settings are those that transformers gives templates: `raise_exception`, `strftime_now`, `tojson`
without HTML escapes, loop controls, trimmed blocks, and the tag `generation` (which marks text for training and
renders its body).
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.contracts.errors import InvalidInput, ModelInvalid, TooLarge
from isthmus.contracts.prompting import ChatMessage, ChatOptions
from isthmus.execution.prompting.conversation import Arguments, Shaper

MAX_PRODUCT = 1_000_000
MAX_DATE_FORMAT = 64
MAX_REASON_CHARS = 200
_DATE_FORMAT = re.compile(r"(?:[^%\x00]|%[-_0^#]?[A-Za-z%])*")


# What the expressions of a template can raise. Anything else would end the helper, and the pool answers for it.
_EXPRESSION_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


class _TemplateRefusalError(Exception):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` renders its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Give the body in place of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Products and powers are bounded, so that a few characters of source cannot ask for gigabytes."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse products of long things and large powers before they are computed."""
        if operator == "**":
            small = isinstance(left, int | float) and isinstance(right, int | float)
            if not small or abs(left) > MAX_PRODUCT or abs(right) > 64:
                raise SecurityError("a power is over the limit")
        else:
            for value, times in ((left, right), (right, left)):
                if (
                    isinstance(value, str | list | tuple)
                    and isinstance(times, int)
                    and len(value) * times > MAX_PRODUCT
                ):
                    raise SecurityError("a product is over the limit")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled chat template. Raises `ModelInvalid` when the source is not a template.

    `specials` are the special tokens that the template may name; `special_tokens` all that text must not become.
    """

    def __init__(
        self, source: str, specials: dict[str, str], output_chars: int, special_tokens: Sequence[str] = ()
    ) -> None:
        self._source = source
        self._specials = specials
        self._output_chars = output_chars
        self._shaper = Shaper(source, special_tokens)
        # Autoescaping is for HTML; prompts are plain text, as in transformers.
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelInvalid(f"chat_template line {error.lineno}: {error.message}") from error
        except (TemplateError, RecursionError, MemoryError, ValueError, SyntaxError, TypeError) as error:
            raise ModelInvalid(f"chat_template does not compile ({type(error).__name__})") from error

    def render(self, messages: Sequence[ChatMessage], options: ChatOptions, *, now: float) -> str:
        """The prompt's text, `GUARD`s in it. Raises `InvalidInput` when the template fails, `TooLarge` when it gives
        too much.
        """
        values = {
            **self._specials,
            **self._shaper.values(messages, options),
            "documents": None,
            "strftime_now": _strftime(now),
        }
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(values):
                length += len(part)
                if length > self._output_chars:
                    raise TooLarge(f"the chat template gave over {self._output_chars} characters", "messages")
                parts.append(part)
        except TooLarge:
            raise
        except _TemplateRefusalError as error:
            raise InvalidInput(self._reason(str(error)), "messages") from error
        except MemoryError as error:
            raise TooLarge("the chat template asked for too much memory", "messages") from error
        except _EXPRESSION_ERRORS as error:
            raise InvalidInput(
                f"the chat template failed on these messages ({type(error).__name__})", "messages"
            ) from error
        return "".join(parts)

    def _reason(self, text: str) -> str:
        """The template's own words, if they are literally in its source: anything else could be prompt text."""
        if len(text) <= MAX_REASON_CHARS and text in self._source:
            return f"the chat template refused the messages: {text}"
        return "the chat template refused the messages"


def _raise_exception(message: object) -> None:
    raise _TemplateRefusalError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON without HTML escapes, as transformers gives templates. Arguments of a call are as they were written."""
    if isinstance(value, Arguments) and indent is None and not sort_keys and not ensure_ascii:
        return value.text
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError("indent is over the limit")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _strftime(now: float) -> Callable[[str], str]:
    """`strftime_now`: the time of the request, in UTC."""

    def strftime_now(form: str) -> str:
        if len(form) > MAX_DATE_FORMAT or not _DATE_FORMAT.fullmatch(form):
            raise SecurityError("the date format is not accepted")
        return datetime.fromtimestamp(now, tz=UTC).strftime(form)

    return strftime_now
