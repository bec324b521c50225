"""Time and randomness, injected. The only module that may read the wall clock, sleep or draw random bytes.

Durations and deadlines are always on `monotonic()`; `wall()` is for timestamps that people read.
"""

import asyncio
import secrets
import time
from typing import Protocol


class Clock(Protocol):
    """A source of time. Production uses `SystemClock`; tests and the twin use `ManualClock`."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; its zero means nothing."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Suspend the calling task for `seconds`."""
        ...


class Entropy(Protocol):
    """A source of random bytes, so that a seed can replay a run."""

    def token_bytes(self, count: int) -> bytes:
        """`count` unpredictable bytes."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def wall(self) -> float:
        """See `Clock`."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        await asyncio.sleep(seconds)


class SystemEntropy:
    """The operating system's random source."""

    def token_bytes(self, count: int) -> bytes:
        """See `Entropy`."""
        return secrets.token_bytes(count)


class ManualClock:
    """A clock that moves only when told to. Sleepers are not woken: use it for code that takes time as a value."""

    def __init__(self, start: float = 0.0, wall: float = 1_700_000_000.0) -> None:
        self._now = start
        self._wall_offset = wall - start

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (not negative)."""
        if seconds < 0:
            raise ValueError("a monotonic clock does not go back")
        self._now += seconds

    def monotonic(self) -> float:
        """See `Clock`."""
        return self._now

    def wall(self) -> float:
        """See `Clock`."""
        return self._now + self._wall_offset

    async def sleep(self, seconds: float) -> None:
        """Advance by `seconds` and let other tasks run once."""
        self.advance(seconds)
        await asyncio.sleep(0)
