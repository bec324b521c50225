"""The device's memory as paging sees it: the forms of its records, and the bytes where they lie."""

import mmap
from dataclasses import dataclass
from typing import Protocol

import msgspec

from isthmus.contracts.blocks import RecordKind, Shape
from isthmus.contracts.errors import InvalidInput, WireViolation
from isthmus.contracts.events import ModelInfo
from isthmus.execution.inference.batch import Runner


class Shapes(msgspec.Struct, frozen=True):
    """The form of a block and of a state snapshot; no state in a model without."""

    block: Shape
    state: Shape | None

    def of(self, kind: RecordKind) -> Shape:
        """The form of records of `kind`. Raises `InvalidInput` for a state where there are none."""
        if kind is RecordKind.BLOCK:
            return self.block
        if self.state is None:
            raise InvalidInput("this model has no recurrent state", "kind")
        return self.state


def shapes(info: ModelInfo) -> Shapes:
    """The forms of the records of an engine that serves this."""
    block = Shape(RecordKind.BLOCK, info.layers, info.block_bytes // info.layers)
    if info.states is None:
        return Shapes(block, None)
    layers = info.states.layers
    return Shapes(block, Shape(RecordKind.STATE, layers, info.states.state_bytes // layers))


class DeviceMemory(Protocol):
    """The part of a `Runner` that paging needs."""

    def view(self, kind: RecordKind, place: int) -> memoryview | None:
        """The record's own bytes, writable; None where the processor cannot address them."""
        ...

    def read(self, kind: RecordKind, place: int) -> bytes:
        """A copy of a record."""
        ...

    def write(self, kind: RecordKind, place: int, record: bytes) -> None:
        """Set a record."""
        ...


class RunnerMemory:
    """`DeviceMemory` of a runner in this process."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def view(self, kind: RecordKind, place: int) -> memoryview | None:
        """See `DeviceMemory`."""
        return self._runner.view(kind, place)

    def read(self, kind: RecordKind, place: int) -> bytes:
        """See `DeviceMemory`. Between steps."""
        return self._runner.read_block(place) if kind is RecordKind.BLOCK else self._runner.read_state(place)

    def write(self, kind: RecordKind, place: int, record: bytes) -> None:
        """See `DeviceMemory`. Between steps."""
        if kind is RecordKind.BLOCK:
            self._runner.write_block(place, record)
        else:
            self._runner.write_state(place, record)


@dataclass(frozen=True, slots=True)
class MappedMemory:
    """`DeviceMemory` of a runner in another process, whose pools of records (one after the other) are mapped here."""

    shapes: Shapes
    pools: dict[RecordKind, memoryview]

    def view(self, kind: RecordKind, place: int) -> memoryview:
        """See `DeviceMemory`. Raises `InvalidInput` when there is no such place."""
        size, pool = self.shapes.of(kind).record_bytes, self.pools[kind]
        if not 0 <= place < pool.nbytes // size:
            raise InvalidInput(f"place {place} does not exist", "place")
        return pool[place * size : (place + 1) * size]

    def read(self, kind: RecordKind, place: int) -> bytes:
        """See `DeviceMemory`."""
        return bytes(self.view(kind, place))

    def write(self, kind: RecordKind, place: int, record: bytes) -> None:
        """See `DeviceMemory`."""
        self.view(kind, place)[:] = record


def mapped(descriptor: int, size: int) -> memoryview:
    """Shared memory of another process, writable. Raises `WireViolation` when there are not `size` bytes of it."""
    try:
        return memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
    except (OSError, ValueError) as error:
        raise WireViolation(f"the engine's memory of {size} bytes cannot be mapped: {error}") from error
