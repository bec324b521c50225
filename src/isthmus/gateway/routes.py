"""The routes: a path, the methods it takes, and what answers it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from isthmus import __version__
from isthmus.contracts.errors import Draining
from isthmus.gateway.anthropic import ANTHROPIC_ERRORS, count_tokens, messages
from isthmus.gateway.chat import chat_completions
from isthmus.gateway.completions import completions
from isthmus.gateway.context import Call
from isthmus.gateway.errors import HttpError
from isthmus.gateway.hints import give_hint
from isthmus.gateway.openapi import document
from isthmus.gateway.render import OPENAI_ERRORS, ErrorFormat, encode
from isthmus.gateway.schema_responses import Model, ModelList, Status, Version
from isthmus.gateway.service import Service
from isthmus.gateway.tokens import detokenize, tokenize

JSON = "application/json"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

Handler = Callable[[Service, Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """A path and its handlers. `id_prefix` starts the ids of its requests; `gated` ones count in flight.

    `errors` is how the dialect spoken there writes them.
    """

    pattern: str
    method: str
    handler: Handler
    id_prefix: str = "req"
    gated: bool = False
    errors: ErrorFormat = OPENAI_ERRORS

    @property
    def methods(self) -> tuple[str, ...]:
        """What the Allow header says."""
        return ("GET", "HEAD", "OPTIONS") if self.method == "GET" else (self.method, "OPTIONS")


async def health(service: Service, call: Call) -> None:
    """200 while the engine lives (`EngineFailed`, a 503, once it does not)."""
    _ = service.engine.info
    await call.exchange.respond(200, encode(Status("ok")), JSON)


async def ready(service: Service, call: Call) -> None:
    """200 while new requests are taken."""
    _ = service.engine.info
    if service.draining():
        raise Draining("this server is draining")
    await call.exchange.respond(200, encode(Status("ready")), JSON)


async def metrics(service: Service, call: Call) -> None:
    """Prometheus' text format."""
    body = service.deps.metrics.render(service.engine.stats, service.info)
    await call.exchange.respond(200, body, PROMETHEUS)


async def version(service: Service, call: Call) -> None:
    """The version of this server."""
    del service
    await call.exchange.respond(200, encode(Version(__version__)), JSON)


async def openapi(service: Service, call: Call) -> None:
    """The interface as an OpenAPI 3.1 document."""
    del service
    await call.exchange.respond(200, encode(document()), JSON)


def _model(service: Service) -> Model:
    info = service.info
    return Model(info.name, "model", int(service.started_wall), "isthmus", info.max_model_len)


async def models(service: Service, call: Call) -> None:
    """The served model, as a list."""
    await call.exchange.respond(200, encode(ModelList("list", [_model(service)])), JSON)


async def one_model(service: Service, call: Call) -> None:
    """One model by name (names may contain slashes, as Hugging Face's do)."""
    service.planner.check_model(call.exchange.request.path.removeprefix(MODEL_PREFIX))
    await call.exchange.respond(200, encode(_model(service)), JSON)


MODEL_PREFIX = "/v1/models/"
_ONE_MODEL = Route("/v1/models/{model}", "GET", one_model)

ROUTES = {
    route.pattern: route
    for route in (
        Route("/v1/chat/completions", "POST", chat_completions, "chatcmpl", gated=True),
        Route("/v1/completions", "POST", completions, "cmpl", gated=True),
        Route("/v1/messages", "POST", messages, "msg", gated=True, errors=ANTHROPIC_ERRORS),
        Route("/v1/messages/count_tokens", "POST", count_tokens, "msg", gated=True, errors=ANTHROPIC_ERRORS),
        Route("/v1/state/hints", "POST", give_hint, gated=True),
        Route("/tokenize", "POST", tokenize, gated=True),
        Route("/detokenize", "POST", detokenize, gated=True),
        Route("/v1/models", "GET", models),
        Route("/health", "GET", health),
        Route("/ready", "GET", ready),
        Route("/metrics", "GET", metrics),
        Route("/version", "GET", version),
        Route("/openapi.json", "GET", openapi),
    )
}


def find_route(path: str) -> Route | None:
    """The route that serves `path`."""
    route = ROUTES.get(path)
    if route is None and len(path) > len(MODEL_PREFIX) and path.startswith(MODEL_PREFIX):
        return _ONE_MODEL
    return route


def check_method(route: Route | None, method: str) -> Route:
    """The route, if it exists and takes `method`. Raises `HttpError` 404 or 405 with Allow."""
    if route is None:
        raise HttpError(404, "there is nothing at this path", code="not_found")
    if method not in route.methods:
        allow = ", ".join(route.methods)
        message = f"{route.pattern} takes {allow}"
        raise HttpError(405, message, code="method_not_allowed", headers=(("allow", allow),))
    return route
