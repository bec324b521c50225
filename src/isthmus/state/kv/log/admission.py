"""Which records are worth the wear of the disk. Pure: time is an argument.

A disk may be written a certain number of bytes in its life, so a day has a budget. It flows into a bucket that holds an
hour of it; every byte written is taken out. A record is let in when the bucket has its bytes and its expected reuse is
at least the part of the bucket that is empty: with budget left over everything is written, and as it grows scarce only
what will most likely be read again.

Expected reuse: for each lifetime the part of the bytes that were read at all before they were evicted (a moving
average, begun from a guess), raised by every hit that the record has had already.
"""

from isthmus.contracts.blocks import Lifetime

_DAY_S = 86_400.0
_BUCKET_S = 3600.0
_GUESS = {Lifetime.SHORT: 0.1, Lifetime.SESSION: 0.5, Lifetime.SHARED: 0.9}
_MEMORY = 0.1
_LEFT_BY_A_HIT = 0.5


class Admission:
    """The rule. `bytes_a_day` 0: no limit. `least_bytes`: the bucket holds at least so much (a segment)."""

    def __init__(self, bytes_a_day: int, least_bytes: int, now: float) -> None:
        self._rate = bytes_a_day / _DAY_S
        self._room = max(self._rate * _BUCKET_S, float(least_bytes))
        self._level = self._room
        self._then = now
        self._reuse = dict(_GUESS)

    def level(self, now: float) -> float:
        """Bytes in the bucket; negative after more was written than it had."""
        self._level = min(self._room, self._level + max(0.0, now - self._then) * self._rate)
        self._then = max(self._then, now)
        return self._level

    def expected_reuse(self, lifetime: Lifetime, hits: int) -> float:
        """0 to 1: how likely a record is read again."""
        return 1.0 - (1.0 - self._reuse[lifetime]) * _LEFT_BY_A_HIT ** min(hits, 64)

    def admits(self, size: int, lifetime: Lifetime, hits: int, now: float) -> bool:
        """Whether a record of `size` bytes, read `hits` times so far, is to be written."""
        if self._rate <= 0:
            return True
        level = self.level(now)
        return level >= size and self.expected_reuse(lifetime, hits) >= 1.0 - level / self._room

    def spend(self, size: int, now: float) -> None:
        """`size` bytes were written, for whatever reason."""
        if self._rate > 0:
            self._level = self.level(now) - size

    def observe(self, lifetime: Lifetime, hit_part: float) -> None:
        """A segment of this lifetime was evicted; of its bytes `hit_part` (0 to 1) had been read."""
        self._reuse[lifetime] += _MEMORY * (min(1.0, max(0.0, hit_part)) - self._reuse[lifetime])
