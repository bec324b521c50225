"""The command line: help, exit statuses, a chat against a server on a real socket, and one in a terminal."""

import http.server
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.cli.main import main
from isthmus.cli.serve import ConsoleUi, curl
from isthmus.cli.terminal import Screen, printable

PIECES = ["Hel", "lo \x1b[31mthere\x07", ", naïve 日本"]
SHOWN = "Hello [31mthere, naïve 日本"


class FakeServer(http.server.BaseHTTPRequestHandler):
    """Answers as the edge does, from a script."""

    protocol_version = "HTTP/1.1"
    bodies: list[dict[str, object]]
    mode: str
    gone: threading.Event

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if self.mode == "refuse":
            self._json(503, {"error": {"message": "queue \x1b[2Jfull"}}, ("Retry-After", "7"))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        chat = "messages" in body
        if self.mode == "tools" and body["messages"][-1]["role"] == "user":
            self._calls()
            return
        for piece in PIECES:
            self._event({"choices": [{"delta": {"content": piece}} if chat else {"text": piece}]})
        if self.mode == "endless":
            try:
                # At the pace of a fast model: a flood of output can hold up the terminal's own Ctrl-C for minutes.
                while not self.gone.wait(0.002):
                    self._event({"choices": [{"delta": {"content": "."}}]})
            except OSError:
                self.gone.set()
                return
        if self.mode == "cut":
            return
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 20, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 16}}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _calls(self) -> None:
        """Think, speak, and call two tools, in pieces."""
        first = {"index": 0, "id": "call_a", "type": "function", "function": {"name": "weather", "arguments": ""}}
        second = {"index": 1, "id": "call_b", "type": "function", "function": {"name": "time\x07", "arguments": "{}"}}
        rest = {"index": 0, "function": {"arguments": '{"city":'}}, {"index": 0, "function": {"arguments": ' "Rome"}'}}
        for delta in (
            {"reasoning_content": "Two \x1b["}, {"reasoning_content": "tools."}, {"content": "Let me see."},
            {"tool_calls": [first]}, {"tool_calls": [rest[0]]}, {"tool_calls": [rest[1], second]},
        ):  # fmt: skip
            self._event({"choices": [{"delta": delta}]})
        self._event({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps({"id": "chatcmpl-1", **value}).encode() + b"\n\n")

    def _json(self, status: int, value: object, *headers: tuple[str, str]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (("Content-Length", str(len(data))), *headers):
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[type[FakeServer]]:
    handler = type("Handler", (FakeServer,), {"bodies": [], "mode": "", "gone": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        handler.url = f"http://127.0.0.1:{listener.server_port}"  # type: ignore[attr-defined]
        yield handler
        listener.shutdown()
        thread.join()


def isthmus(*arguments: str, text: str = "", home: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {"PYTHONPATH": "src", "PATH": os.environ["PATH"], "HOME": str(home or "/nonexistent")}
    command = [sys.executable, "-m", "isthmus", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("command", "phrases"),
    [
        ((), ("serve", "chat", "complete", "model", "explain", "config", "exit status")),
        (("serve",), ("--port", "--kv-memory", "256MiB", "examples:", "Ctrl-C", "--no-exact", "ISTHMUS_PORT")),
        (("chat",), ("/reset", "/save FILE", "--temperature", "Ctrl-C stops an answer")),
        (("complete",), ("standard input", "--stop")),
        (("model",), ("info", "check")),
        (("explain",), ("REQUEST_ID", "--json", "while the server runs")),
        (("config",), ("--markdown", "Precedence: flags, environment")),
    ],
)
def test_help(command: tuple[str, ...], phrases: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for phrase in phrases:
        assert phrase in shown


def test_the_command_line_never_imports_torch_or_other_heavy_things() -> None:
    heavy = "{'torch', 'numpy', 'tokenizers', 'jinja2', 'transformers', 'uvloop'}"
    code = f"import sys, isthmus.cli.main as m; m.build_parser(); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "src"}, check=True, timeout=60)


def test_chat_streams_answers_and_keeps_the_conversation(server: type[FakeServer], tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"one\ntwo \\\nlines\n/nonsense\n/retry\n/save {saved}\n/reset\n/system be brief\nthree\n/quit\nnever\n"
    done = isthmus("chat", "--url", server.url, "--system", "s", "--temperature", "0", text=lines)  # type: ignore[attr-defined]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"tiny> {SHOWN}\n") == 4
    assert "\x1b" not in done.stdout
    assert "9 tokens" in done.stdout
    assert "16 of 20 cached · ended by length · chatcmpl-1" in done.stdout
    assert "/nonsense is no command" in done.stdout
    roles = [[message["role"] for message in body["messages"]] for body in server.bodies]  # type: ignore[attr-defined]
    asked = ["system", "user", "assistant", "user"]
    assert roles == [["system", "user"], asked, asked, ["system", "user"]]
    assert server.bodies[1]["messages"][3]["content"] == "two \nlines"  # type: ignore[index]
    assert server.bodies[1]["messages"][2]["content"] == "".join(PIECES)  # type: ignore[index]
    assert server.bodies[3]["messages"][0]["content"] == "be brief"  # type: ignore[index]
    assert server.bodies[0]["temperature"] == 0
    assert len(json.loads(saved.read_text())) == 5


def test_chat_shows_reasoning_and_calls_and_takes_their_results(server: type[FakeServer], tmp_path: Path) -> None:
    server.mode = "tools"
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function"}]')
    url = server.url  # type: ignore[attr-defined]
    done = isthmus("chat", "--url", url, "--tools", str(tools), text="weather and time?\n17\nnoon\n/quit\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert 'tiny> Two [tools.\nLet me see.\ncalls weather with {"city": "Rome"}\ncalls time with {}\n' in done.stdout
    results = [line for line in done.stdout.splitlines() if line.startswith("the next line is the result of ")]
    assert results == ["the next line is the result of weather", "the next line is the result of time"]
    assert f"tiny> {SHOWN}\n" in done.stdout
    first, second = server.bodies
    assert first["tools"] == second["tools"] == [{"type": "function"}]
    asked = second["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant", "tool", "tool"]  # type: ignore[attr-defined]
    assert asked[1]["reasoning_content"] == "Two \x1b[tools."  # type: ignore[index]
    calls = [(call["id"], call["function"]["arguments"]) for call in asked[1]["tool_calls"]]  # type: ignore[index]
    assert calls == [("call_a", '{"city": "Rome"}'), ("call_b", "{}")]
    assert [(one["tool_call_id"], one["content"]) for one in asked[2:]] == [("call_a", "17"), ("call_b", "noon")]  # type: ignore[index]
    tools.write_text("{}")
    wrong = isthmus("chat", "--url", url, "--tools", str(tools))
    assert (wrong.returncode, "no JSON array" in wrong.stderr) == (2, True)


def test_a_refused_question_is_taken_back_and_the_chat_goes_on(server: type[FakeServer]) -> None:
    server.mode = "refuse"
    done = isthmus("chat", "--url", server.url, text="a\nb\n")  # type: ignore[attr-defined]
    assert done.returncode == 0
    assert done.stdout.count("the server refused (503): queue [2Jfull; try again in 7 s") == 2
    assert [len(body["messages"]) for body in server.bodies] == [1, 1]  # type: ignore[arg-type]


def test_complete_streams_to_standard_output_only(server: type[FakeServer]) -> None:
    done = isthmus("complete", "--url", server.url, "--stop", "END", "Once", "upon")  # type: ignore[attr-defined]
    assert done.stdout == "".join(PIECES) + "\n"
    assert "9 tokens" in done.stderr
    assert (server.bodies[0]["prompt"], server.bodies[0]["stop"]) == ("Once upon", ["END"])
    isthmus("complete", "--url", server.url, text="from a pipe")  # type: ignore[attr-defined]
    assert server.bodies[1]["prompt"] == "from a pipe"


@pytest.mark.parametrize(
    ("mode", "arguments", "status", "words"),
    [
        ("refuse", ("complete", "x"), 5, "the server refused (503)"),
        ("cut", ("complete", "x"), 5, "before it was complete"),
        ("", ("complete", "--url", "http://127.0.0.1:1", "x"), 4, "start one with `isthmus serve`"),
        ("", ("complete", "--url", "ftp://x", "x"), 2, "no http(s) URL"),
        ("", ("complete", "--url", "http://x:y", "x"), 2, "is no URL"),
        ("", ("complete",), 2, "0 characters"),
        ("", ("serve", "--port", "70000"), 2, "port is '70000' (--port)"),
        ("", ("serve", "--host", "0.0.0.0"), 2, "only loopback"),
        ("", ("serve", "--no-such"), 2, "unrecognized arguments"),
        ("", ("model", "check", "nowhere"), 3, "model_invalid"),
        ("", ("explain", "chatcmpl-1"), 1, "nothing has been recorded"),
        ("", (), 2, ""),
    ],
)
def test_failures_have_a_line_and_a_status(
    server: type[FakeServer], mode: str, arguments: tuple[str, ...], status: int, words: str
) -> None:
    server.mode = mode
    if arguments[:1] == ("complete",) and "--url" not in arguments:
        arguments = (*arguments, "--url", server.url)  # type: ignore[attr-defined]
    done = isthmus(*arguments)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_config_shows_values_and_sources(tmp_path: Path) -> None:
    done = isthmus("config", "--json", "--port", "9", home=tmp_path)
    shown = json.loads(done.stdout)
    assert shown["port"] == {"value": 9, "source": "--port"}
    assert shown["host"] == {"value": "127.0.0.1", "source": "default"}


def test_chat_in_a_terminal_stops_an_answer_and_goes_on(server: type[FakeServer], tmp_path: Path) -> None:
    server.mode = "endless"
    child, terminal = pty.fork()
    if child == 0:
        # As a terminal starts it, also where the tests run in the background of a shell, which ignores the signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        environment = {"PYTHONPATH": "src", "HOME": str(tmp_path), "TERM": "dumb"}
        command = [sys.executable, "-m", "isthmus", "chat", "--url", server.url]  # type: ignore[attr-defined]
        os.execve(sys.executable, command, environment)
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        for _ in range(20_000):
            if words in seen:
                seen = seen.partition(words)[2]
                return
            assert select.select([terminal], [], [], 60)[0], f"{words!r} did not come"
            seen += os.read(terminal, 65536)
        pytest.fail(f"{words!r} did not come")

    try:
        until(b"you> ")
        os.write(terminal, b"a question\n")
        until(b"......")
        os.write(terminal, b"\x03")
        until(b"stopped")
        until(b"you> ")
        assert server.gone.wait(30), "the server was not told"
        os.write(terminal, b"\x04")
        _, status = os.waitpid(child, 0)
        child = 0
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)
    history = tmp_path / ".local" / "state" / "isthmus" / "chat_history"
    assert "a question" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_the_pasted_request_survives_a_shell() -> None:
    command = curl("http://127.0.0.1:8000", "it's").replace("curl", "printf '%s\\n'", 1)
    lines = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(lines[-1])["model"] == "it's"


def test_progress_without_a_terminal_is_one_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleUi(Screen()) as ui:
        for fraction in (0.0, 0.5, 1.0):
            ui.on_progress("weights", fraction)
        ui.on_progress("self-test", 0.0)
        ui.on_stopping(1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "weights ...",
        "self-test ...",
        "finishing 1 request; Ctrl-C again to end at once",
    ]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b]0;x\x07\r\n\tb\x9b\x7fé") == "a]0;x\n\tbé"
