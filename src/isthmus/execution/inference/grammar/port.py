"""What the scheduler needs of structured output."""

from typing import Protocol

from isthmus.contracts.ids import RequestId
from isthmus.contracts.requests import EngineRequest


class MaskSource(Protocol):
    """Masks of constrained requests. None of it waits. `guesses` are drafts that somebody else proposes."""

    def open(self, request: EngineRequest, guesses: list[int]) -> None:
        """Take a constrained request."""
        ...

    def ready(self, request_id: RequestId) -> bool:
        """Whether the next position of the request may be sampled."""
        ...

    def part(self, request_id: RequestId, most: int) -> tuple[list[int], list[bytes]]:
        """At most `most` drafts, and the masks of the positions before, between and after them. Only when ready."""
        ...

    def advance(self, request_id: RequestId, token_ids: list[int], guesses: list[int]) -> None:
        """Tokens were chosen for a request that goes on."""
        ...

    def close(self, request_id: RequestId) -> None:
        """A request ended; unknown ids are ignored."""
        ...
