"""Targets: real child processes, a real socket, and what is said when they fail."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.bench import meters
from isthmus.bench.client import BadAnswer, tokens_in
from isthmus.bench.targets import ScriptTarget, ServerTarget, Target
from isthmus.bench.workloads import Ask
from isthmus.contracts.errors import InvalidInput

ASKS = (Ask((5, 6, 7), 3), Ask((8, 9), 2, 0.01))

SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"][0] == 13:
            self.send_error(500, "unlucky")
            return
        self.send_response(200)
        self.end_headers()
        for _ in range(body["max_tokens"] - (body["prompt"][0] == 14)):
            self.wfile.write(b"data: " + json.dumps({"choices": [{"text": " abc"}]}).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")

    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

SCRIPT = """
import json, sys
print("a library says hello", flush=True)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asks = json.loads(line)
    if asks[0]["prompt"][0] == 13:
        print("unlucky", file=sys.stderr)
        sys.exit(1)
    traces = [{"sent_s": a["at_s"], "arrivals": [[a["at_s"] + 0.1, a["output"]]]} for a in asks]
    print(json.dumps({"traces": traces}), flush=True)
"""


@pytest.fixture(params=["server", "script"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    log = tmp_path / "log"
    made: Target
    if request.param == "server":
        made = ServerTarget("one", [sys.executable, "-c", SERVER, "{port}"], {}, log, "m")
    else:
        made = ScriptTarget("one", [sys.executable, "-c", SCRIPT], {}, log)
    yield made
    made.stop()


def test_asks_are_answered_while_it_runs_and_not_while_it_is_paused(target: Target) -> None:
    assert target.start() > 0
    target.pause()
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in target.processes()]
    assert set(states) == {"T"}
    target.resume()
    traces = target.run(ASKS)
    assert [trace.tokens for trace in traces] == [3, 2]
    assert traces[1].sent_s >= 0.01
    assert meters.memory_bytes(target.processes()) > 1_000_000
    assert meters.cpu_seconds([os.getpid()]) > 0


def test_a_target_that_fails_says_so(target: Target) -> None:
    target.start()
    with pytest.raises(BadAnswer, match="unlucky"):
        target.run([Ask((13,), 1)])


def test_a_stopped_target_has_no_processes_left(target: Target) -> None:
    target.start()
    pids = target.processes()
    target.pause()
    target.stop()
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_a_server_that_sends_too_few_tokens_is_not_believed(tmp_path: Path) -> None:
    made = ServerTarget("short", [sys.executable, "-c", SERVER, "{port}"], {}, tmp_path / "log", "m")
    try:
        made.start()
        with pytest.raises(BadAnswer, match="1 tokens came, 2 were asked for"):
            made.run([Ask((14,), 2)])
    finally:
        made.stop()


def test_what_does_not_start_gives_the_end_of_its_log(tmp_path: Path) -> None:
    made = ServerTarget("none", [sys.executable, "-c", "raise SystemExit('no such model')"], {}, tmp_path / "log", "m")
    with pytest.raises(BadAnswer, match=r"did not start(?s:.*)no such model"):
        made.start()
    made.stop()


def test_half_a_token_is_an_error() -> None:
    assert tokens_in({"choices": [{"text": " abc def"}]}) == 2
    assert tokens_in({"choices": []}) == 0
    with pytest.raises(InvalidInput):
        tokens_in({"choices": [{"text": " ab"}]})


def test_the_load_of_others_is_what_is_busy_and_not_ours() -> None:
    before, after = meters.Reading(10.0, 100.0, 50.0), meters.Reading(12.0, 103.0, 52.0)
    assert meters.other_load(before, after) == pytest.approx(0.5)
