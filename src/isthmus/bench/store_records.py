"""The far end of a store's measurement: answers questions about the store that it is given, line by line.

benchmarks/peers/records.py is the same for stores of others, in their own environments; a test holds them together.
There the question, the answer and what is measured are described.
"""

import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any, Protocol, TextIO

PAGE = 4096
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One record: where the producer has it, and where the consumer wants it."""

    key: bytes
    source: memoryview
    target: memoryview


class Measured(Protocol):
    """A store that is measured. `prepare` is not: it makes of a record what `put` and `get` take."""

    def prepare(self, record: Record) -> Any:
        """What `put` and `get` take for a record."""
        ...

    def put(self, batch: Sequence[Any]) -> None:
        """Take records in."""
        ...

    def settle(self) -> None:
        """Return when everything that was put is where this store keeps it."""
        ...

    def cool(self) -> None:
        """Keep nothing nearer than where it is to be read from. Not measured."""
        ...

    def get(self, batch: Sequence[Any]) -> None:
        """Bring records to the consumer."""
        ...

    def drop(self, items: Sequence[Any], /) -> None:
        """Forget them. Not measured."""
        ...

    def processes(self) -> Sequence[int]:
        """Other processes that work for it."""
        ...


class Memory:
    """The producer's and the consumer's memory, in the file at `path`, one after the other, `size` bytes each."""

    def __init__(self, path: str, size: int) -> None:
        descriptor = os.open(path, os.O_RDWR)
        whole = memoryview(mmap.mmap(descriptor, 2 * size))
        os.close(descriptor)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        self.source, self.target = whole[:size], whole[size:]
        bytes(self.source[::PAGE])
        self.clear(size)

    def clear(self, size: int) -> None:
        """Nothing of an earlier question is left in the consumer's memory."""
        for at in range(0, size, PIECE):
            self.target[at : at + PIECE] = bytes(min(PIECE, size - at))

    def intact(self, size: int) -> bool:
        """Whether the consumer has what the producer had."""
        spans = (slice(at, min(at + PIECE, size)) for at in range(0, size, PIECE))
        return all(bytes(self.source[span]) == bytes(self.target[span]) for span in spans)

    def records(self, question: dict[str, int]) -> list[Record]:
        """Those of a question."""
        size, label = question["size"], json.dumps(sorted(question.items()))
        found = []
        for number in range(question["records"]):
            key = blake2b(f"{label} {number}".encode(), digest_size=32).digest()
            span = slice(number * size, (number + 1) * size)
            found.append(Record(key, self.source[span], self.target[span]))
        return found


def create_memory(size: int) -> int:
    """A descriptor of memory for `Memory`: the producer's bytes are random, and the same always."""
    descriptor = os.memfd_create("isthmus-records")
    os.ftruncate(descriptor, 2 * size)
    draw = Random(size)
    for at in range(0, size, PIECE):
        os.pwrite(descriptor, draw.randbytes(min(PIECE, size - at)), at)
    return descriptor


def cpu_seconds(processes: Sequence[int]) -> float:
    """CPU seconds of this process and others until now, threads included (the clocks of clock_getcpuclockid)."""
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in processes)


def measured(store: Measured, items: Sequence[Any], batch: int, *, put: bool) -> dict[str, Any]:
    """One operation on all items, `batch` of them in a call."""
    calls, work = [], store.put if put else store.get
    batches = [items[at : at + batch] for at in range(0, len(items), batch)]
    processes = store.processes()
    cpu, start = cpu_seconds(processes), time.perf_counter()
    before = start
    for one in batches:
        work(one)
        now = time.perf_counter()
        calls.append(now - before)
        before = now
    if put:
        store.settle()
    wall, cpu = time.perf_counter() - start, cpu_seconds(processes) - cpu
    return {"wall_s": wall, "cpu_s": cpu, "calls_s": calls}


def answer(store: Measured, memory: Memory, question: dict[str, int]) -> dict[str, Any]:
    """Put, get, compare, forget."""
    size = question["size"] * question["records"]
    memory.clear(size)
    items = [store.prepare(record) for record in memory.records(question)]
    try:
        found = {"put": measured(store, items, question["batch"], put=True)}
        store.cool()
        found["get"] = measured(store, items, question["batch"], put=False)
    finally:
        store.drop(items)
    return {**found, "intact": memory.intact(size)}


def serve(make: Callable[[Memory], Measured], memory: Memory, questions: TextIO, answers: TextIO) -> None:
    """Say that the store is ready; then answer each line."""
    store = make(memory)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in questions:
        print(json.dumps(answer(store, memory, json.loads(line))), file=answers, flush=True)


def serve_here(make: Callable[[Memory], Measured], path: str, size: int) -> None:
    """`serve` on standard input and output. What a library prints goes to the log."""
    answers, sys.stdout = sys.stdout, sys.stderr
    serve(make, Memory(path, size), sys.stdin, answers)
