"""What the helper processes of the execution plane share: limits that they set themselves, and their one question line.

A helper (prompting, grammar) works on what strangers wrote: templates, texts, schemas. Promise: a process that has
called `confine` writes no file, leaves no core dump and keeps within its memory; after `allow_cpu` it ends by itself
(SIGXCPU) when it needs more CPU time than that, even if no parent is left to end it.
"""

import math
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from isthmus.contracts.errors import InvalidInput, IsthmusError
from isthmus.contracts.events import ErrorInfo
from isthmus.contracts.wire import FrameReader

Question = TypeVar("Question")

LOAD_CPU_S = 120
"""CPU seconds for everything before the first question."""
READ_BYTES = 1 << 18


def confine(memory_bytes: int) -> None:
    """Set limits for the whole life; that of memory is on top of what the interpreter has mapped already."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))
    allow_cpu(LOAD_CPU_S)


def allow_cpu(seconds: int) -> None:
    """Let this process use `seconds` more of CPU time, from now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def questions(connection: socket.socket, reader: FrameReader[Question]) -> Iterator[Question]:
    """What the parent asks, until the socket ends."""
    while data := connection.recv(READ_BYTES):
        yield from reader.feed(data)


def error_info(error: IsthmusError) -> ErrorInfo:
    """`error` in wire form, with the field that is at fault."""
    return ErrorInfo(error.code, str(error), error.field if isinstance(error, InvalidInput) else "")


def serve_helper(run: Callable[[socket.socket, int], None]) -> None:
    """The entry of a helper, started with `FD MEMORY_BYTES`: serves the inherited socket, until it ends."""
    descriptor, memory_bytes = (int(argument) for argument in sys.argv[1:])
    with socket.socket(fileno=descriptor) as connection, suppress(ConnectionError):
        run(connection, memory_bytes)
