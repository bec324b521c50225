"""The OpenAPI document is current, complete and true: schemathesis finds no violation and no 5xx on a real server."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvloop
from tests.integration.gateway_fakes import FakeEngine, model_info, serving

from isthmus.gateway import openapi
from isthmus.gateway.routes import ROUTES
from isthmus.gateway.schema_requests import IGNORED_FIELDS, UNSUPPORTED_FIELDS, ChatRequest, CompletionRequest, Message
from isthmus.gateway.settings import GatewaySettings

ROOT = Path(__file__).parents[2]
CONFIG = """
hooks = "{hooks}"

[generation]
allow-extra-parameters = false

[checks.negative_data_rejection]
# 413: a list over its limit may first be a body over its limit.
expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
"""


def test_the_document_in_docs_is_current() -> None:
    kept = (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")
    assert kept == openapi.render(), "run: python -m isthmus.gateway.openapi > docs/openapi.json"


def test_the_document_has_every_route_and_every_field() -> None:
    document = openapi.document()
    assert set(document["paths"]) == {*ROUTES, "/v1/models/{model}"}
    for struct in (ChatRequest, CompletionRequest):
        schema = document["components"]["schemas"][struct.__name__]
        assert set(schema["properties"]) == set(struct.__struct_fields__)
        assert schema["additionalProperties"] is False
    fields = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *Message.__struct_fields__}
    assert fields >= IGNORED_FIELDS | UNSUPPORTED_FIELDS


@contextmanager
def server() -> Iterator[str]:
    """A gateway on a thread of its own; its address."""
    ready: list[str] = []
    started, ending = threading.Event(), threading.Event()

    async def main() -> None:
        # A vocabulary and a context so large that no schema-valid request is over them.
        engine = FakeEngine(model_info(vocab_size=2**31, max_model_len=4_000_000))
        async with serving(GatewaySettings(max_sequences=64 * 64), engine) as site:
            ready.append(site.url)
            started.set()
            await asyncio.to_thread(ending.wait, 280)

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(20)
        yield ready[0]
    finally:
        ending.set()
        thread.join(20)


@pytest.mark.slow
def test_schemathesis_finds_no_violation(tmp_path: Path) -> None:
    hooks = Path(__file__).with_name("gateway_schemathesis_hooks.py")
    (tmp_path / "schemathesis.toml").write_text(CONFIG.format(hooks=hooks), encoding="utf-8")
    with server() as url:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "--config-file", str(tmp_path / "schemathesis.toml"), "run",
                f"{url}/openapi.json", "--max-examples", "12", "--seed", "1", "--no-color", "--workers", "1",
                "--suppress-health-check", "all",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    told = "\n".join(line[:400] for line in done.stdout.splitlines())
    assert done.returncode == 0, told[-6000:] + done.stderr[-2000:]
    assert "Tested: 13" in done.stdout
