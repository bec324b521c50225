"""The engine's books: what is held and what the pools count must agree, after every step."""

from collections.abc import Sequence as View

from isthmus.execution.inference.paging.policy import Paging
from isthmus.execution.inference.pool import BlockPool, PoolCorrupt
from isthmus.execution.inference.recurrent import RecurrentStates
from isthmus.execution.inference.sequence import Sequence
from isthmus.execution.inference.tree import PrefixTree


def check_books(
    pool: BlockPool, tree: PrefixTree, running: View[Sequence], paging: Paging | None, states: RecurrentStates | None
) -> None:
    """Raise `PoolCorrupt` unless pool, tree and states agree with what runs and what is paged."""
    pool.check()
    tree.check()
    leases, slots = (0, []) if paging is None else paging.held()
    held = leases + sum(len(one.lease.blocks) for one in running if one.lease is not None)
    refs = sum(pool.refs(block) for block in range(pool.total))
    if held != refs:
        raise PoolCorrupt(f"running sequences and loads hold {held} leases, the pool counts {refs}")
    if states is not None:
        states.check(tree, running, slots)
