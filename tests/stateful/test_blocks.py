"""Hypothesis state machines for the block pool and the prefix tree, over a 2-token vocabulary.

Promises: free + cached + leased == total after every call; a present block implies its prefix; a match is the longest
present prefix and names exactly the blocks that were inserted; a leased block is never evicted or handed out.
Release figure (`make chaos`): 1,000 examples of 50 steps; `make test` runs fewer.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from tests.support.scale import examples

from isthmus.contracts.ids import Namespace
from isthmus.contracts.keys import BlockKey, PrefixScope, block_key, prefix_chain
from isthmus.execution.inference.lease import Lease
from isthmus.execution.inference.pool import BlockPool
from isthmus.execution.inference.tree import PrefixTree

SCOPE = PrefixScope(Namespace(b"n" * 32), "m")
BLOCK = 2
TOTAL = 8
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)


def keys_of(tokens: list[int]) -> list[BlockKey]:
    return [block_key(SCOPE, key, b"f" * 32) for key in prefix_chain(SCOPE, tokens, BLOCK)]


class BlocksMachine(RuleBasedStateMachine):
    """Sequences come, reuse, grow, shrink and go; a dictionary says what must be true."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.tree = PrefixTree(self.pool)
        self.model: dict[BlockKey, int] = {}
        self.live: dict[int, tuple[Lease, list[BlockKey], int]] = {}
        self.serial = 0

    @rule(target=leases, tokens=TOKENS, blind=st.booleans())
    def start(self, tokens: list[int], blind: bool) -> int:
        """`blind`: compute everything although some of it may be present, as two sequences at the same time do."""
        keys = keys_of(tokens)
        matched = self.tree.match(keys)
        self.forget_evicted()
        expected: list[int] = []
        for key in keys:
            if key not in self.model:
                break
            expected.append(self.model[key])
        assert matched == expected
        matched = [] if blind else matched
        lease = Lease(self.pool, self.tree, matched)
        if not lease.grow(len(keys) - len(matched)):
            lease.close()
            keys = []
        self.forget_evicted()
        for index in range(len(matched), len(keys)):
            parent = keys[index - 1] if index else None
            block = self.tree.insert(keys[index], parent, lease.blocks[index])
            assert block == self.model.setdefault(keys[index], block)
            lease.share(index, block)
        self.serial += 1
        self.live[self.serial] = (lease, keys, len(keys))
        return self.serial

    @rule(serial=leases, count=st.integers(1, 3))
    def grow(self, serial: int, count: int) -> None:
        lease = self.live[serial][0]
        room = self.pool.free + self.pool.cached
        before = len(lease.blocks)
        assert lease.grow(count) == (count <= room)
        assert len(lease.blocks) in {before, before + count}

    @rule(serial=leases, length=st.integers(0, 6))
    def shrink(self, serial: int, length: int) -> None:
        lease, keys, kept = self.live[serial]
        lease.truncate(length)
        self.live[serial] = (lease, keys, min(kept, length))

    @rule(serial=consumes(leases))
    def close(self, serial: int) -> None:
        lease = self.live.pop(serial)[0]
        lease.close()
        lease.close()

    @rule(count=st.integers(1, TOTAL))
    def evict(self, count: int) -> None:
        cached = self.pool.cached
        assert self.tree.evict(count) == min(count, cached)
        self.forget_evicted()

    def forget_evicted(self) -> None:
        """Drop from the model what the tree evicted, and check that nothing leased was."""
        for key in [key for key in self.model if not self.tree.holds(key)]:
            del self.model[key]
        for _, keys, length in self.live.values():
            assert all(key in self.model for key in keys[:length]), "what is leased is not evicted"

    @invariant()
    def conserved(self) -> None:
        self.pool.check()
        self.tree.check()
        assert self.pool.free + self.pool.cached + self.pool.leased == TOTAL
        refs: dict[int, int] = {}
        for lease, _, _ in self.live.values():
            for block in lease.blocks:
                refs[block] = refs.get(block, 0) + 1
        assert all(self.pool.refs(block) == refs.get(block, 0) for block in range(TOTAL))


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(
    max_examples=examples(150, 1000), stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
