"""What the disk under a folder and this machine can do: `python -m isthmus.bench.disk_limits FOLDER` writes one
JSON object.

Transfers at random places of a file that has been written before, through the store's own channels, by both backends:
GB/s (1e9 bytes) and milliseconds of CPU a GB, the kernel's and its helpers' included. memcpy: pieces that lie in no
cache, and one piece again and again. Each figure is of a fraction of a second, so that nothing else should run.
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from isthmus.state.kv.io.disk import AlignedBuffers, Backend, Channel, Disk, Op, Transfer, open_disk

FILE_BYTES = 1 << 30
SECONDS = 0.4
SIZES = (64 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 8, 32)
COPY_BYTES = 256 << 20
SEED = 1

_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class DiskRate:
    """One backend moving pieces of `size` bytes with `depth` in flight."""

    backend: str
    operation: str
    size: int
    depth: int
    gb_per_s: float
    cpu_ms_per_gb: float
    cpu_us_per_transfer: float


@dataclass(frozen=True, slots=True)
class CopyRate:
    """One core copying pieces of `size` bytes."""

    size: int
    cached: bool
    gb_per_s: float


def disk_rates(folder: Path, seconds: float = SECONDS, file_bytes: int = FILE_BYTES) -> Iterator[DiskRate]:
    """Every combination, for `seconds` each. The file is removed in the end."""
    path = folder / "disk-limits.bin"
    backends: tuple[Backend, ...] = ("io_uring", "threads")
    try:
        for backend in backends:
            disk = open_disk(path, capacity=file_bytes, create=True, backend=backend)
            try:
                _fill(disk)
                for operation in Op:
                    for size in SIZES:
                        for depth in DEPTHS:
                            yield _measured(disk, operation, size, depth, seconds)
            finally:
                disk.close()
    finally:
        path.unlink(missing_ok=True)


def copy_rates(seconds: float = SECONDS) -> Iterator[CopyRate]:
    """Copying between two areas that are resident already."""
    buffers = AlignedBuffers(2, COPY_BYTES)
    source, target = buffers.take(), buffers.take()
    if source is None or target is None:
        return
    for size in SIZES:
        for cached in (False, True):
            places = range(0, size if cached else COPY_BYTES - size + 1, size)
            moved, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                for place in places:
                    target[place : place + size] = source[place : place + size]
                moved += size * len(places)
            yield CopyRate(size, cached, moved / (time.perf_counter() - start) / 1e9)
    source.release()
    target.release()
    buffers.close()


def _fill(disk: Disk) -> None:
    """Write all of it: what was only reserved reads as zeros without the disk, and is slower to write."""
    size = max(SIZES)
    buffers = AlignedBuffers(8, size)
    channel = disk.channel(8, buffers)
    views = [view for view in (buffers.take() for _ in range(8)) if view is not None]
    for view in views:
        view[:] = random.Random(SEED).randbytes(size)
    offset = 0
    while offset < disk.capacity or channel.in_flight:
        while offset < disk.capacity and channel.in_flight < channel.depth:
            slot = offset // size % len(views)
            channel.submit([Transfer(Op.WRITE, offset, views[slot], slot)])
            offset += size
        _completed(channel)
    channel.close()
    disk.sync()


def _measured(disk: Disk, operation: Op, size: int, depth: int, seconds: float) -> DiskRate:
    buffers = AlignedBuffers(depth, size)
    channel = disk.channel(depth, buffers)
    views = [view for view in (buffers.take() for _ in range(depth)) if view is not None]
    draw, places = random.Random(SEED), disk.capacity // size
    moved, cpu, start = 0, time.process_time(), time.perf_counter()
    free = list(range(depth))
    while (ongoing := time.perf_counter() - start < seconds) or channel.in_flight:
        if ongoing:
            channel.submit([Transfer(operation, draw.randrange(places) * size, views[tag], tag) for tag in free])
        free = _completed(channel)
        moved += len(free)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    channel.close()
    done = moved * size / 1e9
    return DiskRate(disk.backend, operation.name.lower(), size, depth, done / wall, cpu * 1e3 / done, cpu * 1e6 / moved)


def _completed(channel: Channel) -> list[int]:
    """The tags of what has ended, at least one. Raises `OSError` when a transfer failed."""
    ended = channel.wait(1, _WAIT_S)
    for completion in ended:
        if completion.error:
            raise OSError(completion.error, "a transfer failed")
    if not ended:
        raise TimeoutError(f"no transfer ended within {_WAIT_S:.0f} s")
    return [completion.tag for completion in ended]


def main() -> None:
    """Measure under the folder named."""
    folder = Path(sys.argv[1])
    found = {"disk": [*map(asdict, disk_rates(folder))], "memcpy": [*map(asdict, copy_rates())], "seed": SEED}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
