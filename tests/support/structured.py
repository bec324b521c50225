"""Constrained requests on a real engine process with the embedded model, and what became of each."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import jsonschema
import msgspec
from tests.support.requests import make_request
from tokenizers import Tokenizer

from isthmus import worker
from isthmus.config import Settings
from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import IsthmusError
from isthmus.contracts.events import Finish
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.client import EngineProcess, to_error
from isthmus.execution.inference.grammar.settings import GrammarSettings
from isthmus.execution.inference.settings import EngineSettings, SchedulerSettings

FOLDER = Settings().model_folder
PROMPT = list(range(40, 72))


@dataclass
class Outcome:
    """What a request gave. `steps` has the number of tokens of each output."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    error: IsthmusError | None = None
    steps: list[int] = field(default_factory=list)


def constrained(request_id: str, kind: ConstraintKind, text: str, **options: Any) -> EngineRequest:
    """A request with a constraint; `output_ids` and sampling as in `make_request`."""
    request = make_request(request_id, list(options.pop("prompt", PROMPT)), **{"max_tokens": 96, **options})
    return msgspec.structs.replace(request, constraint=Constraint(kind, text))


@asynccontextmanager
async def engine(grammar: GrammarSettings | None = None, **options: Any) -> AsyncIterator[EngineProcess]:
    """An engine process; `options` are the scheduler's, `exact` apart."""
    settings = EngineSettings(
        model=str(FOLDER),
        name="fake",
        kv_bytes=1 << 25,
        exact=options.pop("exact", False),
        threads=1,
        grammar=grammar or GrammarSettings(compile_s=20.0, step_s=20.0),
        scheduler=SchedulerSettings(**options),
    )
    process = EngineProcess.spawn(settings, worker.command(None))
    try:
        await process.ready(lambda stage, fraction: None)
        yield process
    finally:
        await process.close()


class Texts:
    """Token ids to text."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    def text(self, ids: Sequence[int], ends: Sequence[int]) -> str:
        return str(self._tokenizer.decode([one for one in ids if one not in ends], skip_special_tokens=False))

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def brevity(self) -> dict[int, float]:
        """A logit bias under which the model ends what is open: quotes, then brackets and the text, then commas.

        Where the model goes on with a string or a list until `max_tokens`, nothing is learned about the end of it.
        To be taken with a frequency penalty, which gets it past what must come first (a digit, an at sign).
        """
        biases = {'"': 100.0, "}": 40.0, "]": 40.0, "<|end|>": 40.0, ",": 36.0, "@": 32.0, ".": 32.0, "blank": -40.0}
        biases |= dict.fromkeys("0257DS", 32.0)
        found: dict[int, float] = {}
        for token in range(self._tokenizer.get_vocab_size()):
            text = str(self._tokenizer.decode([token], skip_special_tokens=False))
            bias = biases.get("blank" if text and text.isspace() else text)
            if bias is not None:
                found[token] = bias
        return found


async def ask(process: EngineProcess, request: EngineRequest, texts: Texts) -> Outcome:
    """Run one request to its end."""
    outcome = Outcome(list(request.output_ids))
    try:
        async for output in process.submit(request):
            outcome.ids += output.token_ids
            if output.token_ids:
                outcome.steps.append(len(output.token_ids))
            outcome.finish = output.finish
            if output.error is not None:
                outcome.error = to_error(output.error)
    except IsthmusError as error:
        outcome.error = error
    outcome.text = texts.text(outcome.ids, process.info.eos_token_ids)
    return outcome


async def ask_all(process: EngineProcess, requests: Sequence[EngineRequest], at_once: int = 16) -> list[Outcome]:
    """Run many, `at_once` at a time."""
    texts, gate = Texts(), asyncio.Semaphore(at_once)

    async def one(request: EngineRequest) -> Outcome:
        async with gate:
            return await ask(process, request, texts)

    return list(await asyncio.gather(*(one(request) for request in requests)))


def verdict(schema: dict[str, Any], outcome: Outcome) -> str:
    """`valid`, `truncated` or `refused`. Raises when the output breaks the schema or ends otherwise."""
    if outcome.error is not None:
        if not str(outcome.error):
            raise AssertionError("refused without a reason")
        return "refused"
    if outcome.finish is Finish.LENGTH:
        return "truncated"
    if outcome.finish is not Finish.STOP:
        raise AssertionError(f"ended with {outcome.finish}")
    jsonschema.Draft202012Validator(schema, format_checker=_FORMATS).validate(json.loads(outcome.text))
    return "valid"


_FORMATS = jsonschema.FormatChecker(())
_FORMATS.checkers = dict(jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers)
_TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)", re.ASCII)
_DATE = re.compile(r"\d{4}-(\d\d-\d\d)", re.ASCII)


def _is_date(text: object) -> bool:
    """RFC 3339, year 0000 with it, but for what docs/structured-output.md states: any year may be a leap year."""
    found = _DATE.fullmatch(text) if isinstance(text, str) else None
    return not isinstance(text, str) or (found is not None and date.fromisoformat(f"2000-{found[1]}").year == 2000)


def _is_time(text: object) -> bool:
    return not isinstance(text, str) or _TIME.fullmatch(text) is not None


def _is_date_time(text: object) -> bool:
    return not isinstance(text, str) or (_is_date(text[:10]) and text[10:11] in "Tt" and _is_time(text[11:]))


_FORMATS.checkers |= {
    "date": (_is_date, ValueError),
    "time": (_is_time, ValueError),
    "date-time": (_is_date_time, ValueError),
}
