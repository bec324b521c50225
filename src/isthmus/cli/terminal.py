"""Text on a terminal that other people's text may be part of."""

import sys
from typing import TextIO

from isthmus.config import read_environment

DIM, BOLD, CYAN, RED, RESET = "\x1b[2m", "\x1b[1m", "\x1b[36m", "\x1b[31m", "\x1b[0m"


def printable(text: str) -> str:
    """`text` without control characters other than newline and tab: a model's output must not drive the terminal."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


class Screen:
    """Standard output and error, coloured when they are terminals and NO_COLOR is unset (no-color.org)."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.colour = self.out.isatty() and not read_environment().get("NO_COLOR")

    def paint(self, text: str, *codes: str) -> str:
        """`text` in colour, or as it is."""
        return f"{''.join(codes)}{text}{RESET}" if self.colour else text

    def write(self, text: str) -> None:
        """Show at once, without a newline."""
        self.out.write(text)
        self.out.flush()

    def line(self, text: str = "", *codes: str) -> None:
        """One line."""
        self.write((self.paint(text, *codes) if codes else text) + "\n")

    def error(self, text: str) -> None:
        """One line on standard error."""
        self.err.write(f"isthmus: {text}\n")
        self.err.flush()
