"""Logs, metrics and lineage of the gateway: complete, and free of content."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import uvloop
from blake3 import blake3
from tests.integration.gateway_fakes import BOS, MODEL, FakeEngine, Site, ids_of, model_info, post, raw, serving

from isthmus.contracts.errors import EngineFailed
from isthmus.contracts.requests import EngineRequest
from isthmus.observability.logs import JsonRequestLog

CHAT = "/v1/chat/completions"
CANARY = "xyzzy-canary-7781"


def run(check: Callable[[Site], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with serving(**options) as site:
            await check(site)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_no_content_reaches_logs_errors_metrics_or_lineage() -> None:
    def say_canary(request: EngineRequest) -> str:
        return CANARY

    stream = io.BytesIO()
    log = JsonRequestLog(stream)

    def body(**fields: object) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": CANARY}], **fields}).encode()

    async def check(site: Site) -> None:
        service = site.gateway._service
        site.gateway._deps = replace(site.gateway._deps, log=log)
        assert service is not None
        headers = (f"authorization: Bearer {CANARY}", f"cookie: {CANARY}", f"user-agent: {CANARY}")
        answered = [
            await raw(site, post(CHAT, body(stop=[CANARY]), *headers)),
            await raw(site, post(CHAT, body(stream=True), *headers)),
        ]
        refused = [
            post(CHAT, body(temperature=CANARY), *headers),
            post(CHAT, body(tool_choice=CANARY), *headers),
            post(CHAT, body(model=CANARY), *headers),
            post(CHAT, body(**{f"{CANARY} ": 1}), *headers),
            post(CHAT, body(messages=[{"role": CANARY, "content": CANARY}]), *headers),
            post(CHAT, body(messages=[{"role": "user", "content": CANARY * 1000}]), *headers),
            post(CHAT, body(logit_bias={CANARY: 1}), *headers),
            post(CHAT, body()[:-1], *headers),
            post(f"/{CANARY}", b"{}", *headers),
            post(f"/tokenize?{CANARY}", b"{", *headers),
            post("/v1/completions", json.dumps({"prompt": [CANARY, 1]}).encode(), *headers),
            post(CHAT, body(), f"x-request-id: {CANARY} "[:-1] + "!", *headers),
            post(CHAT, body(), f"x-request-timeout-ms: {CANARY}", *headers),
            post(CHAT, body(), f"traceparent: {CANARY}", *headers),
            post(CHAT, body(), f"content-type: {CANARY}", *headers),
            f"GET /health HTTP/1.1\r\nHost: {CANARY}\r\nConnection: close\r\n\r\n".encode(),
            f"GET /health HTTP/1.1\r\nHost: localhost\r\nExpect: {CANARY}\r\nConnection: close\r\n\r\n".encode(),
        ]
        for request in refused:
            answer = await raw(site, request)
            if not answer.startswith(b"HTTP/1.1 200"):
                assert b"HTTP/1.1 4" in answer[:12]
                assert CANARY.encode() not in answer, request
        assert CANARY.encode() in answered[1].replace(b'"}}', b"") or b"content" in answered[1]
        assert log.close()
        lines = stream.getvalue()
        assert len(lines.splitlines()) == len(answered) + len(refused)
        assert all(json.loads(line)["request_id"] for line in lines.splitlines())
        kept = [lines, repr(site.kept.facts).encode(), site.metrics.render(site.engine.stats, site.engine.info)]
        for one in kept:
            assert CANARY.encode() not in one
            assert str(ids_of(CANARY))[1:-1].encode() not in one

    run(check, engine=FakeEngine(model_info(), reply=say_canary))


def test_a_log_line_says_what_happened() -> None:
    async def check(site: Site) -> None:
        body = json.dumps({"prompt": ["hi", "you"], "seed": 1, "max_tokens": 3}).encode()
        await raw(site, post("/v1/completions", body, "x-request-id: me"))
        (record,) = site.kept.records
        assert (record.route, record.method, record.status) == ("/v1/completions", "POST", 200)
        assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (3 + 4, 8, 6)
        assert (record.sequences, record.finish, record.client_request_id) == (2, "length", "me")
        assert record.request_bytes == len(body)
        assert record.response_bytes > 300
        assert 0 < record.first_token_s <= record.total_s

    run(check)


def test_a_lineage_fact_says_who_what_and_how() -> None:
    async def check(site: Site) -> None:
        await raw(site, post("/v1/completions", b'{"prompt":"hi","seed":5}'))
        (fact,) = site.kept.facts
        packed = b"".join(token.to_bytes(4, "little") for token in [BOS, *ids_of("hi")])
        assert fact.prompt_hash == blake3(packed, key=b"n" * 32).hexdigest()
        assert fact.namespace_id == blake3(b"n" * 32).hexdigest()[:16]
        assert (fact.api, fact.model, fact.weights) == ("completions", MODEL, bytes(range(32)).hex())
        assert (fact.prompt_tokens, fact.cached_tokens, fact.cached_blocks) == (3, 4, 0)
        assert (fact.queue_s, fact.prefill_s, fact.decode_s) == (0.001, 0.002, 0.003)
        assert (fact.outcome, fact.status, fact.seed, fact.error) == ("stop", 200, 5, "")

    run(check)


def test_a_failed_engine_is_a_503_and_in_lineage() -> None:
    async def check(site: Site) -> None:
        answer = await raw(site, post(CHAT, b'{"messages":[{"role":"user","content":"x"}]}'))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        (fact,) = site.kept.facts
        assert (fact.outcome, fact.status, fact.error) == ("error", 503, "engine_failed")
        assert site.kept.records[0].error == "engine_failed"

    run(check, engine=FakeEngine(model_info(), failure=lambda request: EngineFailed("the engine process ended")))


def test_metrics_use_vllms_names_and_count_once() -> None:
    async def check(site: Site) -> None:
        await raw(site, post("/v1/completions", b'{"prompt":"hi","seed":5,"max_tokens":4}'))
        await raw(site, post("/v1/completions", b'{"prompt":"hi","stream":true,"seed":5}'))
        await raw(site, post("/v1/completions", b'{"prompt":1}'))
        await raw(site, post("/v1/completions", b'{"prompt":"hi","user":"me","store":null}', "x-request-timeout-ms: 0"))
        await raw(site, post("/v1/completions", b'{"prompt":"hi","user":"me","store":false,"model":"other"}'))
        answer = (await raw(site, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).decode()
        assert "content-type: text/plain; version=0.0.4; charset=utf-8\r\n" in answer
        label = f'{{model_name="{MODEL}"}}'
        output = 4 + len(ids_of("seed 5 says héllo.")) + 1
        for line in (
            f"vllm:num_requests_running{label} 0.0",
            f"vllm:num_requests_waiting{label} 0.0",
            f"vllm:kv_cache_usage_perc{label} 0.25",
            f"vllm:num_preemptions_total{label} 0.0",
            f"vllm:prefix_cache_queries_total{label} 7.0",
            f"vllm:prefix_cache_hits_total{label} 0.0",
            f"vllm:prompt_tokens_total{label} 6.0",
            f"vllm:generation_tokens_total{label} {output}.0",
            f'vllm:request_success_total{{finished_reason="length",model_name="{MODEL}"}} 1.0',
            f'vllm:request_success_total{{finished_reason="stop",model_name="{MODEL}"}} 1.0',
            f"vllm:time_to_first_token_seconds_count{label} 2.0",
            f"vllm:inter_token_latency_seconds_count{label} {output - 2}.0",
            f"vllm:e2e_request_latency_seconds_count{label} 2.0",
            f"vllm:request_queue_time_seconds_count{label} 2.0",
            'isthmus_http_requests_total{route="/v1/completions",status="400"} 2.0',
            'isthmus_http_requests_total{route="/v1/completions",status="404"} 1.0',
            'isthmus_edge_total{what="ignored_field"} 2.0',
            'isthmus_edge_total{what="abort_disconnect"} 0.0',
            "isthmus_requests_in_flight 0.0",
        ):
            assert f"\n{line}\n" in answer, line

    run(check)
