"""`isthmus complete`: one completion, streamed to standard output."""

import argparse
import sys
from typing import Any

from isthmus.cli.client import Answer, Client
from isthmus.cli.failure import OK, USAGE, CommandFailed
from isthmus.cli.sampling import add_client_flags, sampling_of, url_of
from isthmus.cli.terminal import Screen, printable
from isthmus.contracts.clock import SystemClock

MAX_PROMPT_CHARS = 8 * 1024 * 1024


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "complete",
        help="complete a text with a running server",
        description="Complete a text with a running server: text goes to standard output, figures to error.",
        epilog='examples:\n  isthmus complete "Once upon a time" --max-tokens 64\n'
        "  cat notes.txt | isthmus complete --stop END",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="*", help="the text (words are joined); standard input when absent or -")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    parser.add_argument("--quiet", action="store_true", help="no figures")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it. The exit status."""
    screen = Screen()
    prompt = " ".join(arguments.prompt)
    if prompt in ("", "-"):
        prompt = sys.stdin.read(MAX_PROMPT_CHARS + 1)
    if not prompt or len(prompt) > MAX_PROMPT_CHARS:
        raise CommandFailed(f"the prompt has {len(prompt)} characters, accepted: 1 to {MAX_PROMPT_CHARS}", USAGE)
    client = Client(url_of(arguments), SystemClock())
    body: dict[str, Any] = {"model": arguments.model or client.model(), "prompt": prompt, **sampling_of(arguments)}
    if arguments.stop:
        body["stop"] = arguments.stop
    answer = Answer()
    for piece in client.stream("/v1/completions", body, answer):
        screen.write(printable(piece.text) if screen.out.isatty() else piece.text)
    screen.line()
    if not arguments.quiet:
        screen.err.write(f"{answer.summary}\n")
    return OK
