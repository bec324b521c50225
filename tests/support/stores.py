"""Records for tests of the block store, and ways to open one."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from isthmus.contracts.blocks import (
    BlockStore,
    Lease,
    Lifetime,
    Outcome,
    Owner,
    Put,
    Reason,
    RecordKind,
    Shape,
    Want,
)
from isthmus.contracts.clock import Clock, SystemClock, SystemEntropy
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.client import RemoteStore, open_client
from isthmus.state.kv.daemon import Daemon
from isthmus.state.kv.lanepool import ClientSettings
from isthmus.state.kv.log.settings import LogSettings
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import Store, open_store

OWNER = Owner(b"tenant-one-00000")
OTHER = Owner(b"tenant-two-00000")
SHAPE = Shape(RecordKind.BLOCK, 4, 3000)
SOON = 5.0


def key_of(name: object) -> BlockKey:
    return BlockKey(hashlib.sha256(repr(name).encode()).digest())


def payload_of(name: object, size: int) -> bytes:
    """Bytes that no two names share."""
    return hashlib.shake_128(repr(name).encode()).digest(size)


def put_of(
    name: object,
    shape: Shape = SHAPE,
    owner: Owner = OWNER,
    *,
    parent: object = None,
    lifetime: Lifetime = Lifetime.SESSION,
    payload: bytes | None = None,
) -> Put:
    data = payload_of(name, shape.record_bytes) if payload is None else payload
    return Put(key_of(name), None if parent is None else key_of(parent), owner, shape, memoryview(data), lifetime)


def store_all(store: BlockStore, names: Sequence[object], **how: object) -> list[Outcome]:
    return store.write([put_of(name, **how) for name in names], SOON)  # type: ignore[arg-type]


def reasons(outcomes: Sequence[Outcome]) -> list[Reason]:
    return [outcome.reason for outcome in outcomes]


def read_under(
    store: BlockStore, lease: Lease, name: object, shape: Shape = SHAPE, first: int = 0, count: int | None = None
) -> tuple[Outcome, bytes]:
    chunks = shape.chunks - first if count is None else count
    into = bytearray(chunks * shape.chunk_bytes)
    (outcome,) = store.read(lease, [Want(key_of(name), shape, memoryview(into), first, count)], SOON)
    return outcome, bytes(into)


def read_one(store: BlockStore, name: object, shape: Shape = SHAPE) -> tuple[Outcome, bytes]:
    with store.lease([key_of(name)], 30.0) as lease:
        return read_under(store, lease, name, shape)


def holds(store: BlockStore, name: object, shape: Shape = SHAPE) -> bool:
    """Whether a read gives the bytes that were written. Wrong bytes as a hit fail here and now."""
    outcome, data = read_one(store, name, shape)
    if outcome.reason is Reason.HIT:
        assert data == payload_of(name, shape.record_bytes), "a hit with bytes that were never written under this key"
    return outcome.reason is Reason.HIT


class ShiftedClock(SystemClock):
    """The machine's clock, put forward when told to: the log's threads need time to pass."""

    def __init__(self) -> None:
        self.shift = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.shift

    def advance(self, seconds: float) -> None:
        self.shift += seconds


@dataclass
class Opened:
    """A store under test, the library's object behind it, and its clock."""

    store: BlockStore
    inner: Store
    clock: ShiftedClock
    has_log: bool = False

    def flip(self, name: object, at: int = 0) -> None:
        """Change one bit of a record's bytes in the arena."""
        (record,) = self.inner._parts.dram.where([key_of(name)])
        assert record is not None
        self.inner._parts.dram.arena.view(record)[at] ^= 0x10


Opener = Callable[[Path, StoreSettings], AbstractContextManager[Opened]]


LOG = LogSettings(
    capacity=24 << 20,
    segment_bytes=1 << 20,
    erasure_bytes=64 << 10,
    extent_bytes=128 << 10,
    staging_bytes=4 << 20,
    linger_s=0.001,
    commit_s=0.05,
    read_bytes=256 << 10,
    read_depth=4,
)


def with_log(folder: Path, settings: StoreSettings) -> StoreSettings:
    return msgspec.structs.replace(settings, path=str(folder / "log"), log=LOG)


@contextmanager
def _opened(settings: StoreSettings) -> Iterator[tuple[Store, ShiftedClock]]:
    clock = ShiftedClock()
    store = open_store(settings, clock, SystemEntropy())
    try:
        yield store, clock
    finally:
        store._parts.dram.check()
        store.close()


@contextmanager
def library(folder: Path, settings: StoreSettings) -> Iterator[Opened]:
    with _opened(settings) as (store, clock):
        yield Opened(store, store, clock)


@contextmanager
def library_over_log(folder: Path, settings: StoreSettings) -> Iterator[Opened]:
    with _opened(with_log(folder, settings)) as (store, clock):
        yield Opened(store, store, clock, has_log=True)


@contextmanager
def served(store: Store, clock: Clock, folder: Path, **how: object) -> Iterator[RemoteStore]:
    """A daemon in this process, and a client of it."""
    place = folder / "run"
    settings = DaemonSettings(socket=str(place / "store.sock"), **how)  # type: ignore[arg-type]
    daemon = Daemon(store, settings, clock, SystemEntropy())
    daemon.start()
    client = open_client(Path(settings.socket), clock, ClientSettings(window_bytes=1 << 20, area_bytes=1 << 19))
    try:
        yield client
    finally:
        client.close()
        daemon.stop()


@contextmanager
def daemon(folder: Path, settings: StoreSettings) -> Iterator[Opened]:
    with _opened(settings) as (store, clock), served(store, clock, folder) as client:
        yield Opened(client, store, clock)


@contextmanager
def daemon_over_log(folder: Path, settings: StoreSettings) -> Iterator[Opened]:
    with _opened(with_log(folder, settings)) as (store, clock), served(store, clock, folder) as client:
        yield Opened(client, store, clock, has_log=True)


BACKENDS: dict[str, Opener] = {
    "library": library,
    "library_over_log": library_over_log,
    "daemon": daemon,
    "daemon_over_log": daemon_over_log,
}
