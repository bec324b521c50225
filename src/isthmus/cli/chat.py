"""`isthmus chat`: a conversation in the terminal with a running server.

Answers stream; Ctrl-C stops the one that is coming (the server stops working on it), Ctrl-D leaves. After each answer
a line says how many tokens came, how fast, how soon the first, and how much of the prompt's state was reused. What the
model thinks before it answers is dimmed. With `--tools` it may call tools: each call is shown, and the line typed next
is its result.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from isthmus.cli.client import Answer, Call, Client
from isthmus.cli.failure import OK, USAGE, CommandFailed
from isthmus.cli.flags import load_settings
from isthmus.cli.sampling import add_client_flags, sampling_of, url_of
from isthmus.cli.terminal import BOLD, CYAN, DIM, RED, Screen, printable
from isthmus.contracts.clock import SystemClock

MAX_HISTORY_LINES = 1000
MAX_TOOLS_BYTES = 1024 * 1024
HELP = """/help           this text
/reset          forget the conversation (a system message stays)
/system TEXT    set the system message and start over; without TEXT remove it
/retry          ask again for the last answer
/save FILE      write the conversation to FILE as JSON
/quit           leave (also Ctrl-D)
A line that ends in \\ goes on in the next. Ctrl-C stops an answer."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a running server",
        description="Talk to a running server in the terminal.",
        epilog=f"while chatting:\n{HELP}\n\nexample:\n  isthmus chat --system 'Answer briefly.' --temperature 0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--tools", metavar="FILE", help="tools to offer: a JSON array in OpenAI's shape")
    parser.add_argument("--no-history", action="store_true", help="do not keep typed lines for the next time")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the person leaves. The exit status."""
    screen = Screen()
    client = Client(url_of(arguments), SystemClock())
    model = arguments.model or client.model()
    body = {**sampling_of(arguments), **_tools(arguments.tools)}
    conversation = Conversation(screen, client, model, body, arguments.system)
    interactive = sys.stdin.isatty()
    if interactive:
        screen.line(f"{printable(model)} at {client.url}", BOLD)
        screen.line("/help for commands, Ctrl-D to leave", DIM)
    history = load_settings(arguments).settings.chat_history_path if interactive and not arguments.no_history else None
    with _line_editing(history, enabled=interactive):
        for text in _inputs(screen, interactive=interactive):
            if not conversation.take(text):
                break
    return OK


def _tools(name: str | None) -> dict[str, Any]:
    """The tools in the file called `name`, as a part of a request. Raises `CommandFailed`."""
    if name is None:
        return {}
    try:
        with Path(name).open("rb") as file:
            data = file.read(MAX_TOOLS_BYTES + 1)
        tools = json.loads(data)
    except OSError as error:
        raise CommandFailed(f"{name} cannot be read: {error.strerror}", USAGE) from error
    except (ValueError, RecursionError) as error:
        raise CommandFailed(f"{name} is not JSON", USAGE) from error
    if len(data) > MAX_TOOLS_BYTES or not isinstance(tools, list):
        raise CommandFailed(f"{name} is no JSON array of at most {MAX_TOOLS_BYTES} bytes", USAGE)
    return {"tools": tools}


class Conversation:
    """The messages so far, and what a line typed does to them. `waiting` are calls whose results are to be typed."""

    def __init__(
        self, screen: Screen, client: Client, model: str, body: dict[str, Any], system: str | None = None
    ) -> None:
        self._screen = screen
        self._client = client
        self._base = {"model": model, **body}
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[Call] = []
        self._set_system(system or "")
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/retry": self._retry,
            "/save": self._save,
        }

    def take(self, text: str) -> bool:
        """Act on one input. False when the person leaves."""
        name, _, rest = text.strip().partition(" ")
        if not name:
            return True
        if name in ("/quit", "/exit"):
            return False
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/") and name[1:].isalpha():
            self._screen.line(f"{printable(name)} is no command; /help lists them", DIM)
        elif self.waiting:
            self._result(text)
        else:
            self.messages.append({"role": "user", "content": text})
            self._ask()
        return True

    def _result(self, text: str) -> None:
        """Take what was typed as the result of the first call that waits for one; ask on after the last."""
        call = self.waiting.pop(0)
        self.messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
        if self.waiting:
            self._next_result()
        elif not self._ask():
            self.waiting = [call]

    def _next_result(self) -> None:
        self._screen.line(f"the next line is the result of {printable(self.waiting[0].name)}", DIM)

    def _ask(self) -> bool:
        """Stream an answer to the messages. What a person stopped is kept so far; what failed is taken back: False."""
        answer = Answer()
        stopped, thought = "", False
        self._screen.write(self._screen.paint(f"{printable(str(self._base['model']))}> ", CYAN, BOLD))
        try:
            body = {**self._base, "messages": self.messages}
            with closing(self._client.stream("/v1/chat/completions", body, answer)) as pieces:
                for piece in pieces:
                    if thought and not piece.reasoning:
                        self._screen.line()
                    thought = piece.reasoning
                    text = printable(piece.text)
                    self._screen.write(self._screen.paint(text, DIM) if thought else text)
        except KeyboardInterrupt:
            stopped = "stopped · "
        except CommandFailed as error:
            self._screen.line()
            self._screen.line(str(error), RED)
            self.messages.pop()
            return False
        self._screen.line()
        # A call that was cut off is no call.
        self.waiting = [call for _, call in sorted(answer.calls.items())] if answer.finish == "tool_calls" else []
        for call in self.waiting:
            self._screen.line(f"calls {printable(call.name)} with {printable(call.arguments)}", CYAN)
        self._screen.line(stopped + answer.summary, DIM)
        self.messages.append(_message(answer, self.waiting))
        if self.waiting:
            self._next_result()
        return True

    def _help(self, _: str) -> None:
        self._screen.line(HELP, DIM)

    def _reset(self, _: str) -> None:
        self.waiting = []
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        self._screen.line("the conversation is empty", DIM)

    def _system(self, text: str) -> None:
        self._set_system(text)
        self._screen.line("system message set, conversation empty" if text else "no system message", DIM)

    def _set_system(self, text: str) -> None:
        self.waiting = []
        self.messages = [{"role": "system", "content": text}] if text else []

    def _retry(self, _: str) -> None:
        self.waiting = []
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if self.messages and self.messages[-1]["role"] in ("user", "tool"):
            self._ask()
        else:
            self._screen.line("there is nothing to ask again", DIM)

    def _save(self, name: str) -> None:
        if not name:
            self._screen.line("/save needs a file name", DIM)
            return
        try:
            Path(name).write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            self._screen.line(f"{printable(name)} cannot be written: {error.strerror}", RED)
        else:
            self._screen.line(f"{len(self.messages)} messages saved to {printable(name)}", DIM)


def _message(answer: Answer, calls: list[Call]) -> dict[str, Any]:
    """The message of an answer, as it goes back to the server."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _inputs(screen: Screen, *, interactive: bool) -> Iterator[str]:
    """What the person enters, continued lines joined, until the end of input."""
    parts: list[str] = []
    while True:
        try:
            line = input(_prompt(screen, more=bool(parts))) if interactive else sys.stdin.readline()
        except EOFError:
            screen.line()
            return
        except KeyboardInterrupt:
            screen.line()
            parts = []
            continue
        if not interactive:
            if not line:
                return
            line = line.rstrip("\n")
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []


def _prompt(screen: Screen, *, more: bool) -> str:
    text = "...> " if more else "you> "
    # readline must not count colour codes as columns: \001 and \002 enclose them.
    return f"\001{BOLD}\002{text}\001\x1b[0m\002" if screen.colour else text


@contextmanager
def _line_editing(history: Path | None, *, enabled: bool) -> Iterator[None]:
    """Editing and history of lines while the body runs; the history is private and bounded."""
    if not enabled:
        yield
        return
    import readline  # only a person at a terminal needs it

    readline.set_history_length(MAX_HISTORY_LINES)
    if history is not None:
        with suppress(OSError):
            readline.read_history_file(history)
    try:
        yield
    finally:
        if history is not None:
            with suppress(OSError):
                history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                history.touch(mode=0o600)
                readline.write_history_file(history)
