"""Tokens as OpenAI shows them: log probabilities, usage, and the shared frame of a stream's events."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from isthmus.contracts.events import TokenLogprob
from isthmus.gateway.errors import HttpError
from isthmus.gateway.exchange import Exchange
from isthmus.gateway.schema_responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptTokensDetails,
    TokenLogprobEntry,
    TopLogprob,
    Usage,
)
from isthmus.gateway.sequence import Delta, SequenceState, TextOffsets

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode
TokenBytes = Callable[[int], bytes]


def event(value: object) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


@dataclass(frozen=True, slots=True)
class ErrorFormat:
    """How a dialect writes an error: as the body of an answer, and as the last events of a stream that has begun.

    Both are given the error and the request's id.
    """

    body: Callable[[HttpError, str], bytes]
    events: Callable[[HttpError, str], bytes]


OPENAI_ERRORS = ErrorFormat(lambda error, _: encode(error.body), lambda error, _: event(error.body) + DONE)


def usage(states: Sequence[SequenceState], n: int) -> Usage:
    """The token counts of a request whose prompts have `n` sequences each, in order: a prompt counts once."""
    first = states[::n]
    prompt = sum(state.prompt_tokens for state in first)
    output = sum(state.output_tokens for state in states)
    cached = PromptTokensDetails(sum(state.cached_tokens for state in first))
    return Usage(prompt, output, prompt + output, cached)


def chat_logprobs(delta: Delta, token_bytes: TokenBytes) -> ChatLogprobs | None:
    """The log probabilities of `delta` in the chat shape."""
    if delta.logprobs is None:
        return None
    entries = []
    for token, item in zip(delta.token_ids, delta.logprobs, strict=True):
        raw = token_bytes(token)
        top = [_top(token_bytes(other), value) for other, value in item.top]
        entries.append(TokenLogprobEntry(raw.decode("utf-8", "replace"), item.logprob, list(raw), top))
    return ChatLogprobs(entries)


def _top(raw: bytes, value: float) -> TopLogprob:
    return TopLogprob(raw.decode("utf-8", "replace"), value, list(raw))


def completion_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes, offsets: TextOffsets
) -> CompletionLogprobs:
    """The log probabilities of tokens in the legacy completions shape."""
    tokens, values, tops, places = [], [], [], []
    for token, item in zip(token_ids, logprobs, strict=True):
        raw = token_bytes(token)
        tokens.append(legacy_token(raw))
        values.append(item.logprob)
        tops.append({legacy_token(token_bytes(other)): value for other, value in item.top})
        places.append(offsets.next(raw))
    return CompletionLogprobs(tokens, values, tops if any(tops) else None, places)


def legacy_token(raw: bytes) -> str:
    """A token as a string; bytes that are not UTF-8 on their own as hex behind `bytes:`, as OpenAI's legacy API did."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(slots=True)
class Tail:
    """Writes a stream's events: one write a step, and the last step together with the end of the stream.

    `done` is what the dialect ends every stream with.
    """

    exchange: Exchange
    sequences: int
    done: bytes = DONE
    _held: bytes = b""
    _ended: int = field(default=0)

    async def put(self, data: bytes, *, last: bool) -> None:
        """Send `data` now, or with the end of the stream if it is the last of the last sequence."""
        if last:
            self._ended += 1
            if self._ended == self.sequences:
                self._held = data
                return
        if data:
            await self.exchange.send(data)

    async def end(self, data: bytes) -> None:
        """Send what is held, `data`, and the end."""
        await self.exchange.end(self._held + data + self.done)
