"""Bad input on real sockets: each is a 4xx that names the field or the limit, and the server lives on."""

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable

import pytest
import uvloop
from tests.integration.gateway_fakes import MODEL, BytePrompting, Site, post, raw, serving, small_socket, until

from isthmus.contracts.errors import DeadlineExceeded, TooLarge, Unsupported
from isthmus.gateway.settings import GatewaySettings

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
JSON_TYPE = b"Content-Type: application/json\r\n"
CHAT = "/v1/chat/completions"


def run(check: Callable[[Site], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with serving(**options) as site:
            await check(site)
            assert status_of(await raw(site, GET)) == 200
            assert site.engine.closed == [request.request_id for request in site.engine.submitted]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer[9:12])


def error_of(answer: bytes) -> dict[str, object]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def chat(**fields: object) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    return json.dumps(body).encode()


BAD_BODIES = [
    (b"", "invalid_json", None),
    (b"{", "invalid_json", None),
    (b"{}", "missing_field", "messages"),
    (b"[1]", "invalid_input", None),
    (b"null", "invalid_input", None),
    (b'{"messages": [}', "invalid_json", None),
    (b"\xff\xfe", "invalid_json", None),
    (b'{"messages":[{"role":"user","content":"\xc3\x28"}]}', "invalid_json", None),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "invalid_json", None),
    (b"[" * 100_000, "invalid_json", None),
    (b"[" * 100_000 + b"]" * 100_000, "too_large", None),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "too_large", None),
    (b'{"model":"' + b'\\"' * 100_000, "invalid_json", None),
    (b'{"a":[' + b'"",' * 300_000 + b'""]}', "too_large", None),
    (chat(temperature=float("nan")), "invalid_json", None),
    (chat().replace(b'"hi"', b"1e999"), "invalid_input", "messages[0].content"),
    (chat(temperature="hot"), "invalid_input", "temperature"),
    (chat(temperature=3), "invalid_input", "temperature"),
    (chat(temperature=True), "invalid_input", "temperature"),
    (chat(top_p=0), "invalid_input", "top_p"),
    (chat(n=0), "invalid_input", "n"),
    (chat(n=65), "invalid_input", "n"),
    (chat(n=1.5), "invalid_input", "n"),
    (chat(max_tokens=0), "invalid_input", "max_tokens"),
    (chat(max_tokens=5000), "context_length_exceeded", "max_tokens"),
    (chat(max_completion_tokens=5000), "context_length_exceeded", "max_completion_tokens"),
    (chat(min_tokens=5, max_tokens=4), "invalid_input", "min_tokens"),
    (chat(seed=2**70), "invalid_input", "seed"),
    (chat(stop=["x"] * 17), "invalid_input", "stop"),
    (chat(stop=[""]), "invalid_input", "stop[0]"),
    (chat(stop_token_ids=[259]), "invalid_input", "stop_token_ids"),
    (chat(stop_token_ids=[-1]), "invalid_input", "stop_token_ids[0]"),
    (chat(logit_bias={"x": 1}), "invalid_input", "logit_bias"),
    (chat(logit_bias={"1": 101}), "invalid_input", "logit_bias[...]"),
    (chat(logit_bias={"400": 1}), "invalid_input", "logit_bias"),
    (chat(top_logprobs=2), "invalid_input", "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "invalid_input", "top_logprobs"),
    (chat(priority=101), "invalid_input", "priority"),
    (chat(stream_options={"x": 1}), "unknown_field", "stream_options.x"),
    (chat(frobnicate=1), "unknown_field", "frobnicate"),
    (chat(messages=[]), "invalid_input", "messages"),
    (chat(messages=[{"role": "king", "content": "x"}]), "invalid_input", "messages[0].role"),
    (chat(messages=[{"role": "user", "content": "x", "y": 1}]), "unknown_field", "messages[0].y"),
    (chat(messages=[{"role": "user", "content": "x" * 5000}]), "context_length_exceeded", "messages"),
    (chat(modalities=["audio"]), "unsupported", "modalities[0]"),
    (chat(audio={"voice": "x"}), "unsupported", "audio"),
    (chat(lora="x"), "unsupported", "lora"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "unsupported",
        "messages[0].content[0].type",
    ),
]


def test_bad_bodies_are_refused_with_the_field_named() -> None:
    async def check(site: Site) -> None:
        wrong = []
        for body, code, param in BAD_BODIES:
            answer = await raw(site, post(CHAT, body))
            error = error_of(answer)
            if (status_of(answer), error["code"], error["param"]) != (400, code, param):
                wrong.append((body[-80:], error))
            assert error["type"] == "invalid_request_error"
            assert 10 < len(error["message"]) < 200
        assert wrong == []
        assert site.engine.submitted == []

    run(check)


def test_bad_completion_bodies_are_refused_with_the_field_named() -> None:
    bad = [
        ({"prompt": []}, "invalid_input", "prompt"),
        ({"prompt": [[]]}, "invalid_input", "prompt[0]"),
        ({"prompt": ["a", 1]}, "invalid_input", "prompt"),
        ({"prompt": [259]}, "invalid_input", "prompt"),
        ({"prompt": [2**31]}, "invalid_input", "prompt[0]"),
        ({"prompt": {"a": 1}}, "invalid_input", "prompt"),
        ({"prompt": ["a"] * 65}, "too_large", "n"),
        ({"prompt": "a", "suffix": "b"}, "unsupported", "suffix"),
        ({"prompt": "a", "best_of": 2}, "unsupported", "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "unsupported", "echo"),
        ({"prompt": [5] * 4096}, "context_length_exceeded", "prompt"),
        ({"prompt": [[5] * 4096], "echo": True}, "context_length_exceeded", "prompt"),
    ]

    async def check(site: Site) -> None:
        for fields, code, param in bad:
            answer = await raw(site, post("/v1/completions", json.dumps(fields).encode()))
            error = error_of(answer)
            assert (status_of(answer), error["code"], error["param"]) == (400, code, param), fields

    run(check)


MALFORMED = [
    (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    (b"GET\r\n\r\n", 400),
    (b"GET /health\r\n\r\n", 505),
    (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
    (b"GET /health HTTP/1.1\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \xff\xfe\r\n\r\n", 400),
    (b"GET /h\xc3\xa9alth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"FETCH /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n{}}", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n", 413),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: x\r\n\r\n", 417),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n" + JSON_TYPE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 40_000 + b"\r\n\r\n", 431),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 200_000, 431),
]  # fmt: skip


@pytest.mark.parametrize("pieces", [1, 7])
def test_malformed_http_is_refused_and_the_connection_closed(pieces: int) -> None:
    async def check(site: Site) -> None:
        for data, expected in MALFORMED:
            size = max(1, len(data) // pieces)
            reader, writer = await asyncio.open_connection(site.host, site.port)
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
                await asyncio.sleep(0)
            answer = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            assert status_of(answer) == expected, (data[:100], answer)
            assert b"connection: close" in answer
            assert error_of(answer)["message"]

    run(check)


def test_a_smuggled_request_behind_a_refused_one_is_never_answered() -> None:
    async def check(site: Site) -> None:
        hidden = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = await raw(site, head + b"0\r\n\r\n" + hidden)
        assert answer.count(b"HTTP/1.1 400 ") == 1
        assert b"HTTP/1.1 200 " not in answer
        assert [record.status for record in site.kept.records] == [400]

    run(check)


def test_wrong_paths_methods_types_and_hosts() -> None:
    async def check(site: Site) -> None:
        text = post("/tokenize", b"hello", "Content-Type: text/plain")
        assert status_of(await raw(site, text)) == 415
        latin = post("/tokenize", b"{}", "Content-Type: application/json; charset=latin-1")
        assert status_of(await raw(site, latin)) == 415
        assert status_of(await raw(site, post("/nothing", b"{}"))) == 404
        wrong = await raw(site, GET.replace(b"/health", b"/tokenize"))
        assert status_of(wrong) == 405
        assert b"allow: POST, OPTIONS" in wrong
        options = await raw(site, GET.replace(b"GET /health", b"OPTIONS /tokenize"))
        assert status_of(options) == 204
        assert b"content-length" not in options
        head = await raw(site, GET.replace(b"GET", b"HEAD"))
        assert status_of(head) == 200
        assert head.endswith(b"\r\n\r\n")
        assert b"content-length: 15" in head
        for host, status in (
            (b"localhost:80", 200), (b"127.0.0.1:1", 200), (b"[::1]:1", 200), (b"LOCALHOST", 200),
            (b"evil.example", 403), (b"localhost.evil.example", 403), (b"169.254.169.254", 403), (b"", 403),
        ):  # fmt: skip
            assert status_of(await raw(site, GET.replace(b"localhost", host))) == status, host

    run(check)


def test_invalid_headers_of_ours_are_refused_by_name() -> None:
    async def check(site: Site) -> None:
        for header, name in (
            ("x-request-id: a b", "x-request-id"),
            ("x-request-id: " + "a" * 129, "x-request-id"),
            ("x-request-timeout-ms: 0", "x-request-timeout-ms"),
            ("x-request-timeout-ms: -5", "x-request-timeout-ms"),
            ("x-request-timeout-ms: 3600001", "x-request-timeout-ms"),
            ("x-request-timeout-ms: soon", "x-request-timeout-ms"),
        ):
            answer = await raw(site, post(CHAT, chat(), header))
            assert (status_of(answer), error_of(answer)["param"]) == (400, name), header

    run(check)


def test_request_ids_and_traces_come_back() -> None:
    async def check(site: Site) -> None:
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        sent = post(CHAT, chat(), "x-request-id: mine-1", f"traceparent: 00-{trace}-00f067aa0ba902b7-01")
        answer = (await raw(site, sent)).decode()
        assert "\r\nx-request-id: mine-1\r\n" in answer
        assert f"\r\ntraceparent: 00-{trace}-" in answer
        assert "00f067aa0ba902b7" not in answer
        record = site.kept.records[-1]
        assert (record.client_request_id, record.traceparent[3:35]) == ("mine-1", trace)
        assert site.kept.facts[-1].traceparent == record.traceparent
        for bad in ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", "ff-" + trace + "-00f067aa0ba902b7-01", "nonsense"):
            answer = (await raw(site, post(CHAT, chat(), f"traceparent: {bad}"))).decode()
            assert "\r\ntraceparent: 00-" in answer
            assert bad[3:35] not in answer

    run(check)


def test_bodies_over_the_limit_are_refused_early_and_late() -> None:
    async def check(site: Site) -> None:
        declared = await raw(site, post(CHAT, b" " * 3000))
        assert (status_of(declared), error_of(declared)["code"]) == (413, "too_large")
        assert "2000" in error_of(declared)["message"]
        chunks = b"".join(b"64\r\n" + b" " * 100 + b"\r\n" for _ in range(30))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        chunked = await raw(site, (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunks)
        assert status_of(chunked) == 413
        trailers = b"0\r\n" + b"A: b\r\n" * 200 + b"\r\n"
        flood = await raw(site, (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + trailers)
        assert status_of(flood) == 431
        extension = b"1;" + b"x" * 200_000
        framed = await raw(site, (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + extension)
        assert status_of(framed) == 431

    run(check, settings=GatewaySettings(max_body_bytes=2000))


def test_a_chunked_body_is_read_and_expect_is_answered() -> None:
    async def check(site: Site) -> None:
        body = b'{"prompt":"hi"}'
        head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        reader, writer = await asyncio.open_connection(site.host, site.port)
        writer.write((head + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunks)
        answer = await reader.readuntil(b"}")
        assert b'"count":3' in answer
        writer.write((head + f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n").encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert b'"count":3' in await reader.readuntil(b"}")
        writer.close()
        refused = (head.replace("json", "xml") + "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n").encode()
        assert status_of(await raw(site, refused)) == 415

    run(check)


def test_an_offer_to_upgrade_is_ignored_and_the_request_answered() -> None:
    async def check(site: Site) -> None:
        offer = "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"
        body = b'{"prompt":"hi"}'
        plain = post("/tokenize", body, *offer, close=False)
        chunked = plain.replace(b"Content-Length: 15", b"Transfer-Encoding: chunked")
        chunked = chunked[: -len(body)] + b"f\r\n" + body + b"\r\n0\r\n\r\n"
        get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
        data = plain + chunked + get + get + plain
        for size in (len(data), 50, 1):
            reader, writer = await asyncio.open_connection(site.host, site.port)
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
                await asyncio.sleep(0)
            writer.write(GET)
            answer = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200] * 6
            assert answer.count(b'"count":3') == 3

    run(check)


def test_a_small_answer_that_nobody_reads_does_not_keep_its_connection() -> None:
    async def check(site: Site) -> None:
        stuck = small_socket(site)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(stuck, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
        await until(lambda: len(site.kept.records) > 20)
        await until(lambda: not site.gateway._connections)
        stuck.close()

    settings = GatewaySettings(write_timeout_s=0.2, idle_timeout_s=0.1, max_pipelined=300, write_buffer_bytes=2**26)
    run(check, settings=settings)


def test_pipelined_requests_are_answered_in_order_and_too_many_are_refused() -> None:
    async def check(site: Site) -> None:
        paths = [b"/health", b"/version", b"/nothing", b"/ready"]
        data = b"".join(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in paths)
        answer = await raw(site, data + GET)
        assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, 404, 200, 200]
        assert [record.route for record in site.kept.records] == [
            "/health",
            "/version",
            "unmatched",
            "/ready",
            "/health",
        ]
        large = post("/tokenize", b'{"prompt":"' + b"x" * 40_000 + b'"}', close=False)
        several = await raw(site, large * 4 + GET)
        assert [int(part[:3]) for part in several.split(b"HTTP/1.1 ")[1:]] == [200] * 5
        flood = await raw(site, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        statuses = [int(part[:3]) for part in flood.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [200] * (len(statuses) - 1) + [400]
        assert 5 <= len(statuses) <= 7
        assert site.counted("refused_pipeline") == 1
        offers = b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n" * 2000
        assert b"HTTP/1.1 400 " in await raw(site, offers)
        assert site.counted("refused_pipeline") == 2

    run(check, settings=GatewaySettings(max_pipelined=4))


def test_slow_clients_are_cut_off() -> None:
    async def check(site: Site) -> None:
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        started = await raw(site, head)
        assert (status_of(started), error_of(started)["code"]) == (408, "request_timeout")
        assert site.counted("timeout_header") == 1
        body = await raw(site, head + b"Content-Length: 9\r\n\r\n{}")
        assert status_of(body) == 408
        assert site.counted("timeout_body") == 1
        assert await raw(site, b"") == b""
        idle = await raw(site, GET.replace(b"Connection: close\r\n", b""))
        assert status_of(idle) == 200
        assert site.counted("timeout_idle") == 1
        # A byte now and then does not move the deadline: it passes long before the limit on the target is reached.
        reader, writer = await asyncio.open_connection(site.host, site.port)
        writer.write(b"GET /")
        ended = asyncio.create_task(reader.read())
        while not ended.done():
            writer.write(b"a" if not writer.is_closing() else b"")
            await asyncio.sleep(0.01)
        writer.close()
        assert status_of(ended.result()) == 408

    settings = GatewaySettings(
        header_timeout_s=0.15, body_timeout_s=0.15, idle_timeout_s=0.15, linger_timeout_s=0.2, max_url_bytes=200
    )
    run(check, settings=settings)


def test_too_many_connections_and_requests_are_503_with_retry_after() -> None:
    async def check(site: Site) -> None:
        site.prompting.gate = asyncio.Event()
        held = [asyncio.create_task(raw(site, post("/tokenize", b'{"prompt":"x"}'))) for _ in range(2)]
        await until(lambda: site.prompting.waiting == 2)
        busy = await raw(site, post("/tokenize", b'{"prompt":"x"}'))
        assert status_of(busy) == 503
        assert b"retry-after: 1\r\n" in busy
        assert error_of(busy)["code"] == "overloaded"
        idle = [await asyncio.open_connection(site.host, site.port) for _ in range(3)]
        await until(lambda: len(site.gateway._connections) == 5)
        full = await raw(site, b"")
        assert status_of(full) == 503
        assert site.counted("refused_connections") == 1
        site.prompting.gate.set()
        assert [status_of(answer) for answer in await asyncio.gather(*held)] == [200, 200]
        for _, writer in idle:
            writer.close()
        await until(lambda: len(site.gateway._connections) == 0)

    run(check, settings=GatewaySettings(max_in_flight=2, max_connections=5))


def test_bodies_being_received_share_a_bound() -> None:
    async def check(site: Site) -> None:
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n" + JSON_TYPE + b"Content-Length: 900\r\n\r\n"
        _, writer = await asyncio.open_connection(site.host, site.port)
        writer.write(head + b" " * 800)
        await until(lambda: site.gateway._buffered == 800)
        second = await raw(site, head + b" " * 800)
        assert status_of(second) == 503
        writer.close()
        await until(lambda: site.gateway._buffered == 0)
        for _ in range(3):
            assert status_of(await raw(site, post("/tokenize", b'{"prompt":"' + b"x" * 700 + b'"}'))) == 200
        await until(lambda: site.gateway._buffered == 0)

    run(check, settings=GatewaySettings(max_buffered_bytes=1000))


def test_memory_stays_bounded_under_a_flood() -> None:
    async def check(site: Site) -> None:
        tracemalloc.start()
        try:
            _, before = tracemalloc.get_traced_memory()
            head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: "
            for _ in range(5):
                assert status_of(await raw(site, head + b"b" * 4_000_000)) == 431
            await raw(site, post("/nothing", b"x" * 4_000_000))
            await raw(site, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50_000)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # The 4 MB of the sender are in this process too; what is kept beside them is a few read buffers.
        assert peak - before < 16_000_000

    run(check)


def test_errors_of_the_prompting_plane_keep_their_meaning() -> None:
    cases = [
        (TooLarge("the prompt has 9000 tokens, limit 4096", "prompt"), 400, "context_length_exceeded"),
        (Unsupported("this model has no chat template", "messages"), 400, "unsupported"),
        (DeadlineExceeded("the tokenizer took over 5 s"), 504, "deadline_exceeded"),
    ]

    async def check(site: Site) -> None:
        for failure, status, code in cases:
            site.prompting.failure = failure
            answer = await raw(site, post(CHAT, chat()))
            assert (status_of(answer), error_of(answer)["code"]) == (status, code)

    run(check, prompting=BytePrompting())


def test_a_defect_ends_the_connection_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def check(site: Site) -> None:
        site.prompting.failure = ZeroDivisionError("a defect")
        assert status_of(await raw(site, post(CHAT, chat()))) == 500
        assert site.counted("internal_error") == 1
        assert site.kept.records[-1].status == 500

    run(check)
    assert "answer failed" in caplog.text
