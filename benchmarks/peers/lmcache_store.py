"""LMCache as a peer: `lmcache_store.py KIND FOLDER MEMORY BYTES`, driven over records.py.

KIND is what keeps the records
- cpu: its LocalCPUBackend. A put takes memory of the backend and copies the record to it, a get copies it from there.
- disk: its LocalDiskBackend with O_DIRECT, one file a record, staged in memory of a LocalCPUBackend, as in a server.
  A put is complete when the backend says that the file is written.
- fs_native: its L2 adapter `fs_native` in C++ with O_DIRECT and 4 workers, one file a record. It takes the caller's
  memory as it is, so nothing is copied beside.

Torch copies with one thread or with one a core, whatever is faster when this begins.
"""

from __future__ import annotations

import asyncio
import os
import select
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.l2_adapters.fs_native_l2_adapter import FSNativeL2AdapterConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend
from records import Memory, Record, serve

WAIT_S = 60.0
POOL_SHARE = 1.25
DISK_GIB = 2.0
WORKERS = 4
COPIES = 3
_DTYPE = torch.uint8


@dataclass(frozen=True)
class Item:
    """A record as LMCache's backends take it."""

    key: Any
    source: torch.Tensor
    target: torch.Tensor


def tensor(view: memoryview) -> torch.Tensor:
    """The same memory."""
    return torch.frombuffer(view, dtype=_DTYPE)


def pool(size: int, *, hot: bool, folder: str | None = None) -> tuple[LMCacheEngineConfig, LocalCPUBackend]:
    """A LocalCPUBackend with room for `size` bytes, and the configuration."""
    config = LMCacheEngineConfig.from_defaults(
        local_cpu=hot,
        max_local_cpu_size=size * POOL_SHARE / 2**30,
        local_disk=folder,
        max_local_disk_size=DISK_GIB if folder else 0.0,
        extra_config={"use_odirect": True},
    )
    metadata = LMCacheMetadata("records", 1, 1, 0, 0, _DTYPE, (1, 2, 256, 1, 1))
    return config, LocalCPUBackend(config, metadata, dst_device="cpu")


class Cpu:
    """Records in memory of LMCache."""

    def __init__(self, size: int) -> None:
        self._config, self._backend = pool(size, hot=True)

    def prepare(self, record: Record) -> Item:
        number = int.from_bytes(record.key[:8], "little") >> 1
        return Item(CacheEngineKey("records", 1, 0, number, _DTYPE), tensor(record.source), tensor(record.target))

    def filled(self, items: Sequence[Item]) -> list[Any]:
        """Copies of the records in memory of the backend."""
        found = []
        for item in items:
            held = self._backend.allocate(item.source.shape, _DTYPE, MemoryFormat.KV_2LTD, busy_loop=False)
            if held is None:
                raise MemoryError("LMCache has no room")
            held.tensor.copy_(item.source)
            found.append(held)
        return found

    def put(self, items: Sequence[Item]) -> None:
        held = self.filled(items)
        self._backend.batched_submit_put_task([item.key for item in items], held)
        for one in held:
            one.ref_count_down()

    def settle(self) -> None: ...

    def cool(self) -> None: ...

    def get(self, items: Sequence[Item]) -> None:
        for item, held in zip(items, self._backend.batched_get_blocking([item.key for item in items]), strict=True):
            item.target.copy_(held.tensor)
            held.ref_count_down()

    def drop(self, items: Sequence[Item]) -> None:
        for item in items:
            self._backend.remove(item.key)

    def processes(self) -> Sequence[int]:
        return ()


class Disk(Cpu):
    """Records in files of LMCache."""

    def __init__(self, size: int, folder: str) -> None:
        self._config, self._backend = pool(size, hot=False, folder=folder)
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self._disk = LocalDiskBackend(self._config, loop, self._backend, "cpu")
        if not self._disk.use_odirect:
            raise RuntimeError("LMCache does not use O_DIRECT")
        self._written = threading.Semaphore(0)

    def put(self, items: Sequence[Item]) -> None:
        held = self.filled(items)
        self._disk.batched_submit_put_task(
            [item.key for item in items], held, on_complete_callback=lambda _: self._written.release()
        )
        for one in held:
            one.ref_count_down()
        for _ in items:
            if not self._written.acquire(timeout=WAIT_S):
                raise TimeoutError("LMCache did not write")

    def get(self, items: Sequence[Item]) -> None:
        for item, held in zip(items, self._disk.batched_get_blocking([item.key for item in items]), strict=True):
            item.target.copy_(held.tensor)
            held.ref_count_down()

    def drop(self, items: Sequence[Item]) -> None:
        for item in items:
            if self._disk.remove(item.key):
                self._disk.current_cache_size -= item.source.numel()


class FsNative:
    """Records in files of LMCache's adapter in C++."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._adapter = create_l2_adapter_from_registry(
            FSNativeL2AdapterConfig(folder, num_workers=WORKERS, use_odirect=True), None
        )

    def prepare(self, record: Record) -> tuple[ObjectKey, TensorMemoryObj, TensorMemoryObj]:
        return ObjectKey(record.key, "records", 0), *(self._held(view) for view in (record.source, record.target))

    def _held(self, view: memoryview) -> TensorMemoryObj:
        shape = torch.Size([len(view)])
        form = MemoryObjMetadata(
            shape, _DTYPE, 0, len(view), 1, 0, MemoryFormat.KV_2LTD, shapes=[shape], dtypes=[_DTYPE]
        )
        return TensorMemoryObj(tensor(view), form, None)

    def put(self, items: Sequence[Any]) -> None:
        task = self._adapter.submit_store_task([item[0] for item in items], [item[1] for item in items])
        done: dict[int, Any] = {}
        while task not in done:
            self._wait(self._adapter.get_store_event_fd())
            done |= self._adapter.pop_completed_store_tasks()
        if not done[task].is_successful():
            raise OSError("LMCache did not write")

    def settle(self) -> None: ...

    def cool(self) -> None: ...

    def get(self, items: Sequence[Any]) -> None:
        task = self._adapter.submit_load_task([item[0] for item in items], [item[2] for item in items])
        found = None
        while found is None:
            self._wait(self._adapter.get_load_event_fd())
            found = self._adapter.query_load_result(task)
        if found.popcount() != len(items):
            raise OSError("LMCache did not read")

    def _wait(self, descriptor: int) -> None:
        ready = select.select([descriptor], [], [], WAIT_S)[0]
        if not ready:
            raise TimeoutError("LMCache did not answer")
        os.read(descriptor, 8)

    def drop(self, _: Sequence[Any]) -> None:
        for path in self._folder.rglob("*"):
            if path.is_file():
                path.unlink()

    def processes(self) -> Sequence[int]:
        return ()


def quickest_threads(memory: Memory) -> int:
    """With how many threads torch copies quickest."""
    found = {}
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        start = time.perf_counter()
        for _ in range(COPIES):
            tensor(memory.target).copy_(tensor(memory.source))
        found[threads] = time.perf_counter() - start
    return min(found, key=lambda threads: found[threads])


def main() -> None:
    """Make the store, then answer."""
    kind, folder, path, size = *sys.argv[1:4], int(sys.argv[4])

    def make(memory: Memory) -> Any:
        torch.set_num_threads(quickest_threads(memory))
        if kind == "cpu":
            return Cpu(size)
        return Disk(size, folder) if kind == "disk" else FsNative(folder)

    serve(make, path, size)


if __name__ == "__main__":
    main()
