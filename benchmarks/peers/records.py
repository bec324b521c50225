"""The far end of `isthmus bench store`, with nothing but the standard library: it runs anywhere.

A question is a line `{"size", "records", "batch", "seed"}`. The store puts so many records of that size, `batch` in a
call, from the producer's memory, and gets them into the consumer's; what is in the consumer's memory then is compared.
The answer has, for each operation, the seconds of each call, the seconds of all of them and of what ended them, and
the CPU seconds of every process of the store meanwhile. Memory of both is the same for every store, resident before
anything is measured, and 4096-byte-aligned; a record never shares its place with another of the same question.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

PAGE = 4096
PIECE = 1 << 20


@dataclass(frozen=True)
class Record:
    """One record: where the producer has it, and where the consumer wants it. Equal keys never come twice."""

    key: bytes
    source: memoryview
    target: memoryview
    source_address: int
    target_address: int

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source)


class Store(Protocol):
    """What is measured. `prepare` is not: it makes of a record whatever `put` and `get` take."""

    def prepare(self, record: Record) -> Any: ...
    def put(self, batch: Sequence[Any]) -> None: ...
    def settle(self) -> None:
        """Return when everything that was put can be read from where this store keeps it."""

    def cool(self) -> None:
        """Keep nothing nearer than where it is to be read from. Not measured."""

    def get(self, batch: Sequence[Any]) -> None: ...
    def drop(self, items: Sequence[Any], /) -> None:
        """Forget them all. Not measured."""

    def processes(self) -> Sequence[int]:
        """Other processes that work for it."""


class Memory:
    """The producer's and the consumer's memory, in the file at `path`, one after the other, `size` bytes each."""

    def __init__(self, path: str, size: int) -> None:
        descriptor = os.open(path, os.O_RDWR)
        whole = memoryview(mmap.mmap(descriptor, 2 * size))
        os.close(descriptor)
        self.address, self.size = ctypes.addressof(ctypes.c_char.from_buffer(whole)), size
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
            span, place = slice(number * size, (number + 1) * size), self.address + number * size
            found.append(Record(key, self.source[span], self.target[span], place, place + self.size))
        return found


def cpu_seconds(processes: Sequence[int]) -> float:
    """CPU seconds of this process and others until now, threads included (the clocks of clock_getcpuclockid)."""
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in processes)


def measured(store: Store, items: Sequence[Any], batch: int, *, put: bool) -> dict[str, Any]:
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


def answer(store: Store, memory: Memory, question: dict[str, int]) -> dict[str, Any]:
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


def serve(make: Callable[[Memory], Store], path: str, size: int) -> None:
    """Say that the store is ready; then answer each line. `size`: bytes of the largest question."""
    # What a library prints must not be taken for an answer: it goes to the log.
    out, sys.stdout = sys.stdout, sys.stderr
    memory = Memory(path, size)
    store = make(memory)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(store, memory, json.loads(line))), file=out, flush=True)
