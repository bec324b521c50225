"""The scheduler: which tokens of which requests the next step computes. Pure: no I/O, no clock of its own, no tensors.

    schedule(now) -> Batch      update(batch, result, now) -> outputs      add / abort at any time in between
    ahead(batch, now) -> Batch  the step after one under way, where it can be told (ahead.py)

Promises
- A step computes at most `max_batch_tokens` tokens: first one token (plus drafts) for every decoding sequence, then
chunks of prompts, in the order of the waiting queue (priority with ageing); beside decoding sequences at most
`mixed_prompt_tokens` of prompts, which bounds how long a token waits for the prompts of others.
- A block being computed is awaited, never computed twice (inflight.py).
- Hybrid models: a sequence starts at the deepest state snapshot under its matched blocks (recurrent.py); what lies
beyond is computed again, into blocks that are shared again. Chunks of prompts end on the grid of the recurrent state or
at the end of the known tokens; to get to the grid a step may go over its budget by less than one cell.
- When memory runs out the last in that order is preempted: it gives up its blocks, keeps its place, and later
recomputes what is not cached any more. The first in the order always fits alone, so something always advances.
- A constrained request starts, and samples each time, when its masks are here; the others do not wait for it.
- With a block store, a waiting request whose prefix reaches further there is loaded beside the others (paging/).
- A request that ends, in whatever state, frees its blocks at once; if it is part of the step under way, when that ends.
- free + cached + leased == total after every call, for blocks and for state slots.
"""

import itertools
from collections.abc import Iterable

from isthmus.contracts.events import EngineStats, ErrorInfo, Finish, ModelInfo, RequestOutput
from isthmus.contracts.ids import RequestId
from isthmus.contracts.keys import BlockKey
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.admission import Admission
from isthmus.execution.inference.ahead import banned_tokens, ends, follow, foreseeable
from isthmus.execution.inference.batch import Batch, SequenceSlice, StepResult
from isthmus.execution.inference.books import check_books
from isthmus.execution.inference.counters import Counters
from isthmus.execution.inference.drafting import Drafting
from isthmus.execution.inference.grammar.port import MaskSource
from isthmus.execution.inference.inflight import InflightPrefixes
from isthmus.execution.inference.lease import Lease
from isthmus.execution.inference.outcome import take_result
from isthmus.execution.inference.paging.jobs import Event as PageEvent
from isthmus.execution.inference.paging.jobs import Pager
from isthmus.execution.inference.paging.policy import Paging, Verdict
from isthmus.execution.inference.pool import BlockPool, PoolCorrupt
from isthmus.execution.inference.recurrent import RecurrentStates
from isthmus.execution.inference.sequence import Sequence, State
from isthmus.execution.inference.settings import SchedulerSettings
from isthmus.execution.inference.tree import PrefixTree
from isthmus.execution.inference.waiting import WaitingQueue


class Scheduler:
    """The requests of one engine and the blocks they hold."""

    def __init__(
        self,
        info: ModelInfo,
        format_digest: bytes,
        settings: SchedulerSettings,
        masks: MaskSource | None = None,
        pager: Pager | None = None,
    ) -> None:
        self._drafting = Drafting(info, settings, masks)
        self._info = info
        self._format_digest = format_digest
        self._settings = settings
        self._pool = BlockPool(info.blocks)
        self._states: RecurrentStates | None = None
        if info.states is not None:
            self._states = RecurrentStates(info.states, info.block_tokens, settings.snapshots)
        self._tree = PrefixTree(self._pool, None if self._states is None else self._states.index.dropped)
        self._inflight = InflightPrefixes()
        self._waiting = WaitingQueue(settings.ageing_s)
        self._blocked: dict[RequestId, Sequence] = {}
        self._running: list[Sequence] = []
        self._all: dict[RequestId, Sequence] = {}
        self._admission = Admission(info, settings)
        self._counters = Counters()
        self._ended: list[RequestOutput] = []
        self._serials = itertools.count(1)
        self._paging: Paging | None = None
        if pager is not None:
            self._paging = Paging(
                pager,
                info,
                settings.paging,
                pool=self._pool,
                tree=self._tree,
                inflight=self._inflight,
                states=self._states,
            )

    # ---- requests in and out

    def add(self, request: EngineRequest, now: float) -> RequestOutput | None:
        """Queue a request; the output that refuses it when it cannot be taken."""
        queued = len(self._waiting) + len(self._blocked)
        refusal = self._admission.refuse(request, self._all.keys(), queued, now)
        if refusal is not None:
            self._counters.rejected += 1
            return refusal
        sequence = Sequence(request, self._info.block_tokens, self._format_digest, now, next(self._serials))
        self._all[sequence.id] = sequence
        self._waiting.push(sequence)
        self._drafting.open(sequence)
        if self._paging is not None:
            sequence.paged = True
            self._paging.arrived(sequence, now)
        return None

    def abort(self, request_id: RequestId, now: float, finish: Finish = Finish.ABORT) -> None:
        """End a request; its last output comes with the next `update` or `collect`. Unknown ids are ignored."""
        sequence = self._all.get(request_id)
        if sequence is None or sequence.doomed is not None:
            return
        if sequence.steps or sequence.state is State.LOADING:
            sequence.doomed = finish
            if self._paging is not None:
                self._paging.cancel(sequence)
        else:
            self._end(sequence, finish, now)

    def fail(self, request_id: RequestId, error: ErrorInfo, now: float) -> None:
        """End a request that cannot go on, and say why: rejected, or an error once it has given tokens."""
        sequence = self._all.get(request_id)
        if sequence is not None and sequence.doomed is None:
            sequence.failure = error
            self.abort(request_id, now, Finish.REJECTED if sequence.first_token is None else Finish.ERROR)

    @property
    def paging(self) -> Paging | None:
        """What is loaded from the block store and written to it; None without one."""
        return self._paging

    def drain(self) -> None:
        """Refuse every request from now on."""
        self._admission.draining = True

    def collect(self) -> list[RequestOutput]:
        """The last outputs of requests that ended outside a step."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def idle(self) -> bool:
        """Whether no request is left."""
        return not self._all

    def next_deadline(self) -> float | None:
        """The earliest deadline of any request."""
        deadlines = [s.deadline for s in self._all.values() if s.deadline is not None and s.doomed is None]
        looks = None if self._paging is None else self._paging.next_deadline()
        return min(deadlines if looks is None else [*deadlines, looks], default=None)

    # ---- schedule

    def schedule(self, now: float) -> Batch | None:
        """Choose the next step; None when nothing can run. Not to be called while a step is under way."""
        for sequence in list(self._all.values()):
            if sequence.deadline is not None and now >= sequence.deadline:
                self.abort(sequence.id, now, Finish.DEADLINE)
        if self._paging is not None:
            self._paging.expire(now)
            self._start_early(self._paging, now)
        self._running.sort(key=self._waiting.score)
        parts: dict[RequestId, SequenceSlice] = {}
        budget = self._settings.max_batch_tokens
        for decoding in (True, False):
            for sequence in list(self._running):
                if budget > 0 and sequence.state is State.RUNNING and (sequence.remaining == 1) == decoding:
                    budget -= self._plan(sequence, budget, parts, now) if self._drafting.ready(sequence) else 0
            if decoding and parts:
                budget = min(budget, self._settings.mixed_prompt_tokens)
        self._admit(budget, parts, now)
        if not parts:
            return None
        for sequence in self._running:
            sequence.steps = int(sequence.id in parts)
            if self._states is not None and sequence.steps:
                parts[sequence.id] = self._states.attach(sequence, parts[sequence.id])
        return Batch(list(parts.values()))

    def ahead(self, batch: Batch, now: float) -> Batch | None:
        """The step after `batch`, the last that was handed in; None where its tokens or the queue decide what comes."""
        settings, deadline = self._settings, self.next_deadline()
        if settings.draft_tokens or self._states is not None or self._blocked:
            return None
        if len(self._waiting) and len(self._running) < settings.max_running:
            return None
        if not settings.overlap or (deadline is not None and deadline <= now):
            return None
        running = {sequence.serial: sequence for sequence in self._running}
        going_on: list[tuple[Sequence, SequenceSlice]] = []
        for part in batch.slices:
            sequence = running.pop(part.serial, None)
            if sequence is None or sequence.doomed is not None:
                continue
            if not foreseeable(sequence, part):
                return None
            if not ends(part, self._info):
                going_on.append((sequence, part))
        if running or not going_on:
            return None
        if not all(self._reserve(sequence, self._blocks_for(part.end + 1), 0) for sequence, part in going_on):
            return None
        for sequence, _ in going_on:
            sequence.steps += 1
        return Batch([follow(sequence, part, self._info) for sequence, part in going_on])

    def take_back(self, batch: Batch) -> None:
        """`batch`, scheduled ahead, will not be run."""
        for part in batch.slices:
            sequence = self._part_of(part)
            if sequence is not None:
                sequence.steps -= 1

    def _part_of(self, part: SequenceSlice) -> Sequence | None:
        """The sequence of a slice; None when it has ended."""
        sequence = self._all.get(RequestId(part.request_id))
        return sequence if sequence is not None and sequence.serial == part.serial else None

    def _admit(self, budget: int, parts: dict[RequestId, SequenceSlice], now: float) -> None:
        """Start waiting requests while tokens, places and blocks last.

        Without tokens left a hybrid model's next requests are looked at all the same, as many as there are places: an
        owner must know where others wait for its prefix before it is past.
        """
        looks = 0 if self._states is None else self._settings.max_running - len(self._running)
        for sequence in self._waiting:
            if len(self._running) >= self._settings.max_running or (budget < 1 and looks < 1):
                return
            looks -= budget < 1
            if not self._drafting.ready(sequence):
                continue
            keys = sequence.matchable()
            found = self._tree.match(keys)
            matched = found if self._states is None else found[: self._states.deepest(keys, len(found))]
            pending = self._pending(keys, len(matched))
            if pending is not None:
                self._block(sequence, pending)
                continue
            if self._paging is not None and self._pages(self._paging, sequence, found, now):
                continue
            if budget < 1:
                continue
            if self._states is not None and not self._states.room(self._running):
                return
            if not self._fits(sequence, matched):
                return
            self._start(sequence, matched, len(found), now)
            budget -= self._plan(sequence, budget, parts, now)

    def _fits(self, sequence: Sequence, matched: list[int]) -> bool:
        """Whether there are blocks for `sequence` and for what runs."""
        needed = self._blocks_for(sequence.length) - len(matched) + self._promised()
        needed += sum(self._pool.refs(block) == 0 for block in matched)
        short = needed - self._pool.free - self._pool.cached
        return short <= 0 or (self._given(short, sequence) and self._fits(sequence, matched))

    def _given(self, blocks: int, sequence: Sequence) -> bool:
        """Whether others gave way to `sequence`: their blocks were loaded, and they do not run yet."""
        return self._paging is not None and self._paging.ready.give_way(blocks, sequence.serial)

    def _pending(self, keys: list[BlockKey], matched: int) -> BlockKey | None:
        """The key to wait for instead of computing beyond the first `matched` blocks. The owner of a hybrid model's
        block is asked to capture the state there.
        """
        if self._states is None:
            return self._inflight.last_pending(keys, matched)
        found = self._inflight.deepest_pending(keys, matched) if self._states.waits_help else None
        if found is None:
            return None
        index, owner = found
        self._states.want(self._all[owner], index + 1)
        return keys[index]

    def _start(self, sequence: Sequence, matched: list[int], found: int, now: float) -> None:
        """Run `sequence` from its `matched` blocks on; `found` were present, more where no snapshot is so deep."""
        self._waiting.remove(sequence)
        self._run(sequence, Lease(self._pool, self._tree, matched), len(matched), now)
        if self._states is not None:
            self._states.start(sequence, found)

    def _run(self, sequence: Sequence, lease: Lease, blocks: int, now: float) -> None:
        """Run `sequence`, of which `blocks` blocks are computed."""
        sequence.state = State.RUNNING
        sequence.lease = lease
        sequence.computed = blocks * self._info.block_tokens
        sequence.committed = blocks
        if self._paging is not None:
            self._paging.forget(sequence)
        if sequence.started is None:
            sequence.started = now
            sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt_ids))
            self._counters.cached_tokens += sequence.cached_tokens
            self._counters.prompt_tokens += len(sequence.request.prompt_ids)
        self._running.append(sequence)
        full = sequence.length // self._info.block_tokens
        self._inflight.register(sequence.id, sequence.keys(full)[sequence.committed :])

    def _pages(self, paging: Paging, sequence: Sequence, found: list[int], now: float) -> bool:
        """Whether `sequence` waits for the store, or is being loaded from now on."""
        verdict = paging.consider(sequence, sequence.matchable(), found, now, len(self._running))
        if verdict is Verdict.LOAD:
            self._waiting.remove(sequence)
            sequence.state = State.LOADING
        return verdict is not Verdict.GO

    def _start_early(self, paging: Paging, now: float) -> None:
        """Run what is still being loaded, where the rest will arrive while it computes."""
        for sequence, lease, held, arrivals in list(paging.startable(self._settings.max_running - len(self._running))):
            self._run(sequence, lease, len(lease.blocks), now)
            sequence.committed = held
            sequence.loaded = len(lease.blocks)
            sequence.arrivals = arrivals

    def paged(self, events: Iterable[PageEvent], now: float) -> None:
        """Take what the store's threads did."""
        for sequence, woken in [] if self._paging is None else self._paging.take(events):
            sequence.state = State.WAITING
            self._waiting.push(sequence)
            self._wake(woken)
            if sequence.doomed is not None:
                self._end(sequence, sequence.doomed, now)

    def _block(self, sequence: Sequence, key: BlockKey) -> None:
        self._waiting.remove(sequence)
        sequence.state = State.BLOCKED
        self._blocked[sequence.id] = sequence
        self._inflight.wait(sequence.id, key)
        self._counters.dedup_waits += 1

    def _plan(self, sequence: Sequence, budget: int, parts: dict[RequestId, SequenceSlice], now: float) -> int:
        """Add `sequence`'s next tokens to the step. Returns how many; 0 when it was preempted for lack of blocks."""
        if sequence.arrivals is not None and sequence.arrivals.failed:
            sequence.void()
        count = min(sequence.remaining, budget) if self._states is None else self._states.chunk(sequence, budget)
        drafts = self._drafting.drafts(sequence, budget - count) if count == sequence.remaining else []
        needed = self._blocks_for(sequence.computed + count + len(drafts))
        while not self._reserve(sequence, needed, len(drafts)):
            if drafts:
                drafts = []
                needed = self._blocks_for(sequence.computed + count)
                continue
            victim = max(self._running, key=self._waiting.score)
            parts.pop(victim.id, None)
            self._preempt(victim, now)
            if victim is sequence:
                return 0
        banned = banned_tokens(sequence, self._info, len(sequence.history.output))
        masks = self._drafting.masks(sequence, len(drafts))
        parts[sequence.id] = sequence.slice(count, drafts, banned, digest=self._info.exact, masks=masks)
        self._counters.draft_tokens += len(drafts)
        return count + len(drafts)

    def _reserve(self, sequence: Sequence, blocks: int, drafts: int) -> bool:
        """Hold what the next slice needs: `blocks` in all and, in a hybrid model, slots for its states."""
        lease = sequence.lease
        more = 0 if lease is None else max(0, blocks - len(lease.blocks))
        if lease is not None and not (lease.grow(more) or (self._given(more, sequence) and lease.grow(more))):
            return False
        return self._states is None or self._states.reserve(sequence, drafts)

    def _promised(self) -> int:
        """Blocks that running sequences still need for the tokens they have."""
        held = ((s, len(s.lease.blocks)) for s in self._running if s.lease is not None)
        return sum(max(0, self._blocks_for(s.length) - count) for s, count in held)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self._running.remove(sequence)
        self._drop_state(sequence)
        sequence.state = State.WAITING
        sequence.computed = sequence.committed = 0
        sequence.preemptions += 1
        self._counters.preemptions += 1
        self._waiting.push(sequence)
        if self._paging is not None:
            self._paging.arrived(sequence, now)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._info.block_tokens)

    # ---- update

    def update(self, batch: Batch, result: StepResult, now: float) -> list[RequestOutput]:
        """Take what a step gave: tokens, ends, blocks that can be reused from now on."""
        self._counters.steps += 1
        self._counters.steps_ahead += batch.ahead
        outputs: list[RequestOutput] = []
        for part, got in zip(batch.slices, result.slices, strict=True):
            self._counters.computed_tokens += len(part.token_ids)
            sequence = self._part_of(part)
            if sequence is None:
                continue  # It ended with the step before.
            sequence.steps -= 1
            if part.arrivals is not None and part.arrivals.failed and sequence.doomed is None:
                sequence.void()
                continue
            sequence.arrivals = None
            sequence.advance(part, got)
            self._counters.accepted_drafts += got.accepted_drafts
            self._commit(sequence)
            if sequence.doomed is not None:
                self._settle(sequence)
                self._end(sequence, sequence.doomed, now)
                continue
            output, finish = take_result(sequence, got, self._info, now)
            if sequence.lease is not None and not sequence.steps:
                sequence.lease.truncate(self._blocks_for(sequence.computed))
            self._commit(sequence)
            self._settle(sequence)
            if output is not None:
                outputs.append(output)
                self._counters.output_tokens += len(output.token_ids)
                if finish is None:
                    self._drafting.advance(sequence, output.token_ids)
            if finish is not None:
                self._forget(sequence, whole=finish is not Finish.DONE)
        return outputs + self.collect()

    def _commit(self, sequence: Sequence) -> None:
        """Name the newly filled blocks in the tree and wake who waited for them."""
        lease = sequence.lease
        full = min(sequence.computed, sequence.length) // self._info.block_tokens
        if lease is None or full <= sequence.committed:
            return
        keys = sequence.keys(full)
        for index in range(sequence.committed, full):
            parent = keys[index - 1] if index else None
            carrier = self._tree.insert(keys[index], parent, lease.blocks[index])
            lease.share(index, carrier)
            if self._paging is not None:
                self._paging.filled(sequence, index, carrier)
            self._wake(self._inflight.computed(sequence.id, keys[index]))
        sequence.committed = full

    def _settle(self, sequence: Sequence) -> None:
        if self._states is not None:
            self._states.settle(sequence)

    def _wake(self, waiters: list[RequestId]) -> None:
        for waiter in waiters:
            sequence = self._blocked.pop(waiter)
            sequence.state = State.WAITING
            self._waiting.push(sequence)

    # ---- ends

    def _end(self, sequence: Sequence, finish: Finish, now: float) -> None:
        """End a sequence that is not part of the step under way."""
        self._ended.append(sequence.final_output(finish, now))
        self._counters.aborted += 1
        self._forget(sequence)

    def _forget(self, sequence: Sequence, *, whole: bool = False) -> None:
        """Forget an ended sequence. `whole`: it generated to its end, so that the next turn may go on from there."""
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is State.BLOCKED:
            self._inflight.cancel_wait(sequence.id)
            del self._blocked[sequence.id]
        elif sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._drop_state(sequence)
        sequence.state = State.ENDED
        if self._states is not None:
            self._states.end(sequence, whole=whole)
        if self._paging is not None:
            self._paging.ended(sequence)
        self._waiting.forget(sequence)
        self._drafting.close(sequence)
        del self._all[sequence.id]
        self._counters.finished += 1

    def _drop_state(self, sequence: Sequence) -> None:
        """Give back state slots, blocks and the keys still pending."""
        if self._states is not None:
            self._states.stop(sequence)
        if sequence.lease is not None:
            sequence.lease.close()
            sequence.lease = None
        self._wake(self._inflight.release(sequence.id))

    # ---- what others may see

    def stats(self) -> EngineStats:
        """A snapshot of queues, blocks and counters."""
        loading = sum(s.state is State.LOADING for s in self._all.values()) if self._paging is not None else 0
        return self._counters.snapshot(
            waiting=len(self._waiting) + len(self._blocked) + loading,
            running=len(self._running),
            pool=self._pool,
            states=self._states,
            paging=None if self._paging is None else self._paging.stats(),
        )

    def check(self) -> None:
        """Raise `PoolCorrupt` unless pool and tree agree, and idle means that nothing is leased or pending."""
        check_books(self._pool, self._tree, self._running, self._paging, self._states)
        if self.idle and len(self._inflight):
            raise PoolCorrupt(f"{len(self._inflight)} keys are pending in an idle engine")
