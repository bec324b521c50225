"""What is known about the future of sessions: hints of requests that ended, and hints between their turns. Pure."""

from isthmus.contracts.blocks import Hint, Owner, namespace_id, session_id
from isthmus.contracts.events import SessionHint
from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.paging.jobs import Pager
from isthmus.execution.inference.sequence import Sequence

MAX_SESSIONS = 4096
"""Sessions whose last keys are remembered; the one that was quiet for longest goes first."""


class Sessions:
    """The keys that the last request of each session left."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self._keys: dict[Owner, list[BlockKey]] = {}

    def ended(self, sequence: Sequence, keys: list[BlockKey]) -> None:
        """`sequence` ended and left the records with these keys: pass on what its request said of them."""
        request = sequence.request
        if request.hint is not None:
            self._pager.notice(Hint(request.hint, keys, request.hint_s))
        if request.session:
            self._keys.pop(sequence.owner, None)
            self._keys[sequence.owner] = keys
            if len(self._keys) > MAX_SESSIONS:
                del self._keys[next(iter(self._keys))]

    def hint(self, hint: SessionHint) -> bool:
        """Pass on a hint about what a session's last request left; False when that is not known."""
        keys = self._keys.get(Owner(namespace_id(hint.namespace), session_id(hint.namespace, hint.session)))
        if keys is not None:
            self._pager.notice(Hint(hint.kind, keys, hint.seconds))
        return keys is not None
