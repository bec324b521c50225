"""Weights from safetensors files, checked before a byte is used.

Promise: a folder that loads has exactly the tensors the model needs, each of the right shape and a float dtype, in
files whose headers are consistent; `ModelInvalid` otherwise, naming file and tensor. The digest is BLAKE3 over config
and tensors (names, dtypes, shapes, bytes), so it changes whenever anything that decides the state changes, and not
with the way tensors are split over files.
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from isthmus.contracts.errors import ModelInvalid
from isthmus.contracts.framing import frame
from isthmus.execution.inference.config_fields import read_json

MAX_HEADER_BYTES = 1 << 26
MAX_INDEX_BYTES = 1 << 26
MAX_FILES = 1024
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}
# numpy has no bfloat16: its bits travel as int16 and are viewed as bfloat16 by torch.
RAW_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<i2"), "F16": np.dtype("<f2")}

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor's bytes are: data[start:end] of `file`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name in the serving dtype, and the 32-byte digest of what was read."""

    tensors: dict[str, torch.Tensor]
    digest: bytes
    parameters: int


def check_weights(
    folder: Path, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str], ignored_prefix: str = ""
) -> list[Entry]:
    """Where each of `expected` lies, by name, every header checked but no tensor read. Raises as `load_weights`."""
    with ExitStack() as stack:
        maps = {name: stack.enter_context(_Mapped(folder, name)) for name in _files(folder)}
        entries = _entries(maps, folder)
        _match(entries, expected, ignored, ignored_prefix)
    return [entries[name] for name in sorted(expected)]


def load_weights(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    ignored: frozenset[str],
    dtype: torch.dtype,
    progress: Progress,
    *,
    precise: frozenset[str] = frozenset(),
    ignored_prefix: str = "",
) -> Weights:
    """Load `expected` (name -> shape) from `folder`, cast to `dtype`, or to float32 when named in `precise`.

    Names in `ignored`, and those that begin with `ignored_prefix` if it is not empty, may be there and are not used.
    Raises `ModelInvalid` on anything missing, unexpected, misshapen, truncated or inconsistent.
    """
    with ExitStack() as stack:
        maps = {name: stack.enter_context(_Mapped(folder, name)) for name in _files(folder)}
        entries = _entries(maps, folder)
        _match(entries, expected, ignored, ignored_prefix)
        hasher = blake3(max_threads=blake3.AUTO)
        config = json.dumps(read_json(folder / "config.json", 1 << 20), sort_keys=True).encode()
        hasher.update(frame(b"isthmus/weights/v1", config))
        tensors: dict[str, torch.Tensor] = {}
        parameters = done = 0
        total = sum(entries[name].end - entries[name].start for name in expected) or 1
        for name in sorted(expected):
            entry = entries[name]
            view = maps[entry.file].view(entry)
            hasher.update(_describe(name, entry))
            hasher.update(view)
            tensors[name] = _tensor(view, entry, torch.float32 if name in precise else dtype)
            parameters += tensors[name].numel()
            done += entry.end - entry.start
            progress("loading weights", done / total)
            view.release()
    return Weights(tensors, hasher.digest(), parameters)


def _describe(name: str, entry: Entry) -> bytes:
    shape = b"".join(size.to_bytes(8, "little") for size in entry.shape)
    return frame(b"tensor", name.encode(), entry.dtype.encode(), shape, (entry.end - entry.start).to_bytes(8, "little"))


def _tensor(view: memoryview, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    """An own copy of the bytes as a tensor, so that the file can be unmapped (and changed) afterwards."""
    array = np.frombuffer(view, dtype=RAW_DTYPES[entry.dtype]).reshape(entry.shape).copy()
    tensor = torch.from_numpy(array)
    if entry.dtype == "BF16":
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(dtype)


class _Mapped:
    """One safetensors file, mapped read-only while its tensors are copied."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._path = folder / name
        self._stack = ExitStack()
        self.header: dict[str, Any] = {}
        self.data_start = 0

    def __enter__(self) -> "_Mapped":
        try:
            with self._path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelInvalid(f"{self.name}: cannot be read, or empty") from error
        self._stack.callback(self._map.close)
        try:
            self._read_header()
        except ModelInvalid:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def data_bytes(self) -> int:
        """Length of the data part."""
        return len(self._map) - self.data_start

    def view(self, entry: Entry) -> memoryview:
        """The bytes of a tensor; release it before the file is closed."""
        with memoryview(self._map) as whole:
            return whole[self.data_start + entry.start : self.data_start + entry.end]

    def _read_header(self) -> None:
        length = int.from_bytes(self._map[:8], "little")
        if len(self._map) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, len(self._map) - 8):
            raise ModelInvalid(f"{self.name}: header length {length} does not fit the file: truncated or corrupt")
        try:
            header = json.loads(self._map[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise ModelInvalid(f"{self.name}: the header is not valid JSON") from error
        if not isinstance(header, dict):
            raise ModelInvalid(f"{self.name}: the header is not a JSON object")
        header.pop("__metadata__", None)
        self.header, self.data_start = header, 8 + length


def _files(folder: Path) -> list[str]:
    """The names of the weight files: one, or those of the index. Only plain names inside the folder."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ModelInvalid(f"{folder.name}: has neither {SINGLE} nor {INDEX}; only safetensors are read")
        return [SINGLE]
    listed = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelInvalid(f"{INDEX}: weight_map is not an object with entries")
    names = set(listed.values()) if all(isinstance(value, str) for value in listed.values()) else {""}
    if len(names) > MAX_FILES:
        raise ModelInvalid(f"{INDEX}: names over {MAX_FILES} files")
    for name in sorted(names):
        if not name.endswith(".safetensors") or "/" in name or "\\" in name or "\0" in name:
            raise ModelInvalid(f"{INDEX}: a file is not a plain name ending in .safetensors")
    return sorted(names)


def _entries(maps: Mapping[str, _Mapped], folder: Path) -> dict[str, Entry]:
    """Every tensor of every file, all headers checked; with an index, it must agree."""
    entries: dict[str, Entry] = {}
    for mapped in maps.values():
        for name, entry in _check_header(mapped):
            if name in entries:
                raise ModelInvalid(f"{mapped.name}: {name} is in {entries[name].file} too")
            entries[name] = entry
    if (folder / INDEX).exists():
        listed = read_json(folder / INDEX, MAX_INDEX_BYTES)["weight_map"]
        for name, file in listed.items():
            if name not in entries or entries[name].file != file:
                raise ModelInvalid(f"{INDEX}: {name[:200]} is not in {file}")
    return entries


def _check_header(mapped: _Mapped) -> Iterator[tuple[str, Entry]]:
    """The entries of one header. They must cover the data exactly: no overlap, no gap, no more, no less."""
    entries = [(name, _entry(mapped.name, name, raw)) for name, raw in mapped.header.items()]
    entries.sort(key=lambda pair: pair[1].start)
    reached = 0
    for name, entry in entries:
        if entry.start != reached:
            raise ModelInvalid(f"{mapped.name}: {name[:200]} overlaps its neighbour or leaves a gap")
        reached = entry.end
    if reached != mapped.data_bytes:
        raise ModelInvalid(f"{mapped.name}: has {mapped.data_bytes} bytes of data, its header says {reached}")
    yield from entries


def _entry(file: str, name: str, raw: object) -> Entry:
    if not isinstance(raw, dict):
        raise ModelInvalid(f"{file}: {name[:200]} is not described by an object")
    dtype = raw.get("dtype")
    shape: Any = raw.get("shape")
    offsets: Any = raw.get("data_offsets")
    if dtype not in ITEMSIZE:
        raise ModelInvalid(f"{file}: {name[:200]} has dtype {str(dtype)[:20]}, accepted: {', '.join(ITEMSIZE)}")
    if not _sizes(shape, 0, 8) or not _sizes(offsets, 2, 2):
        raise ModelInvalid(f"{file}: {name[:200]} has a malformed shape or data_offsets")
    size = ITEMSIZE[dtype]
    for length in shape:
        size *= length
    if offsets[1] - offsets[0] != size:
        raise ModelInvalid(f"{file}: {name[:200]} has {offsets[1] - offsets[0]} bytes, its shape needs {size}")
    return Entry(file, dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any, fewest: int, most: int) -> bool:
    """Whether `value` is a list of so many sizes."""
    if not isinstance(value, list) or not fewest <= len(value) <= most:
        return False
    return all(type(number) is int and 0 <= number < 1 << 48 for number in value)


def _match(
    entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str], ignored_prefix: str
) -> None:
    """Exactly the expected tensors, in the expected shapes."""
    for name, shape in expected.items():
        if name not in entries:
            raise ModelInvalid(f"{name} is missing from the weight files")
        if entries[name].shape != shape:
            entry = entries[name]
            raise ModelInvalid(f"{entry.file}: {name} has shape {list(entry.shape)}, config.json says {list(shape)}")
    for name, entry in entries.items():
        beside = name in ignored or bool(ignored_prefix and name.startswith(ignored_prefix))
        if name not in expected and not beside:
            raise ModelInvalid(f"{entry.file}: {name[:200]} is not part of this model")
