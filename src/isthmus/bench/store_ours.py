"""The block store as `isthmus bench store` measures it, and plain copies: `python -m isthmus.bench.store_ours
KIND FOLDER MEMORY BYTES` answers questions (store_records.py).

Every record has `CHUNKS` layer chunks, each with its digest. Kinds

- memcpy, memcpy-hot: the processor copies from the producer's memory to the consumer's, over all of it, and one record
again and again.
- arena: the library in this process. daemon: a daemon in another process, its client here.
- store: the library over arena and log. What is put is durable when the last call and a flush are over; what is got
comes from the log, for the arena was emptied.
- log: the log alone, in the same way. log-durable: each call is followed by a flush of its own.
- arena-unverified, log-unverified: as arena and log, but every digest is zeros. The store cannot be told to do this:
here its functions that hash are replaced.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from isthmus.bench.store_records import Measured, Memory, Record, serve_here
from isthmus.contracts.blocks import (
    DIGEST_BYTES,
    BlockStore,
    Lifetime,
    Outcome,
    Owner,
    Put,
    Reason,
    RecordKind,
    Shape,
    Tier,
    Want,
)
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.errors import StoreError, StoreUnavailable
from isthmus.contracts.keys import KEY_BYTES, BlockKey
from isthmus.state.kv.arena import arena as arena_module
from isthmus.state.kv.arena.crew import Crew, crew_for
from isthmus.state.kv.client import open_client
from isthmus.state.kv.daemon import run_daemon
from isthmus.state.kv.io.disk import open_disk
from isthmus.state.kv.lanepool import ClientSettings
from isthmus.state.kv.log import reader as reader_module
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.log.opening import open_log
from isthmus.state.kv.log.records import LogRead, LogRecord
from isthmus.state.kv.log.settings import LogSettings
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import Store, open_store

CHUNKS = 16
LOG_SHARE = 3
SMALL_BYTES = 128 << 20
SPARE_SEGMENTS = 4
"""Those being written, those kept free, and more: of records of half a segment only one fits into each."""
LEAST_SEGMENTS = 12
ARENA_SHARE = 1.25
WAIT_S = 60.0
LEASE_S = 60.0
OWNER = Owner(bytes(range(16)))
WINDOW_BYTES = 32 << 20
_MIB = 1 << 20
_FILL_BYTES = 4 << 20
_DAEMON = "daemon-process"


def shape_of(record: Record) -> Shape:
    """Its layer chunks."""
    return Shape(RecordKind.BLOCK, CHUNKS, len(record.source) // CHUNKS)


def expect(outcomes: Sequence[Outcome], reason: Reason) -> None:
    """Raises `StoreError` unless every outcome has this reason."""
    others = {outcome.reason for outcome in outcomes} - {reason}
    if others:
        raise StoreError(f"a record came out as {', '.join(sorted(others))}, not {reason}")


class Copies:
    """No store at all."""

    def __init__(self, *, hot: bool) -> None:
        self._hot = hot

    def prepare(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """See `Measured`."""
        return np.frombuffer(record.source, np.uint8), np.frombuffer(record.target, np.uint8)

    def get(self, batch: Sequence[Any]) -> None:
        """See `Measured`."""
        for item in batch:
            source, target = self._first if self._hot else item
            np.copyto(target, source)

    def put(self, batch: Sequence[Any]) -> None:
        """See `Measured`: the same copy."""
        self._first = batch[0]
        self.get(batch)

    def settle(self) -> None:
        """See `Measured`."""

    def cool(self) -> None:
        """See `Measured`."""

    def drop(self, items: Sequence[Any]) -> None:
        """Copy what was not copied, so that everything can be compared."""
        for source, target in items:
            np.copyto(target, source)

    def processes(self) -> Sequence[int]:
        """See `Measured`."""
        return ()


class Item(NamedTuple):
    """A record as the port takes it."""

    put: Put
    want: Want


class Ported:
    """Any `BlockStore`: what is put is written, what is got is leased and read."""

    def __init__(self, store: BlockStore, processes: Sequence[int] = ()) -> None:
        self.store = store
        self._processes = processes

    def prepare(self, record: Record) -> Item:
        """See `Measured`."""
        key, shape = BlockKey(record.key), shape_of(record)
        return Item(Put(key, None, OWNER, shape, record.source), Want(key, shape, record.target))

    def put(self, batch: Sequence[Item]) -> None:
        """See `Measured`."""
        expect(self.store.write([item.put for item in batch], WAIT_S), Reason.STORED)

    def settle(self) -> None:
        """See `Measured`."""
        self.store.flush(WAIT_S)

    def cool(self) -> None:
        """See `Measured`."""

    def get(self, batch: Sequence[Item]) -> None:
        """See `Measured`."""
        wants = [item.want for item in batch]
        with self.store.lease([want.key for want in wants], LEASE_S) as lease:
            expect(self.store.read(lease, wants, WAIT_S), Reason.HIT)

    def drop(self, _: Sequence[Item]) -> None:
        """See `Measured`. The store evicts what is oldest by itself."""

    def processes(self) -> Sequence[int]:
        """See `Measured`."""
        return self._processes


class Arena(Ported):
    """The arena alone."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._admin, self._arena = store.admin, store.arena

    def drop(self, _: Sequence[Item]) -> None:
        """See `Measured`. Others are emptied, too: no put has to make room for what an earlier question left."""
        self._admin.evict(Tier.DRAM, self._arena.used, WAIT_S)


class Tiered(Ported):
    """Arena and log, read from the log."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._admin, self._arena = store.admin, store.arena

    def cool(self) -> None:
        """See `Measured`."""
        self._admin.evict(Tier.DRAM, self._arena.used, WAIT_S)
        if len(self._arena):
            raise StoreError(f"{len(self._arena)} records stay in the arena")

    def drop(self, _: Sequence[Item]) -> None:
        """See `Measured`. What was read stays longer than what was not, unless it is told to go."""
        self._admin.evict(Tier.NVME, sum(tier.capacity for tier in self.store.stats().tiers), WAIT_S)


class Logged:
    """The log alone. `verified`: it makes the digests; if not they are zeros."""

    def __init__(self, log: SegmentLog, *, verified: bool, each: bool) -> None:
        self._log, self._verified, self._each = log, verified, each

    def prepare(self, record: Record) -> tuple[Record, Want]:
        """See `Measured`."""
        return record, Want(BlockKey(record.key), shape_of(record), record.target)

    def put(self, batch: Sequence[tuple[Record, Want]]) -> None:
        """See `Measured`."""
        expect(self._log.append([self._record(*item) for item in batch], WAIT_S), Reason.STORED)
        if self._each:
            self.settle()

    def _record(self, record: Record, want: Want) -> LogRecord:
        digests = b"" if self._verified else _zeros(record.source, want.shape.chunk_bytes)
        return LogRecord(record.key, None, OWNER, want.shape, Lifetime.SESSION, digests, record.source)

    def settle(self) -> None:
        """See `Measured`."""
        if self._log.flush(WAIT_S) < self._log.sequence:
            raise StoreUnavailable("the log was not flushed in time")

    def cool(self) -> None:
        """See `Measured`."""

    def get(self, batch: Sequence[tuple[Record, Want]]) -> None:
        """See `Measured`."""
        places = [place for place in self._log.hold([want.key for _, want in batch]) if place is not None]
        try:
            if len(places) < len(batch):
                raise StoreError("the log does not find a record")
            reads = [LogRead(place, want) for place, (_, want) in zip(places, batch, strict=True)]
            expect(self._log.read(reads, WAIT_S), Reason.HIT)
        finally:
            for place in places:
                self._log.unpin(place)

    def drop(self, _: Sequence[Any]) -> None:
        """See `Measured`. What was read stays longer than what was not, unless it is told to go."""
        self._log.evict(self._log.stats().capacity, WAIT_S)

    def processes(self) -> Sequence[int]:
        """See `Measured`."""
        return ()


# Without digests


def _zeros(data: memoryview, chunk_bytes: int) -> bytes:
    return bytes(len(data) // chunk_bytes * DIGEST_BYTES)


def _copy_zeros(source: memoryview, target: memoryview, chunk_bytes: int, _: Crew | None = None) -> bytes:
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
    return _zeros(source, chunk_bytes)


def _copy_believed(
    source: memoryview, target: memoryview, chunk_bytes: int, digests: bytes, _: Crew | None = None
) -> bool:
    return _copy_zeros(source, target, chunk_bytes) == digests


def believe_everything() -> None:
    """From now on nothing is hashed in this process."""
    replaced: list[tuple[ModuleType, str, Callable[..., Any]]] = [
        (arena_module, "copy_digests", _copy_zeros),
        (arena_module, "copy_verified", _copy_believed),
        (reader_module, "digests_of", _zeros),
    ]
    for module, name, function in replaced:
        if not callable(getattr(module, name)):
            raise StoreError(f"{module.__name__} has no function {name}")
        setattr(module, name, function)


# Making them


def segment_bytes(size: int) -> int:
    """Of the segments of each log that is made for questions of at most `size` bytes."""
    return (64 if size >= SMALL_BYTES else 16) * _MIB


def extent_bytes(size: int) -> int:
    """Of a single write of such a log: as `isthmus serve` has them, for large logs and small ones."""
    return 4 * _MIB + (64 << 10) if size >= SMALL_BYTES else 2 * _MIB


def log_bytes(size: int) -> int:
    """Bytes on the disk of each log that is made for questions of at most `size` bytes."""
    segment = segment_bytes(size)
    return max(LOG_SHARE * size + SPARE_SEGMENTS * segment, LEAST_SEGMENTS * segment)


@dataclass(frozen=True, slots=True)
class Making:
    """What is needed to make any kind: a folder for files, and the bytes of the largest question."""

    kind: str
    folder: Path
    size: int

    @property
    def arena(self) -> StoreSettings:
        """An arena with room for everything, and nothing below it."""
        return StoreSettings(arena_bytes=int(self.size * ARENA_SHARE) // _MIB * _MIB + 16 * _MIB)

    @property
    def log(self) -> LogSettings:
        """A log that has to evict what earlier questions left."""
        size = self.size
        return LogSettings(capacity=log_bytes(size), segment_bytes=segment_bytes(size), extent_bytes=extent_bytes(size))

    @property
    def path(self) -> Path:
        """The log's file."""
        return self.folder / f"{self.kind}.log"


def make(making: Making, memory: Memory) -> Measured:
    """The store of a kind, open, and in the state that it is in after a while."""
    clock, entropy = SystemClock(), SystemEntropy()
    kind, unverified, _ = making.kind.partition("-unverified")
    if unverified:
        believe_everything()
    if kind in ("memcpy", "memcpy-hot"):
        return Copies(hot=kind == "memcpy-hot")
    if kind == "arena":
        return Arena(open_store(making.arena, clock, entropy))
    if kind == "daemon":
        return _behind_daemon(making)
    if kind == "store":
        settings = msgspec.structs.replace(making.arena, path=str(making.path), log=making.log)
        return _filled(Tiered(open_store(settings, clock, entropy)), memory, making.log.capacity)
    disk = open_disk(making.path, capacity=making.log.capacity, create=True, backend="auto")
    crew = crew_for(len(os.sched_getaffinity(0)))
    opened = open_log(disk, making.log, clock, entropy, crew=crew)
    log = Logged(opened, verified=not unverified, each=kind == "log-durable")
    return _filled(log, memory, making.log.capacity)


def _filled(store: Measured, memory: Memory, capacity: int) -> Measured:
    """Write as much as the log holds: blocks of a file that were never written are slower to write."""
    size = min(_FILL_BYTES, len(memory.source))
    for number in range(capacity // size):
        key = blake2b(number.to_bytes(8, "little"), digest_size=KEY_BYTES).digest()
        store.put([store.prepare(Record(key, memory.source[:size], memory.target[:size]))])
    store.settle()
    return store


def _behind_daemon(making: Making) -> Measured:
    """A client, and its daemon in a child that ends with its standard input."""
    socket = making.folder / "own" / "store.sock"
    command = [sys.executable, "-m", __spec__.name, _DAEMON, str(socket), str(making.arena.arena_bytes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if child.stdout is None or not child.stdout.readline():
        raise StoreUnavailable("the daemon does not start")
    settings = ClientSettings(window_bytes=WINDOW_BYTES, area_bytes=WINDOW_BYTES)
    return Ported(open_client(socket, SystemClock(), settings), [child.pid])


def _daemon(socket: str, arena_bytes: int) -> None:
    """Serve until standard input ends."""
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    clock, entropy = SystemClock(), SystemEntropy()
    store = open_store(StoreSettings(arena_bytes=arena_bytes), clock, entropy)
    settings = DaemonSettings(socket=socket)
    run_daemon(store, settings, clock, entropy, stop=stop, on_ready=lambda path: print(path, flush=True))


def main() -> None:
    """See the module."""
    kind, *rest = sys.argv[1:]
    if kind == _DAEMON:
        _daemon(rest[0], int(rest[1]))
        return
    making = Making(kind, Path(rest[0]), int(rest[2]))
    serve_here(lambda memory: make(making, memory), rest[1], making.size)


if __name__ == "__main__":
    main()
