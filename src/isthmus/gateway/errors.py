"""Errors as HTTP: the one place where the error tree becomes a status and OpenAI's error object.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

`param` is the path of the offending field, `message` names the limit, `code` is stable. Messages never repeat content.
"""

import math

import msgspec

from isthmus.contracts.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidInput,
    IsthmusError,
    Overloaded,
    TooLarge,
    UnknownModel,
    Unsupported,
)
from isthmus.contracts.events import ErrorInfo

CLIENT_CLOSED_STATUS = 499
"""nginx's number for a client that went away; only in logs and lineage, never sent."""

INVALID = "invalid_request_error"
SERVER = "server_error"
UNAVAILABLE = "service_unavailable_error"

_CONTEXT_FIELDS = frozenset({"prompt", "messages", "max_tokens", "max_completion_tokens"})


class ErrorObject(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every response that is an error."""

    error: ErrorObject


class HttpError(Exception):
    """A refusal in HTTP terms: status, error object, and extra headers such as Allow or Retry-After."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        kind: str = INVALID,
        param: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(ErrorObject(message, kind, param, code))
        self.headers = headers

    @property
    def code(self) -> str:
        """The stable code of the error object."""
        return self.body.error.code or "internal"


def retry_after(seconds: float) -> tuple[tuple[str, str], ...]:
    """The Retry-After header: whole seconds, at least 1 (RFC 9110, 10.2.3)."""
    return (("retry-after", str(max(1, math.ceil(seconds)))),)


def context_length_exceeded(message: str, param: str) -> HttpError:
    """A prompt, or a prompt with its output limit, over the model's context, as OpenAI reports it."""
    return HttpError(400, message, code="context_length_exceeded", param=param)


def to_http(error: IsthmusError) -> HttpError:
    """`error` as HTTP. Anything without a rule of its own is a 500 that says nothing about the inside."""
    message = str(error)
    match error:
        case UnknownModel():
            return HttpError(404, message, code="model_not_found", param=error.field or "model")
        case Unsupported():
            return HttpError(400, message, code=error.code, param=error.field or None)
        case TooLarge():
            code = "context_length_exceeded" if error.field in _CONTEXT_FIELDS else error.code
            return HttpError(400, message, code=code, param=error.field or None)
        case InvalidInput():
            return HttpError(400, message, code=error.code, param=error.field or None)
        case Overloaded():
            headers = retry_after(error.retry_after_s)
            return HttpError(503, message, code=error.code, kind=UNAVAILABLE, headers=headers)
        case Draining():
            return HttpError(503, message, code=error.code, kind=UNAVAILABLE, headers=retry_after(1.0))
        case DeadlineExceeded():
            return HttpError(504, message, code=error.code, kind="timeout_error")
        case EngineFailed():
            return HttpError(503, message, code=error.code, kind=SERVER, headers=retry_after(1.0))
        case _:
            return internal_error()


def internal_error() -> HttpError:
    """What a client sees of a defect: nothing but that there is one."""
    return HttpError(500, "internal error", code="internal", kind=SERVER)


def from_wire(info: ErrorInfo) -> IsthmusError:
    """The error of the tree that an engine put into an output."""
    match info.code:
        case Overloaded.code:
            return Overloaded(info.message, info.retry_after_s or 1.0)
        case Draining.code:
            return Draining(info.message)
        case DeadlineExceeded.code:
            return DeadlineExceeded(info.message)
        case InvalidInput.code:
            return InvalidInput(info.message, info.field)
        case Unsupported.code:
            return Unsupported(info.message, info.field)
        case TooLarge.code:
            return TooLarge(info.message, info.field)
        case UnknownModel.code:
            return UnknownModel(info.message, info.field)
        case _:
            return EngineFailed(info.message)
