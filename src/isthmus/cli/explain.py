"""`isthmus explain`: what happened to a request, from the journal."""

import argparse

from isthmus.cli.failure import FAILED, OK
from isthmus.cli.flags import add_settings, load_settings
from isthmus.cli.terminal import Screen


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "explain",
        help="tell what happened to a request",
        description="Tell what happened to a request: who, which model, what was reused, where time went, the outcome.",
        epilog="Works while the server runs and after. The id is in every answer (`id`, header `x-request-id`).\n\n"
        "example:\n  isthmus explain chatcmpl-1f0c6a2b9d3e4f5061728394",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("request_id", metavar="REQUEST_ID")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings(parser, only=("state_dir",))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it. 1 when nothing is recorded about the request."""
    from isthmus.observability.explain import explain, to_json, to_text
    from isthmus.state.journal.reader import JournalReader

    reader = JournalReader(load_settings(arguments).settings.journal_path)
    try:
        explanation = explain(reader, arguments.request_id)
    finally:
        reader.close()
    Screen().line(to_json(explanation) if arguments.json else to_text(explanation))
    return OK if explanation.facts else FAILED
