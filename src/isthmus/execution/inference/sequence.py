"""One request inside the engine, and the states it goes through.

    WAITING ──admit──> RUNNING ──finish──> ENDED          WAITING: in the queue, holds no blocks
       │  ^              │                                BLOCKED: waits for an in-flight prefix, holds no blocks
       v  └──preempt─────┘                                RUNNING: holds a lease; part of the step under way or not
    BLOCKED                                               any state ──abort or deadline──> ENDED

and, where there is a block store, WAITING ──load──> LOADING ──loaded──> WAITING: the load holds its blocks (paging/).

Token ids so far, the number of them whose KV is computed, and the keys of their full blocks are all there is:
everything else (block table, penalties, drafts) is rebuilt from the ids after a preemption or on a resume.
"""

import enum
from dataclasses import dataclass

from blake3 import blake3

from isthmus.contracts.blocks import Owner, Tier, namespace_id, session_id
from isthmus.contracts.events import ErrorInfo, Finish, RequestOutput, Reuse, Timing
from isthmus.contracts.ids import RequestId
from isthmus.contracts.keys import BlockKey, PrefixKey, block_key, prefix_key
from isthmus.contracts.requests import EngineRequest, Work
from isthmus.execution.inference.batch import SampleTask, SequenceSlice, SliceResult, TokenHistory
from isthmus.execution.inference.drafts import NgramDrafter
from isthmus.execution.inference.lease import Lease
from isthmus.execution.inference.paging.jobs import Arrivals


class State(enum.Enum):
    """See the module's picture."""

    WAITING = "waiting"
    BLOCKED = "blocked"
    LOADING = "loading"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True)
class Reused:
    """Tokens loaded from the store, by tier; see `Reuse`."""

    dram: int = 0
    nvme: int = 0
    remote: int = 0
    load_s: float = 0.0
    reason: str = ""

    def add(self, tier: Tier, tokens: int) -> None:
        """So many tokens more came from `tier`."""
        setattr(self, tier.value, getattr(self, tier.value) + tokens)

    def told(self, cached: int) -> Reuse:
        """In wire form, with `cached` tokens reused in all."""
        nvme, remote = min(self.nvme, cached), min(self.remote, cached)
        dram = min(self.dram, cached - nvme - remote)
        return Reuse(cached - dram - nvme - remote, dram, nvme, remote, self.load_s, self.reason)


class Sequence:
    """A request with what the engine knows about it. Changed by the scheduler only. `serial`: never given twice."""

    def __init__(
        self, request: EngineRequest, block_tokens: int, format_digest: bytes, now: float, serial: int = 0
    ) -> None:
        self.request = request
        self.serial = serial
        self.id: RequestId = request.request_id
        self.state = State.WAITING
        self.history = TokenHistory(request.prompt_ids, list(request.output_ids))
        self.computed = 0
        self.lease: Lease | None = None
        self.committed = 0
        self.arrived = now
        self.started: float | None = None
        self.first_token: float | None = None
        self.cached_tokens: int | None = None
        self.preemptions = 0
        self.steps = 0  # that it is part of and whose results were not taken
        self.doomed: Finish | None = None
        self.failure: ErrorInfo | None = None
        self.digest = b""
        self.reuse = Reused()
        self.arrivals: Arrivals | None = None
        self.paged = False  # whether there is a store
        self.loaded = 0  # blocks that need not be written to it: it has them
        self._block_tokens = block_tokens
        self._format_digest = format_digest
        self._tokens = [*request.prompt_ids, *request.output_ids]
        self._prefixes: list[PrefixKey] = []
        self._keys: list[BlockKey] = []
        self._drafter: NgramDrafter | None = None
        self._states: list[BlockKey] = []
        self._owner: Owner | None = None

    @property
    def owner(self) -> Owner:
        """Whose its state is."""
        if self._owner is None:
            namespace = self.request.scope.namespace
            self._owner = Owner(namespace_id(namespace), session_id(namespace, self.request.session))
        return self._owner

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self._tokens)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is not computed yet."""
        return len(self._tokens) - self.computed

    @property
    def deadline(self) -> float | None:
        """When the request ends whatever its state, on the engine's clock."""
        return None if self.request.deadline_s is None else self.arrived + self.request.deadline_s

    def keys(self, count: int) -> list[BlockKey]:
        """The keys of the first `count` full blocks."""
        scope = self.request.scope
        while len(self._keys) < count:
            start = len(self._keys) * self._block_tokens
            parent = self._prefixes[-1] if self._prefixes else scope.root()
            prefix = prefix_key(scope, parent, self._tokens[start : start + self._block_tokens])
            self._prefixes.append(prefix)
            self._keys.append(block_key(scope, prefix, self._format_digest))
        return self._keys[:count]

    def state_keys(self, count: int, digest: bytes) -> list[BlockKey]:
        """The keys of the state snapshots, of the format with this digest, after the first `count` full blocks."""
        self.keys(count)
        while len(self._states) < count:
            self._states.append(block_key(self.request.scope, self._prefixes[len(self._states)], digest))
        return self._states[:count]

    @property
    def chain(self) -> list[BlockKey]:
        """The keys that `keys` was asked for so far. Only grows; not to be changed."""
        return self._keys

    def matchable(self) -> list[BlockKey]:
        """The keys worth matching: all full blocks but never the last token, whose logits are needed."""
        return self.keys((len(self._tokens) - 1) // self._block_tokens)

    def drafts(self, limit: int) -> list[int]:
        """At most `limit` guesses for the tokens after the next one."""
        if self._drafter is None:
            self._drafter = NgramDrafter()
            self._drafter.extend(self._tokens)
        return self._drafter.propose(limit)

    def slice(
        self,
        count: int,
        drafts: list[int],
        banned: tuple[int, ...],
        *,
        digest: bool,
        masks: list[bytes] | None = None,
    ) -> SequenceSlice:
        """The next `count` known tokens (and `drafts` after them) as a part of a step. The lease covers them."""
        lease = self.lease
        if lease is None:
            raise ValueError("a sequence without a lease cannot run")
        end = self.computed + count
        last = end == len(self._tokens)
        sample = None
        if last and self.request.work is Work.GENERATE:
            params = self.request.sampling
            until = params.min_tokens if banned else 0
            sample = SampleTask(params, len(self.history.output), self.history, banned, until, digest, masks)
        hidden = last and self.request.work is Work.EMBED
        tokens = self._tokens[self.computed : end] + drafts
        return SequenceSlice(
            self.id,
            tokens,
            self.computed,
            list(lease.blocks),
            sample,
            len(drafts),
            hidden,
            serial=self.serial,
            arrivals=self.arrivals,
        )

    def advance(self, part: SequenceSlice, result: SliceResult) -> None:
        """Take what a step computed: its positions are valid up to the last accepted draft."""
        self.computed = part.end - (part.drafts - result.accepted_drafts)

    def void(self) -> None:
        """What was loaded did not all arrive: go on from the blocks that were on the device before."""
        self.arrivals, self.loaded = None, 0
        self.computed = self.committed * self._block_tokens
        self.cached_tokens = min(self.computed, len(self.request.prompt_ids))
        if self.lease is not None:
            self.lease.truncate(self.committed)

    def append(self, token_ids: list[int]) -> None:
        """Add sampled tokens."""
        self._tokens += token_ids
        self.history.output += token_ids
        if self._drafter is not None:
            self._drafter.extend(token_ids)

    def chain_digests(self, digests: list[bytes]) -> None:
        """Extend the chain over the logits of every sampled position."""
        for digest in digests:
            self.digest = blake3(self.digest + digest).digest()

    def final_output(self, finish: Finish, now: float) -> RequestOutput:
        """The last output of this request, without tokens."""
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        timing = Timing(started - self.arrived, first - started, now - first, self.preemptions)
        return RequestOutput(
            self.id,
            finish=finish,
            cached_tokens=self.cached_tokens or 0,
            reuse=self.reuse.told(self.cached_tokens or 0) if self.paged else None,
            timing=timing,
            logits_digest=self.digest or None,
            error=self.failure,
        )
