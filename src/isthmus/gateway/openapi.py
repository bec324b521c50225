"""The OpenAPI 3.1 document, generated from the structs that the server decodes and encodes, so it cannot drift.

`python -m isthmus.gateway.openapi` prints it; docs/openapi.json is its output, and a test says whether it is current.
"""

import sys
from functools import lru_cache
from typing import Any

import msgspec

from isthmus import __version__
from isthmus.gateway.anthropic_schema import AnthropicError, CountRequest, MessageOut, MessagesRequest, TokenCount
from isthmus.gateway.errors import ErrorBody
from isthmus.gateway.schema_requests import (
    IGNORED_FIELDS,
    MAX_TOKEN_ID,
    UNSUPPORTED_FIELDS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    HintRequest,
    TokenizeRequest,
)
from isthmus.gateway.schema_responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    Model,
    ModelList,
    Status,
    TokenizeResponse,
    Version,
)

Json = dict[str, Any]

_STRUCTS = (
    ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, HintRequest, ErrorBody, ChatCompletion,
    ChatChunk, Completion, ModelList, Model, TokenizeResponse, DetokenizeResponse, Status, Version, MessagesRequest,
    CountRequest, MessageOut, TokenCount, AnthropicError,
)  # fmt: skip
_REF = "#/components/schemas/{name}"
_ID_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"
_ERRORS = {
    "400": "A field is wrong: `param` names it, `message` names the limit.",
    "403": "The Host header is not a loopback name (a server bound to loopback).",
    "404": "The model is not served here.",
    "408": "The request took too long to arrive.",
    "413": "The body is over the byte limit.",
    "415": "The content type is not application/json.",
    "417": "An expectation other than 100-continue.",
    "431": "The headers are over their limits.",
    "503": "Overloaded, draining, or the engine ended: try again after Retry-After seconds.",
    "504": "The deadline of the request passed.",
}
_GET_ERRORS = ("400", "403", "408", "431", "503")
_POST_ERRORS = (*_GET_ERRORS, "404", "413", "415", "417", "504")


def _ref(struct: type) -> Json:
    return {"$ref": _REF.format(name=struct.__name__)}


def _json(struct: type) -> Json:
    return {"application/json": {"schema": _ref(struct)}}


def _responses(content: Json, summary: str, errors: tuple[str, ...], error: type = ErrorBody) -> Json:
    headers = {
        "x-request-id": {"description": "The request's id.", "schema": {"type": "string"}, "required": True},
        "traceparent": {"description": "W3C trace context.", "schema": {"type": "string"}, "required": True},
    }
    found: Json = {"200": {"description": summary, "content": content, "headers": headers}}
    for status in sorted(errors):
        found[status] = {"description": _ERRORS[status], "content": _json(error)}
        if status == "503":
            schema = {"type": "integer", "minimum": 1}
            found[status]["headers"] = {"retry-after": {"description": "Seconds.", "schema": schema}}
    return found


def _header(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _tracing() -> list[Json]:
    return [_header("x-request-id", "Returned, and kept in the log.", {"type": "string", "pattern": _ID_PATTERN})]


def _get(operation: str, summary: str, content: Json, extra: tuple[str, ...] = ()) -> Json:
    responses = _responses(content, summary, (*_GET_ERRORS, *extra))
    return {"get": {"operationId": operation, "summary": summary, "parameters": _tracing(), "responses": responses}}


def _post(operation: str, summary: str, body: type, content: Json, error: type = ErrorBody) -> Json:
    timeout = _header(
        "x-request-timeout-ms", "Deadline in milliseconds.", {"type": "integer", "minimum": 1, "maximum": 3_600_000}
    )
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "parameters": [*_tracing(), timeout],
            "requestBody": {"required": True, "content": _json(body)},
            "responses": _responses(content, summary, _POST_ERRORS, error),
        }
    }


def _streamed(struct: type, chunk: type) -> Json:
    """A JSON answer, or a stream of events. In OpenAPI 3.1 the schema of an event stream describes one event."""
    data = {
        "type": "string",
        "description": f"A {chunk.__name__} or, where it went wrong, an ErrorBody, as JSON; the last is [DONE].",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(chunk), _ref(ErrorBody), {"const": "[DONE]"}]},
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {**_json(struct), "text/event-stream": {"schema": event}}


def _events() -> Json:
    """An answer in Anthropic's dialect: a message, or a stream of named events."""
    data = {
        "type": "string",
        "description": "JSON whose type is the event's name: message_start, ping, content_block_start, "
        "content_block_delta, content_block_stop, message_delta, message_stop; or error, the last.",
        "contentMediaType": "application/json",
    }
    fields = {"event": {"type": "string"}, "data": data}
    event = {"type": "object", "properties": fields, "required": ["event", "data"]}
    return {**_json(MessageOut), "text/event-stream": {"schema": event}}


def _paths() -> Json:
    plain = {"text/plain": {"schema": {"type": "string"}}}
    anything = {"application/json": {"schema": {"type": "object"}}}
    model = _get("get_model", "One model by name.", _json(Model), ("404",))
    name = {"type": "string", "minLength": 1}
    model["get"]["parameters"].append({"name": "model", "in": "path", "required": True, "schema": name})
    return {
        "/v1/chat/completions": _post(
            "create_chat_completion", "Answer a conversation.", ChatRequest, _streamed(ChatCompletion, ChatChunk)
        ),
        "/v1/completions": _post(
            "create_completion", "Continue one or more prompts.", CompletionRequest, _streamed(Completion, Completion)
        ),
        "/v1/messages": _post(
            "create_message", "Answer a conversation (Anthropic).", MessagesRequest, _events(), AnthropicError
        ),
        "/v1/messages/count_tokens": _post(
            "count_tokens", "The tokens of a conversation (Anthropic).", CountRequest, _json(TokenCount), AnthropicError
        ),
        "/v1/models": _get("list_models", "The served models.", _json(ModelList)),
        "/v1/models/{model}": model,
        "/v1/state/hints": _post("giveHint", "What is known about a session's state.", HintRequest, _json(Status)),
        "/tokenize": _post("tokenize", "Text or messages to token ids.", TokenizeRequest, _json(TokenizeResponse)),
        "/detokenize": _post("detokenize", "Token ids to text.", DetokenizeRequest, _json(DetokenizeResponse)),
        "/health": _get("health", "200 while the engine lives.", _json(Status)),
        "/ready": _get("ready", "200 while new requests are taken.", _json(Status)),
        "/metrics": _get("metrics", "Prometheus' text format.", plain),
        "/version": _get("version", "The version of this server.", _json(Version)),
        "/openapi.json": _get("openapi", "This document.", anything),
    }


def _refine(schemas: Json) -> None:
    """State what the struct types cannot: one kind of prompt at a time, and fields that need another."""
    token = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
    tokens = {"type": "array", "items": token, "minItems": 1}
    completion = schemas["CompletionRequest"]
    completion["properties"]["prompt"] = {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
            tokens,
            {"type": "array", "items": tokens, "minItems": 1},
        ]
    }
    no_echo = {"properties": {"echo": {"enum": [False, None]}}}
    completion["anyOf"] = [no_echo, {"properties": {"logprobs": {"type": "null"}}}]
    no_top = {"properties": {"top_logprobs": {"enum": [0, None]}}}
    schemas["ChatRequest"]["anyOf"] = [no_top, {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]}]
    arguments = {"type": "object", "properties": {"type": {"const": "object"}}}
    schemas["FunctionDefinition"]["properties"]["parameters"]["anyOf"][0] = arguments
    schemas["ToolIn"]["properties"]["input_schema"] = arguments
    one, other = (
        schemas["TokenizeRequest"]["properties"]["prompt"],
        schemas["TokenizeRequest"]["properties"]["messages"],
    )
    text, messages = one["anyOf"][0], other["anyOf"][0]
    null = {"type": "null"}
    schemas["TokenizeRequest"]["anyOf"] = [
        {"required": ["prompt"], "properties": {"prompt": text, "messages": null}},
        {"required": ["messages"], "properties": {"messages": messages, "prompt": null}},
    ]


@lru_cache(maxsize=1)
def document() -> Json:
    """The document. The same for every server of this version."""
    _, schemas = msgspec.json.schema_components(_STRUCTS, ref_template=_REF)
    _refine(schemas)
    ignored = ", ".join(sorted(IGNORED_FIELDS))
    off = ", ".join(sorted(UNSUPPORTED_FIELDS))
    notes = (
        "OpenAI's and Anthropic's APIs over Isthmus. A field that is not listed is refused by name. "
        f"Accepted without effect: {ignored}. Accepted only with the value that means off: {off}. "
        "One of `response_format`, `structured_outputs` and the `guided_` fields may demand a form of the output; it "
        "is kept token by token, `strict` or not, or the request is refused with the reason. "
        "`max_completion_tokens` goes before `max_tokens`. `stream_options` has an effect on streams only. "
        "Messages in error objects never repeat what was sent."
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Isthmus",
            "version": __version__,
            "description": notes,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {"schemas": schemas},
    }


def render() -> str:
    """The document as indented JSON with a final newline, as it is kept in docs/."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=2).decode("utf-8") + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
