"""Which reads a batch needs: few, long and in the order of the disk. Pure.

A record is wanted as one or two ranges: header and digests, and the chunks wanted. When the chunks begin near the
front they are one range. Ranges that lie close together, as those of blocks written together do, are read together;
long ones are cut into windows, so that several are in flight. What a header adds to a window's length of chunks makes
no window of its own: a window may be longer by `slack_of` when that is the end of a range.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.contracts.blocks import Shape
from isthmus.state.kv.log.format import SECTOR, align, payload_offset

NEAR_BYTES = 64 << 10
"""Header and chunks are one range when at most so much that nobody wants lies between them."""
GAP_BYTES = 16 << 10
"""Ranges of different records are read together when at most so much lies between them."""
SLACK_PART = 16
LEAST_WINDOW = 2 << 20
SHARES = 16
"""Windows that a batch is cut into at least, unless they would be shorter than `LEAST_WINDOW`."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [offset, end) of the disk that read `index` of a batch wants, or that a window brings for it."""

    index: int
    offset: int
    end: int


@dataclass(slots=True)
class Window:
    """One read from the disk, of whole sectors."""

    offset: int
    end: int
    parts: list[Range] = field(default_factory=list)


def ranges_of(index: int, start: int, shape: Shape, first_chunk: int, count: int) -> list[Range]:
    """What has to be read for `count` chunks of the record that begins at `start` of the disk."""
    head = payload_offset(shape.chunks)
    begin = start + head + first_chunk * shape.chunk_bytes
    end = begin + count * shape.chunk_bytes
    if begin - (start + head) <= NEAR_BYTES:
        return [Range(index, start, end)]
    return [Range(index, start, start + head), Range(index, begin, end)]


def window_of(total: int, most: int) -> int:
    """How long the windows of a batch of `total` bytes are: at most `most`, and as long as leaves enough of them
    to have some in flight while others are copied; for what a read costs beside its bytes is then paid less often.
    """
    return min(most, max(LEAST_WINDOW, total // SHARES // SECTOR * SECTOR))


def slack_of(window_bytes: int) -> int:
    """How much longer than `window_bytes` a window may be, in whole sectors."""
    return window_bytes // SLACK_PART // SECTOR * SECTOR


def plan(ranges: Sequence[Range], window_bytes: int) -> list[Window]:
    """Windows of at most `window_bytes` (whole sectors) and their slack that bring every byte of every range exactly
    once.
    """
    slack = slack_of(window_bytes)
    windows: list[Window] = []
    for wanted in sorted(ranges, key=lambda one: (one.offset, one.end)):
        at = wanted.offset
        while at < wanted.end:
            last = windows[-1] if windows else None
            if last is None or not last.offset <= at <= last.end + GAP_BYTES or at >= last.offset + window_bytes:
                last = Window(at - at % SECTOR, at)
                windows.append(last)
            until = last.offset + window_bytes
            if wanted.end <= until + slack:
                until = wanted.end
            last.parts.append(Range(wanted.index, at, until))
            last.end = max(last.end, until)
            at = until
    for window in windows:
        window.end = align(window.end)
    return windows
