"""Whatever bytes come, in whatever pieces: the connection raises nothing, answers in order, and keeps its bounds."""

import asyncio
import logging
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.telemetry import Count
from isthmus.gateway.connection import Connection
from isthmus.gateway.exchange import Exchange
from isthmus.gateway.message import HttpRequest
from isthmus.gateway.outgoing import Disconnected
from isthmus.gateway.settings import GatewaySettings

GOOD = [
    b"GET /a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /c HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"POST /d HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /e HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
    b"GET /f HTTP/1.0\r\n\r\n",
]
JUNK = [
    b"\r\n", b"\x00", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 7\r\n", b"zz\r\n", b"GET ", b" HTTP/9.9\r\n",
    b"\xff\xfe", b": ", b"Host: x\r\n",
]  # fmt: skip


class Pipe(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.ended = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        return None

    def is_closing(self) -> bool:
        return self.ended

    def close(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        return None


class Desk:
    """A `Site` that answers every request with its path."""

    def __init__(self) -> None:
        self.settings = GatewaySettings(
            max_body_bytes=64, max_header_bytes=512, max_pipelined=3, max_buffered_bytes=128
        )
        self.clock = ManualClock()
        self.draining = False
        self.reserved = 0
        self.peak = 0

    def opened(self, connection: Connection) -> bool:
        return True

    def closed(self, connection: Connection) -> None:
        return None

    def reserve(self, count: int) -> bool:
        if count > 0 and self.reserved + count > self.settings.max_buffered_bytes:
            return False
        self.reserved += count
        self.peak = max(self.peak, self.reserved)
        return True

    def check_route(self, request: HttpRequest) -> None:
        return None

    def count(self, what: Count) -> None:
        return None

    async def answer(self, exchange: Exchange) -> None:
        try:
            if exchange.request.error is not None:
                await exchange.respond(exchange.request.error.status, b"", "")
            else:
                await exchange.respond(200, exchange.request.path.encode() + bytes(exchange.request.body), "text/plain")
        except Disconnected:
            return


async def play(data: bytes, cuts: list[int]) -> tuple[bytes, Desk]:
    """Feed `data` in pieces, letting answers run between some of them; what was sent."""
    desk, pipe = Desk(), Pipe()
    connection = Connection(desk)
    connection.connection_made(pipe)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in pairwise(places):
        connection.data_received(data[start:end])
        if start % 2:
            await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    sent = bytes(pipe.sent)
    connection.connection_lost(None)
    assert desk.reserved == 0
    return sent, desk


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(GOOD + JUNK) | st.binary(max_size=20), max_size=12), st.lists(st.integers(0, 2000)))
def test_any_bytes_in_any_pieces_are_handled(parts: list[bytes], cuts: list[int]) -> None:
    sent, desk = asyncio.run(play(b"".join(parts), cuts))
    assert desk.peak <= 128
    assert sent.count(b"HTTP/1.1 4") + sent.count(b"HTTP/1.1 5") <= 1
    assert sent == b"" or sent.startswith(b"HTTP/1.1 ")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(GOOD[:5]), min_size=1, max_size=3), st.lists(st.integers(0, 2000)))
def test_good_requests_are_answered_in_order_however_they_are_cut(parts: list[bytes], cuts: list[int]) -> None:
    sent, _ = asyncio.run(play(b"".join(parts), cuts))
    final = sent.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in final.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert bodies == [part.split(b" ")[1] + (b"hello" if b"POST" in part else b"") for part in parts]


@pytest.fixture(autouse=True)
def _no_errors_in_callbacks(caplog: pytest.LogCaptureFixture) -> object:
    """An exception in a callback of the loop is a failure, not a line in a log."""
    caplog.set_level(logging.ERROR, logger="asyncio")
    yield
    assert not caplog.records
