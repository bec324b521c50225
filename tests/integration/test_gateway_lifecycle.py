"""Clients that go away, clients that do not read, and a server that drains."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import pytest
import uvloop
from tests.integration.gateway_fakes import FakeEngine, Site, model_info, post, raw, serving, small_socket, until

from isthmus.contracts.requests import EngineRequest
from isthmus.gateway.settings import GatewaySettings

CHAT = "/v1/chat/completions"
LONG = "x" * 3000


def run(check: Callable[[Site], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with serving(**options) as site:
            await check(site)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def chat(**fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def held(permits: int = 0) -> FakeEngine:
    """An engine that gives as many outputs as there are permits, then waits."""
    return FakeEngine(model_info(), gate=asyncio.Semaphore(permits))


async def leave(site: Site, body: bytes, when: Callable[[], bool], path: str = CHAT) -> bytes:
    """Send a request, wait until `when`, go away, wait until the server noticed; what had been received."""
    reader, writer = await asyncio.open_connection(site.host, site.port)
    writer.write(post(path, body))
    await until(when)
    seen = await reader.read(65536) if json.loads(body).get("stream") and site.engine.produced else b""
    writer.close()
    await until(lambda: bool(site.kept.records))
    return seen


@pytest.mark.parametrize("abrupt", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_client_that_leaves_mid_answer_ends_its_work(stream: bool, n: int, path: str, abrupt: bool) -> None:
    async def check(site: Site) -> None:
        body = (
            chat(stream=stream, n=n) if path == CHAT else json.dumps({"prompt": "x", "stream": stream, "n": n}).encode()
        )
        reader, writer = await asyncio.open_connection(site.host, site.port)
        writer.write(post(path, body))
        await until(lambda: site.engine.produced == 6)
        if stream:
            assert (await reader.readuntil(b"\r\n")) == b"HTTP/1.1 200 OK\r\n"
        if abrupt:
            writer.transport.abort()
        else:
            writer.close()
        await until(lambda: bool(site.kept.records))
        ids = sorted(request.request_id for request in site.engine.submitted)
        assert len(ids) == n
        assert sorted(site.engine.aborted) == sorted(site.engine.closed) == ids
        assert site.engine.produced == 6
        assert sorted((fact.request_id, fact.outcome, fact.status) for fact in site.kept.facts) == [
            (one, "disconnected", 499) for one in ids
        ]
        assert sum(fact.output_tokens for fact in site.kept.facts) == 6
        assert site.kept.records[0].status == 499
        assert site.counted("abort_disconnect") == n

    run(check, engine=held(6))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_before_the_first_token_ends_its_work(stream: bool, n: int) -> None:
    async def check(site: Site) -> None:
        await leave(site, chat(stream=stream, n=n), lambda: len(site.engine.submitted) == n)
        assert len(site.engine.aborted) == len(site.engine.closed) == n
        assert [fact.outcome for fact in site.kept.facts] == ["disconnected"] * n
        assert site.engine.produced == 0

    run(check, engine=held())


def test_a_client_that_leaves_while_its_prompt_is_tokenised_starts_no_work() -> None:
    async def check(site: Site) -> None:
        site.prompting.gate = asyncio.Event()
        await leave(site, chat(stream=True), lambda: site.prompting.waiting == 1)
        assert site.prompting.cancelled == 1
        assert site.engine.submitted == []
        assert site.kept.records[0].status == 499
        assert site.gateway._in_flight == 0

    run(check)


def test_a_client_that_leaves_takes_its_pipelined_requests_with_it() -> None:
    async def check(site: Site) -> None:
        _, writer = await asyncio.open_connection(site.host, site.port)
        writer.write(post(CHAT, chat(), close=False) * 3)
        await until(lambda: len(site.engine.submitted) == 1)
        writer.close()
        await until(lambda: bool(site.kept.records))
        await until(lambda: not site.gateway._connections)
        assert len(site.engine.submitted) == len(site.engine.closed) == 1

    run(check, engine=held())


def test_a_deadline_ends_work_in_every_state() -> None:
    async def check(site: Site) -> None:
        sent = post(CHAT, chat(), "x-request-timeout-ms: 50")
        answer = await raw(site, sent)
        assert answer.startswith(b"HTTP/1.1 504 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "deadline_exceeded"
        assert len(site.engine.aborted) == len(site.engine.closed) == 1
        assert (site.kept.facts[0].outcome, site.kept.facts[0].status) == ("deadline", 504)
        site.prompting.gate = asyncio.Event()
        assert (await raw(site, sent)).startswith(b"HTTP/1.1 504 ")
        assert site.prompting.cancelled == 1
        assert len(site.engine.submitted) == 1

    run(check, engine=held())


def test_a_slow_reader_stalls_only_its_own_producer() -> None:
    def reply(request: EngineRequest) -> str:
        return "y" * 40_000

    async def check(site: Site) -> None:
        slow = small_socket(site)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(slow, post(CHAT, chat(stream=True, max_tokens=40_000)))
        await until(lambda: site.engine.produced > 100)
        stalled = -1
        while stalled != site.engine.produced:
            stalled = site.engine.produced
            for _ in range(200):
                await asyncio.sleep(0)
        assert stalled < 40_000
        quick = await raw(site, post(CHAT, chat(max_tokens=50)))
        assert quick.startswith(b"HTTP/1.1 200 ")
        assert site.engine.produced == stalled + 50
        received = 0
        while True:
            data = await asyncio.wait_for(loop.sock_recv(slow, 65536), 20)
            received += len(data)
            if not data:
                break
        slow.close()
        assert site.engine.produced == 40_000 + 50
        assert received > 40_000 * 100

    settings = GatewaySettings(write_buffer_bytes=4096, write_timeout_s=20.0)
    run(check, settings=settings, engine=FakeEngine(model_info(max_model_len=100_000), reply=reply))


def test_a_reader_that_never_reads_is_cut_off_and_its_work_ended() -> None:
    def reply(request: EngineRequest) -> str:
        return "y" * 90_000

    async def check(site: Site) -> None:
        stuck = small_socket(site)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(stuck, post(CHAT, chat(stream=True, max_tokens=90_000)))
        await until(lambda: bool(site.kept.records))
        assert site.counted("timeout_write") == 1
        assert site.kept.facts[0].outcome == "disconnected"
        assert len(site.engine.aborted) == len(site.engine.closed) == 1
        assert site.engine.produced < 90_000
        stuck.close()

    settings = GatewaySettings(write_buffer_bytes=4096, write_timeout_s=0.1)
    run(check, settings=settings, engine=FakeEngine(model_info(max_model_len=100_000), reply=reply))


def test_a_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async def check(site: Site) -> None:
        idle_reader, idle_writer = await asyncio.open_connection(site.host, site.port)
        other_reader, other_writer = await asyncio.open_connection(site.host, site.port)
        idle_writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b'"ready"' in await idle_reader.readuntil(b"}")
        whole = asyncio.create_task(raw(site, post(CHAT, chat(seed=1), close=False)))
        stream = asyncio.create_task(raw(site, post(CHAT, chat(seed=1, stream=True), close=False)))
        await until(lambda: len(site.engine.submitted) == 2)
        drain = asyncio.create_task(site.gateway.drain(20))
        await until(lambda: site.gateway.draining)
        idle_writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        other_writer.write(post(CHAT, chat(), close=False))
        for reader in (idle_reader, other_reader):
            refused = await asyncio.wait_for(reader.read(), 20)
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"connection: close" in refused
            assert b"retry-after: 1" in refused
        idle_writer.close()
        other_writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(site.host, site.port)
        assert not drain.done()
        for _ in range(200):
            site.engine.gate.release()
        assert await drain is True
        done = await whole
        assert done.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in done
        assert (await stream).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert {fact.outcome for fact in site.kept.facts} == {"stop"}
        await until(lambda: not site.gateway._connections)

    run(check, engine=held())


def test_a_drain_that_takes_too_long_cuts_off_what_is_left() -> None:
    async def check(site: Site) -> None:
        stuck = asyncio.create_task(raw(site, post(CHAT, chat())))
        await until(lambda: len(site.engine.submitted) == 1)
        assert await site.gateway.drain(0.05) is False
        assert (await stuck).startswith(b"HTTP/1.1 503 ")
        assert (site.kept.records[0].status, site.kept.records[0].error) == (503, "draining")
        assert (site.kept.facts[0].status, site.kept.facts[0].outcome) == (503, "cancelled")
        assert len(site.engine.closed) == len(site.engine.aborted) == 1

    run(check, engine=held())


def test_connections_are_kept_and_closed_as_the_client_asks() -> None:
    async def check(site: Site) -> None:
        async with httpx.AsyncClient(base_url=site.url) as client:
            for _ in range(3):
                assert (await client.post("/tokenize", json={"prompt": "hi"})).json()["tokens"] == [0, 107, 108]
            assert len(site.gateway._connections) == 1
        old = await raw(site, b"GET /health HTTP/1.0\r\n\r\n")
        assert old.startswith(b"HTTP/1.1 200 ")
        body = chat(stream=True, seed=1)
        head = f"POST {CHAT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        stream = await raw(site, head.encode() + body)
        assert b"transfer-encoding" not in stream
        assert stream.endswith(b"data: [DONE]\n\n")
        await until(lambda: not site.gateway._connections)

    run(check)


def test_the_same_edge_serves_on_plain_asyncio() -> None:
    async def main() -> None:
        async with serving() as site:
            answer = await raw(site, post(CHAT, chat(stream=True)))
            assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    asyncio.run(main())


def test_one_step_of_a_stream_is_one_chunk() -> None:
    async def check(site: Site) -> None:
        answer = await raw(site, post(CHAT, chat(stream=True, seed=1)))
        chunks, rest = [], answer.partition(b"\r\n\r\n")[2]
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            chunks.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        # One chunk for each token that gave text (é is two tokens and one character), one for the end, the empty one.
        assert len(chunks) == len("seed 1 says héllo.") + 2
        assert chunks[-2].count(b"data: ") == 2

    run(check)
