"""A disk in memory that can crash: what was not synced may be there afterwards, or not, or in part, in any mixture.

- Completions come in any order, some of them late.
- A crash image has, for every sector of 512 bytes, the last synced bytes or those of any write since: whole writes kept
or dropped, writes torn at 512 or 4,096 bytes, or each sector by itself.
- A sync that fails covers nothing, and no later sync covers what it should have covered: only writing it again does.
- Any call can be made to fail: `fail(kind, nth, errno)`. A write that fails may have been done in part.
- The memory of a write must not change while it is in flight.

Seeded: the same calls give the same run.
"""

import errno
import random
from collections import Counter
from collections.abc import Callable, Sequence

from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.io.transfers import Completion, Op, Transfer, admit

ATOM = 512
Call = Callable[[str], None]


class SimDisk:
    """Implements `Disk`. `on_call` is told of every call before it takes effect."""

    backend = "simulated"
    backend_reason = ""
    lost = 0

    def __init__(self, capacity: int = 0, seed: int = 0, image: bytes | None = None) -> None:
        self.durable = bytearray(image if image is not None else bytes(capacity))
        self.capacity = len(self.durable)
        self.view = bytearray(self.durable)
        self.random = random.Random(seed)
        self.calls: Counter[str] = Counter()
        self.on_call: Call | None = None
        self.flying: list[tuple[int, bytes]] = []
        self._versions: dict[int, list[tuple[int, bytes, bool]]] = {}
        self._writes = 0
        self._faults: dict[tuple[str, int], int] = {}
        self._from: dict[str, int] = {}
        self.written = 0
        self.stall: Callable[[float], None] | None = None
        """When set, no transfer ends: waiting only lets time pass, by this."""
        self.failed: list[tuple[str, int]] = []

    # Faults

    def fail(self, kind: str, nth: int, error: int = errno.EIO) -> None:
        """Let the `nth` call of a kind from now on fail: `read`, `write`, `sync`, `zero`, `channel`."""
        self._faults[(kind, self.calls[kind] + nth)] = error

    def fail_always(self, kind: str, error: int = errno.EIO) -> None:
        """Let every call of a kind fail from now on."""
        self._from[kind] = error

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()
        self._from.clear()

    def fault(self, kind: str) -> int:
        """Count a call; its errno."""
        if self.on_call is not None:
            self.on_call(kind)
        self.calls[kind] += 1
        error = self._faults.pop((kind, self.calls[kind]), 0) or self._from.get(kind, 0)
        if error:
            self.failed.append((kind, self.calls[kind]))
        return error

    # Disk

    def channel(self, depth: int, buffers: AlignedBuffers | None = None, *, shared: bool = False) -> "SimChannel":
        if error := self.fault("channel"):
            raise DiskFailed("io_uring_setup", error)
        return SimChannel(self, depth)

    def sync(self) -> None:
        if error := self.fault("sync"):
            self._versions = {
                sector: [(write, data, True) for write, data, _ in versions]
                for sector, versions in self._versions.items()
            }
            raise DiskFailed("fdatasync", error)
        left: dict[int, list[tuple[int, bytes, bool]]] = {}
        for sector, versions in self._versions.items():
            good = [number for number, (_, _, cursed) in enumerate(versions) if not cursed]
            if good:
                self.durable[sector * ATOM : (sector + 1) * ATOM] = versions[good[-1]][1]
                versions = versions[good[-1] + 1 :]
            if versions:
                left[sector] = versions
        self._versions = left

    def zero(self, offset: int, length: int) -> None:
        assert offset % 4096 == length % 4096 == 0
        assert 0 <= offset <= offset + length <= self.capacity
        if error := self.fault("zero"):
            raise DiskFailed("fallocate", error)
        self.apply(offset, bytes(length))

    def close(self) -> None:
        """Nothing to do."""

    # Bytes

    def apply(self, offset: int, data: bytes) -> None:
        """A write is done: visible, not durable."""
        self.view[offset : offset + len(data)] = data
        self._writes += 1
        self.written += len(data)
        self._note(self._versions, offset, data, self._writes)

    def _note(self, versions: dict[int, list[tuple[int, bytes, bool]]], offset: int, data: bytes, write: int) -> None:
        first = offset // ATOM
        for number in range(len(data) // ATOM):
            part = data[number * ATOM : (number + 1) * ATOM]
            versions.setdefault(first + number, []).append((write, part, False))

    def image(self, seed: int) -> bytes:
        """The disk after a crash now."""
        chance = random.Random(seed)
        versions = self._versions
        if self.flying:
            versions = {sector: list(found) for sector, found in versions.items()}
            for number, (offset, data) in enumerate(self.flying, 1):
                self._note(versions, offset, data, self._writes + number)
        found = bytearray(self.durable)
        mode = chance.choice(("none", "all", "writes", "writes", "sectors", "blocks"))
        if mode == "none":
            return bytes(found)
        part = chance.random()
        kept: dict[int, bool] = {}
        for sector, held in versions.items():
            place = {"writes": None, "all": None, "sectors": sector, "blocks": sector // 8}[mode]
            data = None
            for write, bytes_, _ in held:
                name = write if place is None else (write << 32) + place
                if name not in kept:
                    kept[name] = mode == "all" or chance.random() < part
                if kept[name]:
                    data = bytes_
            if data is not None:
                found[sector * ATOM : (sector + 1) * ATOM] = data
        return bytes(found)


class SimChannel:
    """Implements `Channel`."""

    lost = 0

    def __init__(self, disk: SimDisk, depth: int) -> None:
        self._disk = disk
        self.depth = depth
        self._flying: list[tuple[Transfer, bytes]] = []
        self._closed = False

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    def submit(self, transfers: Sequence[Transfer]) -> None:
        assert not self._closed
        admit(transfers, self.depth - self.in_flight)
        for transfer in transfers:
            data = bytes(transfer.buffer) if transfer.op is Op.WRITE else b""
            self._flying.append((transfer, data))
            if transfer.op is Op.WRITE:
                self._disk.flying.append((transfer.offset, data))

    def wait(self, least: int, timeout_s: float) -> list[Completion]:
        assert not self._closed
        disk = self._disk
        if disk.stall is not None:
            disk.stall(timeout_s)
            return []
        # Nobody waits for time here: at least one comes, so that a caller who only looks makes progress too.
        count = disk.random.randint(min(max(least, 1), len(self._flying)), len(self._flying))
        disk.random.shuffle(self._flying)
        done = [self._end(*self._flying[number]) for number in range(count)]
        del self._flying[:count]
        return done

    def _end(self, transfer: Transfer, data: bytes) -> Completion:
        disk = self._disk
        if transfer.op is Op.READ:
            error = disk.fault("read") or _outside(transfer, disk.capacity)
            if not error:
                transfer.buffer[:] = disk.view[transfer.offset : transfer.offset + len(transfer.buffer)]
            return Completion(transfer.tag, error)
        assert bytes(transfer.buffer) == data, "the memory of a write changed while it was in flight"
        error = disk.fault("write") or _outside(transfer, disk.capacity)
        disk.flying.remove((transfer.offset, data))
        if not error:
            disk.apply(transfer.offset, data)
        elif transfer.offset + len(data) <= disk.capacity:
            done = disk.random.randint(0, len(data) // ATOM) * ATOM
            if done:
                disk.apply(transfer.offset, data[:done])
        return Completion(transfer.tag, error)

    def close(self) -> None:
        while self._flying and not self._closed and self._disk.stall is None:
            self.wait(1, 1.0)
        self._closed = True


def _outside(transfer: Transfer, capacity: int) -> int:
    if transfer.offset + len(transfer.buffer) <= capacity:
        return 0
    return errno.EIO if transfer.op is Op.READ else errno.ENOSPC
