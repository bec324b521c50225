"""Whose the blocks on the device are, so that a forgotten scope leaves it. Pure.

A block that several owners computed belongs to the first. What was computed on top of a forgotten block goes with it:
a present block implies its prefix.
"""

from isthmus.contracts.blocks import NO_SESSION, Owner
from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.paging.jobs import Erased
from isthmus.execution.inference.tree import PrefixTree


class Owners:
    """The owners of the tree's blocks."""

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._owner: dict[BlockKey, Owner] = {}
        self._pending: set[BlockKey] = set()

    def own(self, key: BlockKey, owner: Owner) -> None:
        """The block with this key is `owner`'s, unless it is somebody's already. Entries of blocks that have left are
        dropped when they pile up.
        """
        if len(self._owner) > 2 * len(self._tree) + 1024:
            self._owner = {key: owner for key, owner in self._owner.items() if self._tree.holds(key)}
        self._owner.setdefault(key, owner)

    def erase(self, event: Erased) -> None:
        """These scopes were forgotten: drop what of them is not in use, note the rest."""
        scopes = {(one.namespace_id, one.session_id or NO_SESSION) for one in event.erasures}
        for key, owner in self._owner.items():
            whole, part = (owner.namespace_id, NO_SESSION), (owner.namespace_id, owner.session_id)
            if event.everything or whole in scopes or part in scopes:
                self._pending.add(key)
        self.sweep()

    def sweep(self) -> None:
        """Drop what can be dropped now."""
        if self._pending:
            self._pending = self._tree.drop(self._pending)
            self._owner = {key: owner for key, owner in self._owner.items() if self._tree.holds(key)}
