"""What may be sampled next, and what is guessed to come: masks of constrained requests and drafts of all of them."""

from isthmus.contracts.events import ModelInfo
from isthmus.contracts.requests import Work
from isthmus.execution.inference.grammar.port import MaskSource
from isthmus.execution.inference.sequence import Sequence
from isthmus.execution.inference.settings import SchedulerSettings


class Drafting:
    """The drafts of a scheduler, and the masks if there is a source of them."""

    def __init__(self, info: ModelInfo, settings: SchedulerSettings, masks: MaskSource | None) -> None:
        self._info, self._settings, self._masks = info, settings, masks

    def open(self, sequence: Sequence) -> None:
        """`sequence` was queued."""
        if self._masks is not None and sequence.request.constraint is not None:
            self._masks.open(sequence.request, sequence.drafts(self._settings.draft_tokens))

    def ready(self, sequence: Sequence) -> bool:
        """Whether `sequence` may sample: it is not constrained, or has its masks."""
        return self._masks is None or sequence.request.constraint is None or self._masks.ready(sequence.id)

    def drafts(self, sequence: Sequence, budget: int) -> list[int]:
        """Guesses, never past the end of the request or of the model's context."""
        if self._settings.draft_tokens == 0 or sequence.request.work is not Work.GENERATE or sequence.remaining != 1:
            return []
        left = sequence.request.sampling.max_tokens - len(sequence.history.output) - 1
        room = self._info.max_model_len - sequence.length - 1
        most = min(self._settings.draft_tokens, budget, left, room)
        if self._masks is not None and sequence.request.constraint is not None:
            return self._masks.part(sequence.id, most)[0]
        return sequence.drafts(most)

    def masks(self, sequence: Sequence, drafts: int) -> list[bytes] | None:
        """The masks of the next position and of those after `drafts` drafts; None when nothing is constrained."""
        if self._masks is None or sequence.request.constraint is None:
            return None
        return self._masks.part(sequence.id, drafts)[1]

    def advance(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Tokens were chosen for `sequence`, which goes on."""
        if self._masks is not None and sequence.request.constraint is not None:
            self._masks.advance(sequence.id, token_ids, sequence.drafts(self._settings.draft_tokens))

    def close(self, sequence: Sequence) -> None:
        """`sequence` ended."""
        if self._masks is not None:
            self._masks.close(sequence.id)
