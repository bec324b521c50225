"""POST /v1/state/hints: what is known about a session's state, at any time between its requests.

{"session": ..., "hint": "prefetch" | "turn_ended" | "waiting" | "done" | "pin", "seconds": ...}: `prefetch` says that
the session's next turn is about to come. See state_hints.py for what a request's own headers say.
"""

from isthmus.contracts.events import SessionHint
from isthmus.gateway.context import Call
from isthmus.gateway.decode import decode_json
from isthmus.gateway.render import encode
from isthmus.gateway.schema_requests import HintRequest
from isthmus.gateway.schema_responses import Status
from isthmus.gateway.service import Service


async def give_hint(service: Service, call: Call) -> None:
    """Pass on a hint about a session."""
    body = decode_json(call.exchange.request, HintRequest, service.settings)
    service.engine.hint(SessionHint(service.deps.namespace, body.session, body.hint, body.seconds))
    await call.exchange.respond(200, encode(Status("ok")), "application/json")
