"""Sends the asks of a workload to an OpenAI-compatible server, on time, and notes when each token came.

Plain HTTP/1.1 over asyncio streams, one connection an ask: the reader costs little, and the same for every server.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.bench.model import TOKEN_CHARS
from isthmus.bench.workloads import Ask
from isthmus.contracts.errors import InvalidInput

ANSWER_TIMEOUT_S = 600.0
MAX_LINE_BYTES = 1 << 22


@dataclass(slots=True)
class Trace:
    """What was seen of one ask: seconds since the workload's start, when it was sent, and (when, how many tokens)."""

    sent_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens came."""
        return sum(count for _, count in self.arrivals)


class BadAnswer(Exception):
    """A target answered with an error, or not at all."""


async def ask_server(port: int, model: str, asks: Sequence[Ask]) -> list[Trace]:
    """Send every ask at its time to the server at `port` of this machine. Raises `BadAnswer`."""
    start = time.perf_counter()
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        return list(await asyncio.gather(*(_one(port, model, ask, start) for ask in asks)))


async def _one(port: int, model: str, ask: Ask, start: float) -> Trace:
    await asyncio.sleep(max(0.0, ask.at_s - (time.perf_counter() - start)))
    body = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    trace = Trace(time.perf_counter() - start)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE_BYTES)
        try:
            writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            await _read(reader, trace, start)
        finally:
            writer.close()
            await writer.wait_closed()
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        raise BadAnswer(f"the server at port {port} broke off: {error}") from error
    if trace.tokens != ask.output:
        raise BadAnswer(f"{trace.tokens} tokens came, {ask.output} were asked for")
    return trace


async def _read(reader: asyncio.StreamReader, trace: Trace, start: float) -> None:
    status = await reader.readline()
    if b" 200 " not in status:
        rest = (await reader.read(4096)).decode(errors="replace")
        raise BadAnswer(f"{status.decode(errors='replace').strip()}: {rest[-500:]}")
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter() - start
        count = tokens_in(json.loads(line[6:]))
        if count:
            trace.arrivals.append((now, count))


def tokens_in(event: dict[str, Any]) -> int:
    """How many tokens the text of an event is. Raises `InvalidInput` when it is not whole tokens."""
    text = "".join(str(choice.get("text") or "") for choice in event.get("choices", ()))
    count, rest = divmod(len(text), TOKEN_CHARS)
    if rest:
        raise InvalidInput(f"an event has {len(text)} characters, not a multiple of {TOKEN_CHARS}", "text")
    return count
