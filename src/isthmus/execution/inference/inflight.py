"""In-flight prefixes: a block that is being computed is awaited, never computed twice.

The first request to compute a block registers its key; others that need the same block wait, holding no memory, until
the owner has computed it or has let it go (abort, preemption, end). Waiters hold nothing and owners never wait, so
there is no cycle and no deadlock.
"""

from collections.abc import Sequence

from isthmus.contracts.ids import RequestId
from isthmus.contracts.keys import BlockKey


class InflightPrefixes:
    """Who computes which block, and who waits for it."""

    def __init__(self) -> None:
        self._owner: dict[BlockKey, RequestId] = {}
        self._owned: dict[RequestId, dict[BlockKey, None]] = {}  # ordered, so that a seed replays a run
        self._waiters: dict[BlockKey, list[RequestId]] = {}
        self._waits_for: dict[RequestId, BlockKey] = {}

    def __len__(self) -> int:
        return len(self._owner)

    def last_pending(self, keys: Sequence[BlockKey], start: int) -> BlockKey | None:
        """The last key of the unbroken run of pending keys from `start` on, all of one owner; None when `keys[start]`
        is not pending.
        """
        found: BlockKey | None = None
        owner: RequestId | None = None
        for key in keys[start:]:
            held_by = self._owner.get(key)
            if held_by is None or (owner is not None and held_by != owner):
                break
            found, owner = key, held_by
        return found

    def deepest_pending(self, keys: Sequence[BlockKey], start: int) -> tuple[int, RequestId] | None:
        """The index of the last pending key from `start` on, and its owner. Unlike in `last_pending` what lies between
        may be computed already: an owner holds the whole prefix of what it computes.
        """
        if self._owner:
            for index in range(len(keys) - 1, start - 1, -1):
                owner = self._owner.get(keys[index])
                if owner is not None:
                    return index, owner
        return None

    def register(self, owner: RequestId, keys: Sequence[BlockKey]) -> None:
        """`owner` will compute these blocks. Keys that another request computes already are left to it."""
        for key in keys:
            if key not in self._owner:
                self._owner[key] = owner
                self._owned.setdefault(owner, {})[key] = None

    def wait(self, waiter: RequestId, key: BlockKey) -> None:
        """`waiter` waits for the pending `key`."""
        self._waiters.setdefault(key, []).append(waiter)
        self._waits_for[waiter] = key

    def cancel_wait(self, waiter: RequestId) -> None:
        """`waiter` no longer waits."""
        key = self._waits_for.pop(waiter, None)
        if key is not None:
            self._waiters[key].remove(waiter)
            if not self._waiters[key]:
                del self._waiters[key]

    def computed(self, owner: RequestId, key: BlockKey) -> list[RequestId]:
        """`owner` has computed `key`. Returns who waited for it."""
        if self._owner.get(key) != owner:
            return []
        del self._owned[owner][key]
        if not self._owned[owner]:
            del self._owned[owner]
        return self._resolve(key)

    def release(self, owner: RequestId) -> list[RequestId]:
        """`owner` will not compute what it still had pending. Returns everybody who waited for any of it."""
        woken: list[RequestId] = []
        for key in self._owned.pop(owner, {}):
            woken += self._resolve(key)
        return woken

    def _resolve(self, key: BlockKey) -> list[RequestId]:
        del self._owner[key]
        waiters = self._waiters.pop(key, [])
        for waiter in waiters:
            del self._waits_for[waiter]
        return waiters
