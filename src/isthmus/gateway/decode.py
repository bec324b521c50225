"""JSON in: bounded before it is parsed, strict while it is parsed, every refusal names the field and the limit.

The order: byte limit (the connection's), UTF-8, nesting depth (a scan without recursion), then msgspec into a struct.
Messages are built from field names, limits and types only, so that what a client sent is never repeated.
"""

import re
from collections.abc import Hashable, Set
from functools import lru_cache
from typing import Any, TypeVar, cast

import msgspec

from isthmus.gateway.errors import HttpError
from isthmus.gateway.message import HttpRequest
from isthmus.gateway.schema_requests import UNSUPPORTED_FIELDS
from isthmus.gateway.settings import GatewaySettings

T = TypeVar("T")

MAX_JSON_STRINGS = 200_000
"""Strings of one body: far over the largest conversation, small enough to scan at once."""

_STRINGS = re.compile(rb'"[^"]*"?')
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`$")
# What says of what kind a thing is: a kind that is not known here may well be one that others support.
_KIND = re.compile(r"(content\[\d+\]|tools\[\d+\]|tool_choice|response_format)\.type$")
_HINTS = {
    "functions": "is deprecated and not supported by this server: send tools",
    "function_call": "is deprecated and not supported by this server: send tool_choice",
}
_FIELD_NAME = re.compile(r"\w{1,64}")


@lru_cache(maxsize=16)
def _decoder(type_: Hashable) -> msgspec.json.Decoder[Any]:
    """One decoder a struct: they are few, and building one walks its type."""
    return msgspec.json.Decoder(cast("type[Any]", type_))


def decode_json(
    request: HttpRequest, type_: type[T], settings: GatewaySettings, unsupported: Set[str] = UNSUPPORTED_FIELDS
) -> T:
    """The body of `request` as a `type_`. Raises `HttpError` 400 or 415. The raw body is let go.

    `unsupported` are the fields of the dialect that are known and taken only with the value that means off.
    """
    check_content_type(request.headers.get("content-type"))
    body = bytes(request.body)
    request.body.clear()
    if not body:
        raise HttpError(400, "the request has no body", code="invalid_json")
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from None
    check_depth(body, settings.max_json_depth)
    try:
        value: T = _decoder(cast("Hashable", type_)).decode(body)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error), unsupported) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise HttpError(400, "the body is not valid JSON", code="invalid_json") from None
    return value


def check_content_type(value: str | None) -> None:
    """Refuse a body that is not declared as JSON. Raises `HttpError` 415."""
    media_type, _, parameters = (value or "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if media_type.strip().lower() != "application/json" or charset not in {"", "charset=utf-8"}:
        raise HttpError(415, "the content type is application/json, in UTF-8", code="unsupported_media_type")


def check_depth(body: bytes, limit: int) -> None:
    """Refuse nesting over `limit` before any parser recurses. Raises `HttpError` 400.

    A handful of linear passes in C: escapes out, everything but quotes and brackets out, strings out; then each round
    takes away the innermost brackets, so what is left after `limit` rounds is nested deeper (or is not balanced).
    """
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    if bare.count(b'"') > 2 * MAX_JSON_STRINGS:
        raise HttpError(400, f"the JSON body has over {MAX_JSON_STRINGS} strings", code="too_large")
    # One kind of bracket, so that a round takes one level; the parser finds pairs that do not match.
    brackets = _STRINGS.sub(b"", bare).translate(_ONE_KIND)
    if brackets.count(b"[") <= limit:
        return
    for _ in range(limit):
        inner = brackets.replace(b"[]", b"")
        if len(inner) == len(brackets):
            raise HttpError(400, "the body is not valid JSON", code="invalid_json")
        brackets = inner
        if not brackets:
            return
    raise HttpError(400, f"the JSON body is nested over {limit} levels deep", code="too_large")


def invalid_field(text: str, unsupported: Set[str] = UNSUPPORTED_FIELDS) -> HttpError:
    """A complaint of msgspec as an error that names the field by its path and repeats nothing that was sent."""
    found = _PATH.search(text)
    path = found.group(1) if found else ""
    what = text[: found.start()] if found else text
    unknown = _UNKNOWN.match(what)
    missing = _MISSING.match(what)
    if unknown is not None:
        name = unknown.group(1)
        # A name that looks like a field is named; anything else could be content that slipped into a key.
        name = name if _FIELD_NAME.fullmatch(name) else ""
        return _unknown_field(path, name)
    if missing is not None:
        param = f"{path}.{missing.group(1)}" if path else missing.group(1)
        return HttpError(400, f"the field {param} is required", code="missing_field", param=param)
    top = re.split(r"[.\[]", path, maxsplit=1)[0]
    leaf = path.rpartition(".")[2].partition("[")[0]
    if top in unsupported or leaf in unsupported or _KIND.search(path):
        return unsupported_field(path)
    if what.startswith(("Invalid enum value", "Invalid value")):
        what = "the value is not one of those accepted"
    return HttpError(400, f"{path or 'body'}: {what}", code="invalid_input", param=path or None)


def unsupported_field(path: str) -> HttpError:
    """A known field whose use this build does not support."""
    hint = _HINTS.get(path, "is not supported by this server")
    return HttpError(400, f"{path} {hint}", code="unsupported", param=path)


def _unknown_field(path: str, name: str) -> HttpError:
    param = ".".join(part for part in (path, name) if part) or None
    if re.search(r"content\[\d+\]$", path):
        return HttpError(400, f"{path} is not a text part; only text is supported", code="unsupported", param=param)
    return HttpError(400, f"unknown field {param or 'in the body'}", code="unknown_field", param=param)
