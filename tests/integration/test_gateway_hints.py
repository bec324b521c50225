"""Sessions and hints at the edge: what the headers say reaches the engine, what is wrong is refused by name."""

import json

import pytest
from tests.integration.gateway_fakes import Site, post, raw
from tests.integration.test_gateway_telemetry import CHAT, run

from isthmus.contracts.blocks import HintKind

BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}).encode()
HINTS = "/v1/state/hints"


def test_session_and_hint_of_the_headers_reach_the_engine() -> None:
    async def check(site: Site) -> None:
        answer = await raw(site, post(CHAT, BODY, "x-isthmus-session: talk 7", "x-isthmus-hint: waiting=12.5"))
        assert answer.startswith(b"HTTP/1.1 200")
        await raw(site, post("/v1/completions", json.dumps({"prompt": "a"}).encode(), "x-isthmus-hint: done"))
        await raw(site, post(CHAT, BODY))
        told = [(request.session, request.hint, request.hint_s) for request in site.engine.submitted]
        assert told == [("talk 7", HintKind.WAITING, 12.5), ("", HintKind.DONE, 0.0), ("", None, 0.0)]

    run(check)


@pytest.mark.parametrize(
    "header",
    [
        "x-isthmus-hint: maybe",
        "x-isthmus-hint: waiting",
        "x-isthmus-hint: done=3",
        "x-isthmus-hint: waiting=-1",
        "x-isthmus-hint: pin=86401",
        "x-isthmus-hint: prefetch",
        "x-isthmus-session: " + "s" * 257,
    ],
)
def test_wrong_headers_are_refused_by_name(header: str) -> None:
    async def check(site: Site) -> None:
        answer = await raw(site, post(CHAT, BODY, header))
        assert answer.startswith(b"HTTP/1.1 400")
        assert header.partition(":")[0].encode() in answer.partition(b"\r\n\r\n")[2]
        assert not site.engine.submitted

    run(check)


def test_a_hint_between_requests_reaches_the_engine() -> None:
    async def check(site: Site) -> None:
        body = json.dumps({"session": "talk", "hint": "prefetch"}).encode()
        assert (await raw(site, post(HINTS, body))).startswith(b"HTTP/1.1 200")
        [hint] = site.engine.hints
        assert (hint.session, hint.kind, hint.seconds) == ("talk", HintKind.PREFETCH, 0.0)

    run(check)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"session": "", "hint": "done"}, b"session"),
        ({"session": "s" * 257, "hint": "done"}, b"session"),
        ({"session": "s", "hint": "soon"}, b"hint"),
        ({"session": "s", "hint": "pin", "seconds": -1}, b"seconds"),
        ({"session": "s", "hint": "pin", "seconds": 1e9}, b"seconds"),
        ({"session": "s", "hint": "pin", "more": 1}, b"more"),
    ],
)
def test_wrong_hints_are_refused_by_field(body: dict[str, object], field: bytes) -> None:
    async def check(site: Site) -> None:
        answer = await raw(site, post(HINTS, json.dumps(body).encode()))
        assert answer.startswith(b"HTTP/1.1 400")
        assert field in answer.partition(b"\r\n\r\n")[2]
        assert not site.engine.hints

    run(check)
