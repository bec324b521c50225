"""What travels between an engine and its client: commands in, events out. Wire forms by msgspec, tagged by `type`.

    client -> engine    Submit | Abort | Drain | SessionHint | Shutdown
    engine -> client    Ready | Failed | Outputs

Every accepted request gets exactly one output with a `finish`; after it nothing more comes for that id.
A refused request gets one output with `Finish.REJECTED` and an `error`.
"""

import enum

import msgspec

from isthmus.contracts.blocks import HintKind
from isthmus.contracts.ids import Namespace, RequestId
from isthmus.contracts.layout import Codec, Dtype
from isthmus.contracts.requests import EngineRequest


class Finish(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    REJECTED = "rejected"
    ERROR = "error"
    DONE = "done"
    """A prefill or embed request did what it was asked."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The log probability of a chosen token, and the best alternatives (ids with log probabilities, best first)."""

    logprob: float
    top: list[tuple[int, float]]


class Timing(msgspec.Struct, frozen=True):
    """Seconds, on the engine's monotonic clock: in the queue, from start to the first token, from there to the end."""

    queue_s: float
    prefill_s: float
    decode_s: float
    preemptions: int


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error of the tree in wire form."""

    code: str
    message: str
    field: str = ""
    retry_after_s: float | None = None


class Reuse(msgspec.Struct, frozen=True, omit_defaults=True):
    """Prompt tokens whose state was reused, by the tier it came from; `load_s` seconds of loading; `reason` why not
    more came from the store (a `blocks.Reason`, or `recompute_cheaper`, `no_room`; empty: nothing was missing).
    """

    device: int = 0
    dram: int = 0
    nvme: int = 0
    remote: int = 0
    load_s: float = 0.0
    reason: str = ""


class RequestOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one request, or its end, or both.

    `cached_tokens` (prompt tokens whose state was reused, not computed) comes with the first output. `stop_token` says
    that the last token id ended the text and is not part of it. `reuse` comes with the
    end, when there is a store: where they came from. `hidden` answers `Work.EMBED`. `logits_digest` (exact
    mode, with the end) is a BLAKE3 chain over the float32 logits of every sampled position: equal digests mean bitwise
    equal logits.
    """

    request_id: RequestId
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    stop_token: bool = False
    cached_tokens: int | None = None
    reuse: Reuse | None = None
    hidden: bytes | None = None
    timing: Timing | None = None
    logits_digest: bytes | None = None
    error: ErrorInfo | None = None


BUILDING = "building"
"""`EngineStats.compiled` while pieces are being compiled."""


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot of the engine. Counters since the start unless they are named after a state.

    `steps_ahead` were scheduled while another ran. `states_*` are slots of recurrent state (hybrid models; else 0);
    `snapshot_hits` counts requests that started from another's state snapshot. `constrained` requests,
    `grammar_refused` of them, restarts of the grammar process, masks it computed and what outputs waited for them
    (seconds, summed). `profile_s`: seconds of steps by part, empty unless the engine profiles itself.
    `compiled`: the state of what is compiled (`building`, `ready`, `failed`; empty when nothing is wanted), and
    `compiled_reason` why it is so. `paging`: counts and gauges of loads from the block store and writes to it; empty
    without one.
    """

    waiting: int = 0
    running: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_leased: int = 0
    steps: int = 0
    steps_ahead: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    dedup_waits: int = 0
    rejected: int = 0
    aborted: int = 0
    finished: int = 0
    draft_tokens: int = 0
    accepted_drafts: int = 0
    states_total: int = 0
    states_free: int = 0
    states_cached: int = 0
    states_leased: int = 0
    snapshots_taken: int = 0
    snapshots_evicted: int = 0
    snapshot_hits: int = 0
    constrained: int = 0
    grammar_refused: int = 0
    grammar_restarts: int = 0
    masks_computed: int = 0
    mask_wait_s: float = 0.0
    profile_s: dict[str, float] = {}
    compiled: str = ""
    compiled_reason: str = ""
    paging: dict[str, float] = {}


class StateInfo(msgspec.Struct, frozen=True):
    """The recurrent state of a hybrid model: `slots` of `state_bytes` each in `layers` equal parts, the canonical chunk
    grid in tokens, and the digest of the snapshots' `StateFormat`, which is part of their keys.
    """

    slots: int
    state_bytes: int
    grid_tokens: int
    layers: int = 1
    format_digest: bytes = b""


class ModelInfo(msgspec.Struct, frozen=True):
    """What an engine serves. `weights` is the 32-byte digest that is part of every BlockKey.

    `layers` counts the layers that have keys and values; `states` is there when others are recurrent; `arithmetic` is
    as in `BlockFormat`.
    """

    name: str
    model_type: str
    dtype: Dtype
    device: str
    exact: bool
    parameters: int
    vocab_size: int
    max_model_len: int
    weights: bytes
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    block_bytes: int
    blocks: int
    codec: Codec
    eos_token_ids: list[int]
    states: StateInfo | None = None
    arithmetic: str = ""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Run this request."""

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop this request by the end of the running step. Unknown ids are ignored: the request may just have ended."""

    request_id: RequestId


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what was accepted; refuse anything new."""


class SessionHint(msgspec.Struct, frozen=True, tag="hint"):
    """What is known about the state of a tenant's session from now on; unknown sessions are ignored."""

    namespace: Namespace
    session: str
    kind: HintKind
    seconds: float = 0.0


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End now."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Start-up progress: what is being done, and how far it is (0 to 1)."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine takes requests."""

    info: ModelInfo


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot go on (bad model folder, exact mode refused, internal error); the process ends after this."""

    error: ErrorInfo


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """What one step gave, and the engine's state after it."""

    outputs: list[RequestOutput]
    stats: EngineStats


Command = Submit | Abort | Drain | SessionHint | Shutdown
Event = Progress | Ready | Failed | Outputs
