"""Exit statuses of the command line, and the errors that are its own."""

from isthmus.contracts.errors import ConfigInvalid, ExactUnavailable, InvalidInput, IsthmusError, ModelInvalid

OK = 0
FAILED = 1
USAGE = 2
MODEL = 3
UNREACHABLE = 4
REFUSED = 5
INTERRUPTED = 130

STATUSES = """exit status:
  0 done   1 failed   2 wrong usage or setting   3 the model cannot be served
  4 no server answers   5 the server refused   130 interrupted"""


class CommandFailed(Exception):
    """A command cannot go on: a message for people and the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: IsthmusError) -> int:
    """The exit status for an error of the tree."""
    if isinstance(error, ModelInvalid | ExactUnavailable):
        return MODEL
    return USAGE if isinstance(error, ConfigInvalid | InvalidInput) else FAILED
