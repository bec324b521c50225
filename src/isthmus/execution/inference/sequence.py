"""One request inside the engine, and the states it goes through.

    WAITING ──admit──> RUNNING ──finish──> ENDED          WAITING: in the queue, holds no blocks
       │  ^              │                                BLOCKED: waits for an in-flight prefix, holds no blocks
       v  └──preempt─────┘                                RUNNING: holds a lease; part of the step under way or not
    BLOCKED                                               any state ──abort or deadline──> ENDED

Token ids so far, the number of them whose KV is computed, and the keys of their full blocks are all there is:
everything else (block table, penalties, drafts) is rebuilt from the ids after a preemption or on a resume.
"""

import enum

from blake3 import blake3

from isthmus.contracts.events import ErrorInfo, Finish, RequestOutput, Timing
from isthmus.contracts.ids import RequestId
from isthmus.contracts.keys import BlockKey, PrefixKey, block_key, prefix_key
from isthmus.contracts.requests import EngineRequest, Work
from isthmus.execution.inference.batch import SampleTask, SequenceSlice, SliceResult, TokenHistory
from isthmus.execution.inference.drafts import NgramDrafter
from isthmus.execution.inference.lease import Lease


class State(enum.Enum):
    """See the module's picture."""

    WAITING = "waiting"
    BLOCKED = "blocked"
    RUNNING = "running"
    ENDED = "ended"


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
        self._block_tokens = block_tokens
        self._format_digest = format_digest
        self._tokens = [*request.prompt_ids, *request.output_ids]
        self._prefixes: list[PrefixKey] = []
        self._keys: list[BlockKey] = []
        self._drafter: NgramDrafter | None = None

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
            self.id, tokens, self.computed, list(lease.blocks), sample, len(drafts), hidden, serial=self.serial
        )

    def advance(self, part: SequenceSlice, result: SliceResult) -> None:
        """Take what a step computed: its positions are valid up to the last accepted draft."""
        self.computed = part.end - (part.drafts - result.accepted_drafts)

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
            timing=timing,
            logits_digest=self.digest or None,
            error=self.failure,
        )
