"""What the headers of a request say about the future of its state.

    x-isthmus-session: <name>                  requests of one conversation carry the same
    x-isthmus-hint: turn_ended | done | waiting=<seconds> | pin=<seconds>      what follows when this request has ended

Hints are advice: they move state between tiers and never change an answer.
"""

import re
from dataclasses import dataclass

from isthmus.contracts.blocks import MAX_SESSION_CHARS, HintKind
from isthmus.contracts.requests import MAX_DEADLINE_S
from isthmus.gateway.context import Call
from isthmus.gateway.errors import HttpError

SESSION_HEADER = "x-isthmus-session"
HINT_HEADER = "x-isthmus-hint"

_TIMED = (HintKind.WAITING, HintKind.PIN)
_HINT = re.compile(r"(turn_ended|done|waiting|pin)(?:=([0-9]{1,8}(?:\.[0-9]{1,3})?))?")


@dataclass(frozen=True, slots=True)
class StateHints:
    """What the headers of a request say; see `EngineRequest`."""

    session: str = ""
    hint: HintKind | None = None
    seconds: float = 0.0


NO_HINTS = StateHints()


def state_hints(call: Call) -> StateHints:
    """What the headers of `call` say. Raises `HttpError` 400 naming the header."""
    headers = call.exchange.request.headers
    session, said = headers.get(SESSION_HEADER, ""), headers.get(HINT_HEADER)
    if len(session) > MAX_SESSION_CHARS:
        raise _refused(f"{SESSION_HEADER} has at most {MAX_SESSION_CHARS} characters", SESSION_HEADER)
    if said is None:
        return StateHints(session)
    found = _HINT.fullmatch(said)
    if found is None or ((found[2] is None) == (HintKind(found[1]) in _TIMED)):
        message = f"{HINT_HEADER} is turn_ended, done, waiting=<seconds> or pin=<seconds>"
        raise _refused(message, HINT_HEADER)
    seconds = float(found[2] or 0)
    if seconds > MAX_DEADLINE_S:
        raise _refused(f"{HINT_HEADER} is at most {MAX_DEADLINE_S:.0f} seconds ahead", HINT_HEADER)
    return StateHints(session, HintKind(found[1]), seconds)


def _refused(message: str, param: str) -> HttpError:
    return HttpError(400, message, code="invalid_input", param=param)
