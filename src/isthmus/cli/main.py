"""The command `isthmus`: parses arguments, runs one command, turns errors into a line and an exit status.

Start-up is fast because nothing heavy is imported before a command needs it; torch never is in this process.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import isthmus
from isthmus.cli import bench, chat, complete, configure, explain, model, serve, store
from isthmus.cli.failure import FAILED, INTERRUPTED, STATUSES, USAGE, CommandFailed, status_of
from isthmus.cli.terminal import Screen
from isthmus.contracts.errors import IsthmusError


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="isthmus",
        description="Isthmus: a state-first serving fabric for language models.",
        epilog=f"first steps:\n  isthmus serve          then, in another terminal:\n  isthmus chat\n\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"isthmus {isthmus.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (serve, chat, complete, model, explain, store, bench, configure):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return USAGE
    screen = Screen()
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        screen.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`isthmus config | head`): nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except CommandFailed as error:
        screen.error(str(error))
        return error.status
    except IsthmusError as error:
        screen.error(f"{error} [{error.code}]")
        return status_of(error)
    return status


if __name__ == "__main__":
    sys.exit(main())
