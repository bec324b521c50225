"""Which recurrent states a hybrid model's sequences read and keep: the policy of snapshots.

Between steps a running sequence leases one slot, its *source*: the state after its computed tokens. A step writes the
state after its tokens to a slot of its own. Where that state lies on a block boundary worth keeping, the slot becomes a
snapshot (snapshots.py) while it stays the source, and the next step writes elsewhere: nothing is ever copied.

The policy `turns` keeps
- the last boundary of a sequence that decodes, replaced as it moves on, so that a turn's end leaves its deepest one;
- the last boundary inside the prompt: it serves retries, `n` > 1 and preemption, and is given up at the end of the turn
  unless another request started from it;
- shared branch points: where a request's matched blocks end beyond its deepest snapshot, and where others wait for a
  prefix that is in flight.
`every-block` keeps every boundary, `last-only` one snapshot a request, the deepest: both are there to be compared with.

Only the slot for the end of a step is a must. A sequence that cannot have one takes its own snapshot for it; if that is
shared, the scheduler preempts. So the first in the order always fits, even with a single slot. What else is to be kept
is kept while slots that are not leased last.
"""

import enum
from collections.abc import Sequence as View
from dataclasses import dataclass, field, replace

from isthmus.contracts.events import StateInfo
from isthmus.contracts.keys import BlockKey
from isthmus.execution.inference.batch import SequenceSlice, StateCapture, StateWork
from isthmus.execution.inference.pool import BlockPool, PoolCorrupt
from isthmus.execution.inference.sequence import Sequence
from isthmus.execution.inference.snapshots import Snapshot, SnapshotIndex
from isthmus.execution.inference.tree import PrefixTree


class Keep(enum.Enum):
    """Why a state is kept after the step that made it."""

    LIVE = "live"
    """It is not, but as the source of the next step."""
    ROLLING = "rolling"
    PROMPT = "prompt"
    SHARED = "shared"


@dataclass(slots=True)
class _Capture:
    end: int
    slot: int
    keep: Keep


@dataclass(slots=True)
class _Held:
    """What one request holds. Slots only while it runs; its claims on snapshots stay over preemption."""

    source: int | None = None
    spare: list[int] = field(default_factory=list)
    captures: list[_Capture] = field(default_factory=list)
    wanted: dict[int, Keep] = field(default_factory=dict)
    claims: dict[Keep, Snapshot] = field(default_factory=dict)

    def slots(self) -> list[int]:
        """Every slot held, each once for each lease."""
        taken = {capture.slot for capture in self.captures}
        own = [] if self.source is None or self.source in taken else [self.source]
        return [*own, *self.spare, *taken]


class RecurrentStates:
    """The slots of one engine and who holds them."""

    def __init__(self, info: StateInfo, block_tokens: int, policy: str) -> None:
        self._block_tokens = block_tokens
        self._grid = info.grid_tokens
        self._policy = policy
        self.pool = BlockPool(info.slots)
        self.index = SnapshotIndex(self.pool)
        self._held: dict[str, _Held] = {}
        self.taken = 0
        self.hits = 0

    # ---- what the scheduler asks

    def chunk(self, sequence: Sequence, budget: int) -> int:
        """How many known tokens to compute with about `budget` tokens left: to the end, or to the last multiple of the
        grid within the budget. A budget that does not reach the next multiple is exceeded, by less than a cell: chunks
        are only ever cut on the grid. The caller stops at a budget of 0, so this happens once a step at most.
        """
        end = sequence.computed + budget
        if end >= sequence.length:
            return sequence.remaining
        cut = end - end % self._grid
        if cut <= sequence.computed:
            cut = sequence.computed - sequence.computed % self._grid + self._grid
        return min(cut, sequence.length) - sequence.computed

    def deepest(self, keys: View[BlockKey], matched: int) -> int:
        """Blocks of the deepest snapshot within the first `matched` blocks of `keys`."""
        found = self.index.deepest(keys, matched)
        return 0 if found is None else found.blocks

    @property
    def waits_help(self) -> bool:
        """Whether an owner captures for those who wait for it: else waiting for blocks would gain nothing."""
        return self._policy != "last-only"

    def room(self, running: View[Sequence]) -> bool:
        """Whether one more sequence can have a slot for its live state, beyond what `running` needs next."""
        needy = 0
        for sequence in running:
            held = self._held[sequence.id]
            if not held.captures and not held.spare:
                needy += held.source is None or self.pool.refs(held.source) > 1
        return self.pool.free + self.pool.cached > needy

    # ---- the life of a sequence

    def start(self, sequence: Sequence, matched: int) -> None:
        """`sequence` begins to run at `sequence.computed`, a snapshot's boundary or 0; `matched` of its blocks were
        present.
        """
        held = self._held.setdefault(sequence.id, _Held())
        size = self._block_tokens
        blocks = sequence.computed // size
        if blocks:
            snapshot = self.index.get(sequence.chain[blocks - 1])
            if snapshot is None or snapshot.slot is None:
                raise PoolCorrupt("a sequence starts from a snapshot that is gone")
            self.pool.retain(snapshot.slot)
            held.source = snapshot.slot
            if snapshot not in held.claims.values():
                self.index.hit(snapshot)
                self.hits += 1
        held.wanted = {}
        if self._policy == "turns":
            held.wanted[(sequence.length - 1) // size * size] = Keep.PROMPT
            if matched > blocks:
                held.wanted[matched * size] = Keep.SHARED
        elif self._policy == "last-only":
            held.wanted[(sequence.length - 1) // size * size] = Keep.ROLLING

    def want(self, owner: Sequence, blocks: int) -> None:
        """Others wait until `owner` has computed `blocks` blocks: capture there."""
        if owner.id in self._held:
            self._held[owner.id].wanted[blocks * self._block_tokens] = Keep.SHARED

    def reserve(self, sequence: Sequence, drafts: int) -> bool:
        """Lease the slots that the next slice cannot do without: one for the state at its end, and with drafts one a
        position. False when they cannot be had.
        """
        held = self._held[sequence.id]
        needed = drafts + (0 if self._private(held) else 1)
        while len(held.spare) < needed:
            slot = self.index.take()
            if slot is None:
                break
            held.spare.append(slot)
        if len(held.spare) >= needed:
            return True
        if drafts == 0 and held.source is not None and self.pool.refs(held.source) == 1:
            self.index.disown(held.source)
            return True
        return False

    def _private(self, held: _Held) -> bool:
        """Whether the source may be written to."""
        return held.source is not None and not self.pool.indexed(held.source)

    def attach(self, sequence: Sequence, part: SequenceSlice) -> SequenceSlice:
        """`part` with its work on states. After everything of the step is planned: what is kept beyond the must takes
        what slots are left.
        """
        held = self._held[sequence.id]
        first = part.end - part.drafts
        captures = self._optional(held, sequence, part.start, first)
        for end in range(first, part.end + 1):
            last = end == part.end
            slot = held.source if last and self._private(held) else None
            keep = held.wanted.pop(end, None) or self._reason(sequence, end)
            captures.append(_Capture(end, held.spare.pop() if slot is None else slot, keep))
        for slot in held.spare:
            self.index.release(slot)
        held.spare = []
        held.captures = captures
        work = StateWork(held.source, [StateCapture(capture.end, capture.slot) for capture in captures])
        return replace(part, state=work)

    def _optional(self, held: _Held, sequence: Sequence, start: int, first: int) -> list[_Capture]:
        """Captures strictly inside the slice, deepest first when slots are short; none where a snapshot is already."""
        size = self._block_tokens
        if self._policy == "every-block":
            for end in range(start - start % size + size, first, size):
                held.wanted[end] = Keep.SHARED
        captures: list[_Capture] = []
        for end in sorted((end for end in held.wanted if start < end < first), reverse=True):
            keep = held.wanted.pop(end)
            present = self.index.get(sequence.chain[end // size - 1])
            if present is not None:
                self._adopt(held, present, keep)
                continue
            slot = self.index.take()
            if slot is not None:
                captures.append(_Capture(end, slot, keep))
        captures.reverse()
        return captures

    def _reason(self, sequence: Sequence, end: int) -> Keep:
        """Why to keep the state after a slice that nobody asked for."""
        if end % self._block_tokens:
            return Keep.LIVE
        if self._policy == "every-block":
            return Keep.SHARED
        return Keep.ROLLING if end >= sequence.length else Keep.LIVE

    def settle(self, sequence: Sequence) -> None:
        """Take what the step gave, after its blocks are committed: the state after the computed tokens becomes the
        source, boundaries become snapshots, states after wrong drafts are given back.
        """
        held = self._held[sequence.id]
        captures, held.captures = held.captures, []
        source = next(capture.slot for capture in captures if capture.end == sequence.computed)
        if held.source is not None and all(capture.slot != held.source for capture in captures):
            self.index.release(held.source)
        held.source = source
        adopted: list[tuple[Snapshot, Keep]] = []
        for capture in captures:
            blocks = capture.end // self._block_tokens
            if capture.keep is not Keep.LIVE and blocks <= sequence.committed:
                adopted.append((self._name(sequence, blocks, capture.slot), capture.keep))
            if capture.slot != source:
                self.index.release(capture.slot)
        for snapshot, keep in adopted:
            self._adopt(held, snapshot, keep)

    def _name(self, sequence: Sequence, blocks: int, slot: int) -> Snapshot:
        """The snapshot after `blocks` blocks: the one that is there, or `slot`."""
        present = self.index.get(sequence.chain[blocks - 1])
        if present is not None:
            return present
        self.taken += 1
        return self.index.insert(sequence.chain, blocks, slot)

    def _adopt(self, held: _Held, snapshot: Snapshot, keep: Keep) -> None:
        if keep is Keep.SHARED:
            snapshot.keep = True
        elif held.claims.get(keep) is not snapshot:
            before = held.claims.get(keep)
            held.claims[keep] = snapshot
            self.index.claim(snapshot)
            if before is not None:
                self.index.give_up(before)

    def stop(self, sequence: Sequence) -> None:
        """`sequence` no longer runs: its slots are free or cached. Its blocks are still leased. A live state that
        happens to lie on a boundary is kept, for a preempted sequence to go on from.
        """
        held = self._held[sequence.id]
        blocks, beyond = divmod(sequence.computed, self._block_tokens)
        named: Snapshot | None = None
        # While a step is under way the source may have been overwritten already.
        if self._private(held) and not held.captures and not beyond and 0 < blocks <= sequence.committed:
            named = self._name(sequence, blocks, held.source)  # type: ignore[arg-type]
        for slot in held.slots():
            self.index.release(slot)
        held.source, held.spare, held.captures = None, [], []
        if named is not None:
            self._adopt(held, named, Keep.ROLLING)

    def end(self, sequence: Sequence, *, whole: bool) -> None:
        """`sequence` has ended and no longer runs. `whole`: its turn came to its end, so its last boundary is where the
        next turn starts. A request that was cut off is often sent again: the boundary in its prompt stays, too.
        """
        held = self._held.pop(sequence.id, None)
        if held is None:
            return
        rolling, prompt = held.claims.get(Keep.ROLLING), held.claims.get(Keep.PROMPT)
        if rolling is not None:
            rolling.keep = True
        alive = rolling is not None and rolling.slot is not None
        if prompt is not None and (not whole or not alive):
            prompt.keep = True
        for snapshot in held.claims.values():
            self.index.give_up(snapshot)

    def kept(self, chain: View[BlockKey]) -> list[Snapshot]:
        """The snapshots on `chain` that outlive the sequences that made them."""
        found = [self.index.get(key) for key in chain]
        return [one for one in found if one is not None and one.keep and one.slot is not None]

    def stats(self) -> dict[str, int]:
        """Slots and counts, by their names in `EngineStats`."""
        return {
            "states_total": self.pool.total,
            "states_free": self.pool.free,
            "states_cached": self.pool.cached,
            "states_leased": self.pool.leased,
            "snapshots_taken": self.taken,
            "snapshots_evicted": self.index.evictions,
            "snapshot_hits": self.hits,
        }

    def check(self, tree: PrefixTree, running: View[Sequence], paged: View[int] = ()) -> None:
        """Raise `PoolCorrupt` unless slots are conserved and leased by `running` (and `paged`, one lease each) alone,
        and snapshots have blocks.
        """
        self.pool.check()
        self.index.check(tree)
        leases = [0] * self.pool.total
        for slot in paged:
            leases[slot] += 1
        for sequence in running:
            held = self._held[sequence.id]
            for slot in held.slots():
                leases[slot] += 1
        if leases != [self.pool.refs(slot) for slot in range(self.pool.total)]:
            raise PoolCorrupt("the leases of running sequences on state slots are not those that the pool counts")
