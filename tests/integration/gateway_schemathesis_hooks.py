"""What JSON Schema cannot say about the gateway's bodies, for schemathesis."""

from typing import Any

import schemathesis

DEFAULT_MAX_TOKENS = 4096


def fractions(value: Any) -> bool:
    """Whether a whole number is written as a fraction (28.0), which the gateway does not take for an integer."""
    if isinstance(value, dict):
        return any(fractions(item) for item in value.values())
    if isinstance(value, list):
        return any(fractions(item) for item in value)
    return isinstance(value, float) and value.is_integer()


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    body = case.body
    if not isinstance(body, dict):
        return True
    least, most = body.get("min_tokens"), body.get("max_completion_tokens") or body.get("max_tokens")
    numbers = isinstance(least, int) and isinstance(most or DEFAULT_MAX_TOKENS, int)
    return not fractions(body) and not (numbers and least > (most or DEFAULT_MAX_TOKENS))


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Reach further: valid deadlines are too long to be met (a 504 that was asked for), most models are served."""
    headers, body = case.headers or {}, case.body
    timeout = str(headers.get("x-request-timeout-ms", ""))
    if timeout.isdigit() and 1 <= int(timeout) < 60_000:
        headers["x-request-timeout-ms"] = "60000"
    model = body.get("model") if isinstance(body, dict) else None
    if isinstance(model, str) and 1 <= len(model) <= 256 and len(model) % 4:
        body["model"] = "fake/bytes"
    return case
