"""What was forgotten: scopes with the epoch from which on their older records are dead. Pure.

Promises: a record is dead exactly when its namespace, its session or its key was forgotten after the record was taken
in (stamp < epoch); nothing but a later `forget` moves an epoch; an entry leaves the table only when it is `done`, which
its owner says once no byte of a dead record is on the disk any more.

A table is a value: `forget` and `finish` make new ones. A done entry stays for as long as there is room, so that
engines that were away can be told what they have to drop.
"""

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isthmus.contracts.blocks import ID_BYTES, NO_SESSION, Owner
from isthmus.contracts.errors import InvalidInput, Overloaded
from isthmus.contracts.keys import KEY_BYTES
from isthmus.state.kv.log.format import Rows, crc

_MAGIC = b"ISTHERAS"
_HEADER = struct.Struct("<8sIIQQQ20xI")
_ENTRY = struct.Struct("<BB6x32sQQ")
HEADER_BYTES = 64
ENTRY_BYTES = _ENTRY.size
_VERSION = 1
_CRC_AT = HEADER_BYTES - 4
_RETRY_S = 5.0


class ScopeKind(enum.IntEnum):
    """What a scope names."""

    NAMESPACE = 1
    SESSION = 2
    KEY = 3


@dataclass(frozen=True, slots=True)
class Scope:
    """What is to be forgotten. `id`, 32 bytes: a namespace's id and zeros, or namespace's and session's, or a key."""

    kind: ScopeKind
    id: bytes

    def __post_init__(self) -> None:
        if len(self.id) != KEY_BYTES:
            raise InvalidInput(f"a scope's id has {KEY_BYTES} bytes", "scope")

    @staticmethod
    def of(namespace_id: bytes, session_id: bytes = NO_SESSION) -> "Scope":
        """A namespace, or one session of it."""
        owner = Owner(namespace_id, session_id)
        kind = ScopeKind.NAMESPACE if session_id == NO_SESSION else ScopeKind.SESSION
        return Scope(kind, owner.namespace_id + owner.session_id)

    @staticmethod
    def of_key(key: bytes) -> "Scope":
        """One record."""
        return Scope(ScopeKind.KEY, key)

    @property
    def namespace_id(self) -> bytes:
        """Whose it is; empty for a key."""
        return b"" if self.kind is ScopeKind.KEY else self.id[:ID_BYTES]

    @property
    def session_id(self) -> bytes:
        """The session; `NO_SESSION` when all of a namespace, or a key, is meant."""
        return self.id[ID_BYTES:] if self.kind is ScopeKind.SESSION else NO_SESSION


@dataclass(frozen=True, slots=True)
class Forgotten:
    """One entry. Records with a stamp below `epoch` are dead. `number` counts erasures from 1 without gaps."""

    scope: Scope
    epoch: int
    number: int
    done: bool = False


class ErasureTable:
    """A table at one moment. `epoch` is what records are stamped with."""

    __slots__ = ("_epochs", "entries", "epoch", "number")

    def __init__(self, epoch: int = 0, number: int = 0, entries: Iterable[Forgotten] = ()) -> None:
        self.epoch = epoch
        self.number = number
        self.entries = tuple(entries)
        self._epochs: dict[ScopeKind, dict[bytes, int]] = {kind: {} for kind in ScopeKind}
        for entry in self.entries:
            ids = self._epochs[entry.scope.kind]
            ids[entry.scope.id] = max(ids.get(entry.scope.id, 0), entry.epoch)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ErasureTable):
            return NotImplemented
        return (self.epoch, self.number, self.entries) == (other.epoch, other.number, other.entries)

    def __hash__(self) -> int:
        return hash((self.epoch, self.number, self.entries))

    @property
    def pending(self) -> tuple[Forgotten, ...]:
        """Entries that are not done, oldest first."""
        return tuple(entry for entry in self.entries if not entry.done)

    def forget(self, scope: Scope, capacity_bytes: int) -> "ErasureTable":
        """The table after `scope` was forgotten; it fits into `capacity_bytes`.

        Raises `Overloaded` when there is no room because too many erasures are still being carried out.
        """
        kept = [entry for entry in self.entries if entry.scope != scope]
        room = (capacity_bytes - HEADER_BYTES) // ENTRY_BYTES
        for entry in [entry for entry in kept if entry.done]:
            if len(kept) < room:
                break
            kept.remove(entry)
        if len(kept) >= room:
            raise Overloaded(f"{len(kept)} erasures are being carried out already", _RETRY_S)
        epoch, number = self.epoch + 1, self.number + 1
        return ErasureTable(epoch, number, [*kept, Forgotten(scope, epoch, number)])

    def finish(self, epoch: int) -> "ErasureTable":
        """The table after every erasure up to `epoch` was carried out."""
        entries = [replace(entry, done=True) if entry.epoch <= epoch else entry for entry in self.entries]
        return ErasureTable(self.epoch, self.number, entries)

    def at_least(self, epoch: int) -> "ErasureTable":
        """The same, with an epoch of at least `epoch`: no stamp may be over it."""
        return self if epoch <= self.epoch else ErasureTable(epoch, self.number, self.entries)

    def dead(self, key: bytes, owner: Owner, stamp: int) -> bool:
        """Whether a record is dead."""
        epochs = self._epochs
        namespace = owner.namespace_id + NO_SESSION
        return (
            stamp < epochs[ScopeKind.NAMESPACE].get(namespace, 0)
            or stamp < epochs[ScopeKind.SESSION].get(owner.namespace_id + owner.session_id, 0)
            or stamp < epochs[ScopeKind.KEY].get(key, 0)
        )

    def dead_rows(self, rows: Rows) -> NDArray[np.bool_]:
        """`dead` of every entry of a directory."""
        found = np.zeros(len(rows), np.bool_)
        if not len(rows) or not self.entries:
            return found
        stamps = rows["stamp"]
        namespaces, sessions, keys = (self._epochs[kind] for kind in ScopeKind)
        if namespaces:
            ids = np.zeros((len(rows), KEY_BYTES), np.uint8)
            ids[:, :ID_BYTES] = rows["namespace"]
            found |= stamps < _looked_up(ids, namespaces)
        if sessions:
            found |= stamps < _looked_up(np.concatenate((rows["namespace"], rows["session"]), axis=1), sessions)
        if keys:
            found |= stamps < _looked_up(rows["key"], keys)
        return found

    def touches(self, namespaces: Iterable[bytes], lowest_stamp: int) -> bool:
        """Whether something in a segment with records of these namespaces, none stamped lower, may be dead."""
        held = None
        for entry in self.entries:
            if lowest_stamp >= entry.epoch:
                continue
            if entry.scope.kind is ScopeKind.KEY:
                return True
            held = set(namespaces) if held is None else held
            if entry.scope.namespace_id in held:
                return True
        return False

    def encode(self, seq: int, seed: int) -> bytes:
        """The bytes of a copy of the table."""
        body = b"".join(
            _ENTRY.pack(entry.scope.kind, entry.done, entry.scope.id, entry.epoch, entry.number)
            for entry in self.entries
        )
        head = _HEADER.pack(_MAGIC, _VERSION, len(self.entries), seq, self.epoch, self.number, 0)[:_CRC_AT]
        return head + crc(body, crc(head, seed)).to_bytes(4, "little") + body

    @staticmethod
    def decode(data: bytes | memoryview, seed: int) -> "tuple[int, ErasureTable] | None":
        """The seq and the table of a copy; None when it is none."""
        if len(data) < HEADER_BYTES or bytes(data[:8]) != _MAGIC:
            return None
        _, version, count, seq, epoch, number, found = _HEADER.unpack_from(data)
        body = data[HEADER_BYTES : HEADER_BYTES + count * ENTRY_BYTES]
        if version != _VERSION or len(body) != count * ENTRY_BYTES or crc(body, crc(data[:_CRC_AT], seed)) != found:
            return None
        entries = [
            Forgotten(Scope(ScopeKind(kind), scope), at, nth, bool(done))
            for kind, done, scope, at, nth in _ENTRY.iter_unpack(body)
        ]
        return seq, ErasureTable(epoch, number, entries)


def _looked_up(ids: NDArray[np.uint8], epochs: dict[bytes, int]) -> NDArray[np.uint64]:
    """The epoch of each id (0: none). Directories name few scopes, so the distinct ones are looked up."""
    flat = np.ascontiguousarray(ids).view(f"S{KEY_BYTES}").ravel()
    distinct, where = np.unique(flat, return_inverse=True)
    known = [epochs.get(bytes(one).ljust(KEY_BYTES, b"\0"), 0) for one in distinct]
    return np.array(known, np.uint64)[where]
