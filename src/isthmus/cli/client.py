"""A small client of the OpenAI edge, over the standard library: JSON requests, streamed answers, clear failures."""

import http.client
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from isthmus.cli.failure import REFUSED, UNREACHABLE, USAGE, CommandFailed
from isthmus.cli.terminal import printable
from isthmus.contracts.clock import Clock

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0
MAX_LINE_BYTES = 1024 * 1024
MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_CALLS = 128


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, or of the reasoning before it."""

    text: str
    reasoning: bool = False


@dataclass(slots=True)
class Call:
    """A tool call, as far as it has come. `arguments` is JSON text once the answer is complete."""

    id: str
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """What came back: text, reasoning and calls so far and, from the last event, the usage. Times in seconds."""

    text: str = ""
    reasoning: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    request_id: str = ""
    finish: str = ""
    first_token_s: float | None = None
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line: tokens, rate, time to the first token, reuse, id."""
        tokens = self.usage.get("completion_tokens")
        prompt = self.usage.get("prompt_tokens")
        details = self.usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
        parts: list[str] = []
        if isinstance(tokens, int):
            parts.append(f"{tokens} tokens")
            # Over the whole answer: what a client sees after the first token depends on how its reads were scheduled.
            if self.total_s > 0:
                parts.append(f"{tokens / self.total_s:.0f} tokens/s")
        if self.first_token_s is not None:
            parts.append(f"first after {self.first_token_s * 1000:.0f} ms")
        if isinstance(prompt, int):
            parts.append(f"{cached} of {prompt} cached")
        if self.finish and self.finish not in ("stop", "tool_calls"):
            parts.append(f"ended by {printable(self.finish)}")
        if self.request_id:
            parts.append(printable(self.request_id))
        return " · ".join(parts)


class Client:
    """Talks to one server. Raises `CommandFailed` with a message for people."""

    def __init__(self, url: str, clock: Clock) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._clock = clock
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise CommandFailed(f"{url} is no URL: {error}", USAGE) from error
        if parts.scheme not in ("http", "https") or not self._host:
            raise CommandFailed(f"{url} is no http(s) URL", USAGE)
        self._secure = parts.scheme == "https"
        self._path = parts.path

    def model(self) -> str:
        """The name of the first model served."""
        with self._request("GET", "/v1/models", None) as response:
            data = response.read(MAX_ANSWER_BYTES)
        try:
            return str(json.loads(data)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise CommandFailed(f"{self.url} answers, but not as an OpenAI server") from error

    def stream(self, path: str, body: Mapping[str, Any], answer: Answer) -> Generator[Piece, None, None]:
        """Ask for a streamed answer; what is to be read of it as it comes, calls aside. `answer` is filled on the way,
        also when left early.
        """
        started = self._clock.monotonic()
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._request("POST", path, asked) as response:
            for event in _events(response):
                answer.total_s = self._clock.monotonic() - started
                pieces = _read_event(event, answer)
                if answer.first_token_s is None and (pieces or answer.calls):
                    answer.first_token_s = answer.total_s
                yield from pieces

    @contextmanager
    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        """Send, check the status, and close the connection in the end (which stops the work at the server)."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        response: http.client.HTTPResponse | None = None
        try:
            try:
                connection.connect()
                connection.sock.settimeout(READ_TIMEOUT_S)
                data = None if body is None else json.dumps(body)
                connection.request(method, self._path + path, data, {"Content-Type": "application/json"})
                response = connection.getresponse()
            except ConnectionRefusedError as error:
                message = f"no server answers at {self.url}; start one with `isthmus serve` in another terminal"
                raise CommandFailed(message, UNREACHABLE) from error
            if response.status != http.client.OK:
                raise CommandFailed(_refusal(response), REFUSED)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise CommandFailed(f"the connection to {self.url} failed: {error}", UNREACHABLE) from error
        finally:
            if response is not None:
                response.close()
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event (WHATWG HTML, section 9.2, `data` lines only)."""
    while line := response.readline(MAX_LINE_BYTES):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise CommandFailed("the server sent an event that is not JSON", REFUSED) from error
        if not isinstance(event, dict):
            raise CommandFailed("the server sent an event that is no object", REFUSED)
        yield event
    raise CommandFailed("the server ended the answer before it was complete", REFUSED)


def _read_event(event: dict[str, Any], answer: Answer) -> list[Piece]:
    """What is to be read in one event; all of it goes to `answer`."""
    error = event.get("error")
    if isinstance(error, dict):
        raise CommandFailed(f"the server failed: {printable(str(error.get('message', '')))[:500]}", REFUSED)
    answer.request_id = str(event.get("id") or answer.request_id)
    if isinstance(event.get("usage"), dict):
        answer.usage = event["usage"]
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return []
    choice = choices[0]
    answer.finish = str(choice.get("finish_reason") or answer.finish)
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        delta = {"content": choice.get("text")}
    # vLLM's newer name for the same thing.
    reasoning = _text(delta, "reasoning_content") or _text(delta, "reasoning")
    text = _text(delta, "content")
    answer.reasoning += reasoning
    answer.text += text
    _read_calls(delta.get("tool_calls"), answer)
    return [piece for piece in (Piece(reasoning, reasoning=True), Piece(text)) if piece.text]


def _read_calls(parts: object, answer: Answer) -> None:
    """Add parts of tool calls to those of `answer`."""
    for part in parts if isinstance(parts, list) else ():
        index = part.get("index") if isinstance(part, dict) else None
        function = part.get("function") if isinstance(part, dict) else None
        if not isinstance(index, int) or not isinstance(function, dict) or not 0 <= index < MAX_CALLS:
            raise CommandFailed("the server sent a tool call that is none", REFUSED)
        call = answer.calls.setdefault(index, Call(""))
        call.id = call.id or _text(part, "id")
        call.name += _text(function, "name")
        call.arguments += _text(function, "arguments")


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


def _refusal(response: http.client.HTTPResponse) -> str:
    """What the server said, or only its status."""
    try:
        message = json.loads(response.read(MAX_ANSWER_BYTES))["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.reason
    text = f"the server refused ({response.status}): {printable(str(message))[:500]}"
    retry = response.getheader("Retry-After")
    return f"{text}; try again in {printable(retry)} s" if retry else text
