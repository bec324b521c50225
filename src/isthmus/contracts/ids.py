"""Identifiers and the limits on them.

A request id is chosen by the gateway (or taken from a valid `x-request-id` header): printable, short, safe in logs,
file names and SQL. A namespace is 32 bytes that the gateway derives from a tenant's secret; workers never see the
secret.
"""

import re
from typing import NewType

from isthmus.contracts.clock import Entropy
from isthmus.contracts.errors import InvalidInput

RequestId = NewType("RequestId", str)
Namespace = NewType("Namespace", bytes)

NAMESPACE_BYTES = 32
MAX_ID_CHARS = 128
MAX_MODEL_NAME_CHARS = 256

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def request_id(text: str) -> RequestId:
    """Check `text` as a request id. Raises `InvalidInput` naming the limit."""
    if not _ID.fullmatch(text):
        raise InvalidInput(f"a request id has 1 to {MAX_ID_CHARS} characters of A-Z a-z 0-9 . _ : -", "request_id")
    return RequestId(text)


def new_request_id(prefix: str, entropy: Entropy) -> RequestId:
    """A fresh id, e.g. `chatcmpl-1f0c...` (96 random bits)."""
    return request_id(f"{prefix}-{entropy.token_bytes(12).hex()}")


def namespace(raw: bytes) -> Namespace:
    """Check `raw` as a tenant namespace (exactly 32 bytes). Raises `InvalidInput`."""
    if len(raw) != NAMESPACE_BYTES:
        raise InvalidInput(f"a namespace has {NAMESPACE_BYTES} bytes, not {len(raw)}", "namespace")
    return Namespace(raw)
