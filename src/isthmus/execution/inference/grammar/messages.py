"""What travels between the engine and its grammar process: bounded msgpack frames, tagged by `type`.

    engine -> process    Setup, then Open | Advance | Close
    process -> engine    Loaded | Refused, then Stepped | Refused

There are two lanes, which do not wait for each other: at most one `Open` and at most one `Advance` are unanswered at a
time. An `Advance` may be answered by several `Stepped`, so that a slow session does not hold up the others.
"""

import msgspec

from isthmus.contracts.constraints import ConstraintKind
from isthmus.contracts.errors import EngineFailed, InvalidInput, IsthmusError, TooLarge, Unsupported
from isthmus.contracts.events import ErrorInfo

_ERRORS: dict[str, type[InvalidInput]] = {kind.code: kind for kind in (InvalidInput, TooLarge, Unsupported)}


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """Load the tokenizer in this file. Masks have `vocab_size` bits, rounded up to whole 32-bit words.

    `cpu_s` of CPU time for one question end the process, should the engine not be there to do it.
    """

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]
    cpu_s: int


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Compile a constraint, follow it through `output_ids`, and give the first masks.

    `guesses` are what may come next; at most `limit` drafts are wanted.
    """

    session: int
    kind: ConstraintKind
    text: str
    output_ids: list[int]
    guesses: list[int]
    limit: int


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One session of an `Advance`: the tokens chosen since, then as in `Open`."""

    session: int
    token_ids: list[int]
    guesses: list[int]
    limit: int


class Advance(msgspec.Struct, frozen=True, tag="advance"):
    """Follow these sessions and give their next masks."""

    steps: list[Step]


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Forget these sessions."""

    sessions: list[int]


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The process takes questions."""


class Masks(msgspec.Struct, frozen=True, array_like=True):
    """A mask for the next position and one after each of `drafts`. `lost`: looking ahead went over a limit, so the
    session has to be opened anew; the masks are good.
    """

    session: int
    drafts: list[int]
    masks: list[bytes]
    lost: bool = False


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """The masks of some sessions."""

    parts: list[Masks]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A session (0: the set-up) cannot go on, and why. The process has forgotten it."""

    session: int
    error: ErrorInfo


Question = Setup | Open | Advance | Close
Answer = Loaded | Stepped | Refused


def to_error(info: ErrorInfo) -> IsthmusError:
    """The error that `info` describes."""
    kind = _ERRORS.get(info.code)
    return EngineFailed(info.message) if kind is None else kind(info.message, info.field)
