"""The processes of `isthmus bench restart` that are killed, or that look at what is left.

`python -m isthmus.bench.restart_worker client SOCKET CHUNKS CHUNK_BYTES SEED` is a client of a store's daemon. Orders
come in and answers go out, one JSON a line, all times in seconds:

    {"write": [first, count], "bytes_per_s": at most, 0: as fast as it goes}
        {"kept": [first, count], "sequence": ..., "durable": ..., "lag_s": ..., "at": ...} for each batch when it was
        taken in; at last {"end": reason}: not "stored" when the store refused one, or was gone
    {"flush": within_s}
        {"durable": watermark}
    {"served": number, "within_s": ...}
        {"at": ...} when the store has that record (again), {"at": null}: not in time
    {"read": [[first, count], ...]}
        {"reasons": {...}, "tiers": {...}, "wrong": how many, "missed": [numbers], "seconds": ...}

`at` is the machine's monotonic clock, which its processes share.

`python -m isthmus.bench.restart_worker open STATE_DIR DISK` opens the log of a store as its daemon does, says how long
that took and what it found, and ends as by a kill.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.app import store_settings
from isthmus.bench.meters import disk_bytes_read
from isthmus.config import load
from isthmus.contracts.blocks import (
    BlockStore,
    Lifetime,
    Owner,
    Put,
    Reason,
    RecordKind,
    Shape,
    Tier,
    Want,
)
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.client import open_client
from isthmus.state.kv.io.disk import open_disk
from isthmus.state.kv.lanepool import ClientSettings
from isthmus.state.kv.log.opening import open_log

BATCH_BYTES = 4 << 20
MOST_BATCH = 1024
OWNER = Owner(bytes(range(16)))
LEASE_S = 60.0
CALL_S = 60.0
_POLL_S = 0.002
_LIFETIMES = tuple(Lifetime)

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Records of a seed: a number says everything about one."""

    shape: Shape
    seed: int

    @property
    def batch(self) -> int:
        """How many go in a call."""
        return max(1, min(MOST_BATCH, BATCH_BYTES // self.shape.record_bytes))

    def key(self, number: int) -> BlockKey:
        """The key of a record."""
        return BlockKey(blake2b(f"restart {self.seed} {number}".encode(), digest_size=32).digest())

    def payloads(self) -> Callable[[BlockKey], bytes]:
        """What makes the bytes of records: other ones at each place of each of them."""
        size = self.shape.record_bytes
        base = np.frombuffer(np.random.default_rng(self.seed).bytes(-(-size // 32) * 32), np.uint64).reshape(-1, 4)

        def payload(key: BlockKey) -> bytes:
            return (base ^ np.frombuffer(key, np.uint64)).tobytes()[:size]

        return payload


class Worker:
    """Writes and reads records of a source in a store, and tells of each step."""

    def __init__(self, store: BlockStore, source: Source, tell: Callable[[Answer], None]) -> None:
        self._store, self._source, self._tell = store, source, tell
        self._payload = source.payloads()

    def obey(self, order: dict[str, Any]) -> None:
        """Do what an order says, and answer."""
        match order:
            case {"write": [first, count], "bytes_per_s": rate}:
                self._tell({"end": self._write(first, count, rate)})
            case {"flush": within_s}:
                self._tell({"durable": self._store.flush(within_s)})
            case {"served": number, "within_s": within_s}:
                self._tell({"at": self._served(number, within_s)})
            case {"read": ranges}:
                self._tell(self._read(ranges))
            case _:
                raise ValueError(f"{order} is no order")

    def _write(self, first: int, count: int, rate: float) -> str:
        began, size = time.monotonic(), self._source.shape.record_bytes
        for start, end in pieces(first, count, self._source.batch):
            if rate:
                time.sleep(max(0.0, began + (start - first) * size / rate - time.monotonic()))
            outcomes = self._store.write([self._put(number) for number in range(start, end)], CALL_S)
            for outcome in outcomes:
                if outcome.reason is not Reason.STORED or outcome.tier is not Tier.NVME:
                    return f"{outcome.reason} ({outcome.tier})"
            at = time.monotonic()
            stats = self._store.stats()
            lag_s = stats.gauges.get("durable_lag_s", 0.0)
            sequence = max(outcome.sequence for outcome in outcomes)
            kept = [start, end - start]
            self._tell({"kept": kept, "sequence": sequence, "durable": stats.durable, "lag_s": lag_s, "at": at})
        return Reason.STORED

    def _put(self, number: int) -> Put:
        key = self._source.key(number)
        lifetime = _LIFETIMES[number % len(_LIFETIMES)]
        return Put(key, None, OWNER, self._source.shape, memoryview(self._payload(key)), lifetime)

    def _served(self, number: int, within_s: float) -> float | None:
        until, key = time.monotonic() + within_s, self._source.key(number)
        while time.monotonic() < until:
            if self._store.match([key])[0].tier is not None:
                return time.monotonic()
            time.sleep(_POLL_S)
        return None

    def _read(self, ranges: Sequence[Sequence[int]]) -> Answer:
        reasons: Counter[str] = Counter()
        tiers: Counter[str] = Counter()
        missed: list[int] = []
        wrong, began, shape = 0, time.monotonic(), self._source.shape
        for first, count in ranges:
            for start, end in pieces(first, count, self._source.batch):
                keys = [self._source.key(number) for number in range(start, end)]
                buffers = [bytearray(shape.record_bytes) for _ in keys]
                wants = [Want(key, shape, memoryview(into)) for key, into in zip(keys, buffers, strict=True)]
                with self._store.lease(keys, LEASE_S) as lease:
                    outcomes = self._store.read(lease, wants, CALL_S)
                for place, (key, outcome) in enumerate(zip(keys, outcomes, strict=True)):
                    reasons[outcome.reason.value] += 1
                    if outcome.reason is not Reason.HIT:
                        missed.append(start + place)
                        continue
                    tiers[(outcome.tier or Tier.DRAM).value] += 1
                    wrong += buffers[place] != self._payload(key)
        seconds = time.monotonic() - began
        return {"reasons": reasons, "tiers": tiers, "wrong": wrong, "missed": missed, "seconds": seconds}


def pieces(first: int, count: int, most: int) -> Iterator[tuple[int, int]]:
    """[first, first + count) in pieces of at most `most`: from, to."""
    for start in range(first, first + count, most):
        yield start, min(start + most, first + count)


def opened(state: str, disk_size: str) -> Answer:
    """Open the log of a store: seconds, CPU seconds and bytes read, of the opening alone; what it found."""
    settings = store_settings(load({"state_dir": state, "store_disk": disk_size}, {}).settings)
    if settings.log is None:
        raise ValueError("a store without a disk has no log")
    clock, entropy = SystemClock(), SystemEntropy()
    cpu, read, began = time.process_time(), disk_bytes_read(os.getpid()), time.monotonic()
    disk = open_disk(Path(settings.path), capacity=settings.log.capacity)
    log = open_log(disk, settings.log, clock, entropy)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    stats = log.stats()
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "read_bytes": disk_bytes_read(os.getpid()) - read,
        "records": stats.records,
        "log_bytes": stats.used,
        "segments": stats.segments,
        "segments_scanned": stats.counts.get("segments_scanned", 0),
        "records_torn": stats.counts.get("records_torn", 0),
        "index_bytes": stats.index_bytes,
        "backend": disk.backend,
    }


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def tell(answer: Answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if arguments[0] == "open":
        tell(opened(arguments[1], arguments[2]))
        os._exit(0)
    socket, chunks, chunk_bytes, seed = Path(arguments[1]), *map(int, arguments[2:5])
    store = open_client(socket, SystemClock(), ClientSettings())
    worker = Worker(store, Source(Shape(RecordKind.BLOCK, chunks, chunk_bytes), seed), tell)
    tell({"ready": True})
    for line in sys.stdin:
        worker.obey(json.loads(line))
    store.close()


if __name__ == "__main__":
    main(sys.argv[1:])
