"""The bounded waiting queue: priority with linear ageing.

A request's urgency at time t is priority - (t - arrival) / ageing_s, lowest first. The order of two requests never
changes with t, so the queue is sorted once by arrival + priority * ageing_s, and nobody starves: a request is
overtaken only by requests that arrive within (difference of priorities) * ageing_s seconds after it.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from isthmus.execution.inference.sequence import Sequence


class WaitingQueue:
    """Sequences in the order in which they should start."""

    def __init__(self, ageing_s: float) -> None:
        self._ageing_s = ageing_s
        self._entries: list[tuple[float, int, Sequence]] = []
        self._scores: dict[str, tuple[float, int]] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return iter([entry[2] for entry in self._entries])

    def score(self, sequence: Sequence) -> tuple[float, int]:
        """The place of `sequence` in the order; fixed at its arrival and kept over preemptions."""
        score = self._scores.get(sequence.id)
        if score is None:
            self._serial += 1
            score = (sequence.arrived + sequence.request.priority * self._ageing_s, self._serial)
            self._scores[sequence.id] = score
        return score

    def push(self, sequence: Sequence) -> None:
        """Queue `sequence` at its place."""
        insort(self._entries, (*self.score(sequence), sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out of the queue."""
        index = bisect_left(self._entries, self.score(sequence), key=lambda entry: entry[:2])
        if index >= len(self._entries) or self._entries[index][2] is not sequence:
            raise ValueError(f"{sequence.id} is not queued")
        del self._entries[index]

    def forget(self, sequence: Sequence) -> None:
        """Drop the place of an ended sequence."""
        self._scores.pop(sequence.id, None)
