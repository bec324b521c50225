"""What is being forgotten, and who is still writing: a record of a forgotten scope must not come in behind its back.

Promises: from `begin` on nothing of the scope is let in (`refuses`); `wait` returns true only when no write that
began before it is under way; `end` lets new writes in again. Every wait has a limit. Safe from several threads.
"""

import threading
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from isthmus.contracts.blocks import NO_SESSION, Erasure, Owner
from isthmus.contracts.clock import Clock

KEPT_ERASURES = 1024


@dataclass(frozen=True, slots=True)
class Scope:
    """A session of a namespace; the whole namespace when `session_id` is `NO_SESSION`."""

    namespace_id: bytes
    session_id: bytes = NO_SESSION

    def covers(self, owner: Owner) -> bool:
        """Whether what `owner` has belongs to it."""
        mine = self.session_id in (NO_SESSION, owner.session_id)
        return mine and owner.namespace_id == self.namespace_id


class Scopes:
    """Scopes being forgotten, writes under way, and the newest erasures."""

    def __init__(self, clock: Clock, known: Iterable[Erasure] = ()) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._forgetting: list[Scope] = []
        self._writing: dict[int, frozenset[Owner]] = {}
        self._serial = 0
        self._erasures: deque[Erasure] = deque(known, maxlen=KEPT_ERASURES)
        self._number = self._erasures[-1].number if self._erasures else 0

    @property
    def number(self) -> int:
        """The number of the newest erasure; 0 before the first."""
        return self._number

    def erasures(self) -> tuple[Erasure, ...]:
        """The newest ones, oldest first."""
        with self._changed:
            return tuple(self._erasures)

    def refuses(self, owner: Owner) -> bool:
        """Whether what `owner` has is being forgotten at this moment."""
        return bool(self._forgetting) and any(scope.covers(owner) for scope in tuple(self._forgetting))

    def start_write(self, owners: Collection[Owner]) -> int:
        """A write begins; the number to end it with."""
        with self._changed:
            self._serial += 1
            self._writing[self._serial] = frozenset(owners)
            return self._serial

    def end_write(self, number: int) -> None:
        """The write is over: whatever it brought in is visible, or refused."""
        with self._changed:
            del self._writing[number]
            self._changed.notify_all()

    def begin(self, scope: Scope) -> frozenset[int]:
        """From now on nothing of the scope is let in. The writes under way that may have brought in some of it."""
        with self._changed:
            self._forgetting.append(scope)
            return frozenset(number for number, owners in self._writing.items() if any(map(scope.covers, owners)))

    def wait(self, writes: frozenset[int], timeout_s: float) -> bool:
        """Wait for these writes; whether all have ended."""
        with self._changed:
            return self._changed.wait_for(lambda: not writes & self._writing.keys(), timeout_s)

    def end(self, scope: Scope, number: int | None) -> Erasure | None:
        """It is forgotten, as erasure `number` (0: the next one); None: it could not be. New writes are let in."""
        with self._changed:
            self._forgetting.remove(scope)
            if number is None:
                return None
            self._number = number or self._number + 1
            session = b"" if scope.session_id == NO_SESSION else scope.session_id
            erasure = Erasure(self._number, scope.namespace_id, session)
            self._erasures.append(erasure)
            return erasure
