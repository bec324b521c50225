"""What the engine is asked to do."""

import enum

import msgspec

from isthmus.contracts.blocks import MAX_SESSION_CHARS, HintKind
from isthmus.contracts.constraints import Constraint
from isthmus.contracts.errors import InvalidInput, Unsupported
from isthmus.contracts.ids import RequestId
from isthmus.contracts.ids import request_id as check_request_id
from isthmus.contracts.keys import MediaRef, PrefixScope
from isthmus.contracts.sampling import SamplingParams

MAX_PROMPT_TOKENS = 1_048_576
PRIORITY_RANGE = (-100, 100)
MAX_DEADLINE_S = 86_400.0


class Work(enum.StrEnum):
    """What kind of answer a request wants."""

    GENERATE = "generate"
    """Tokens."""
    PREFILL = "prefill"
    """Only that the prompt's blocks are computed and cached; ends without an output token."""
    EMBED = "embed"
    """The last hidden state (after the final norm) of the last prompt token, as little-endian float32 bytes."""


class EngineRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence to run. Token ids are checked against the model's vocabulary by the engine, the rest here.

    `output_ids` are output tokens that exist already: the request resumes as if it had produced them itself.
    `priority`: lower runs first, as in vLLM; waiting improves it (ageing). `deadline_s` is how long, from the engine's
    receipt, the request may take before it ends with `Finish.DEADLINE`; None means no deadline. `constraint` is what
    the output must look like; after a resume it holds for `output_ids` and what follows together. `session` names the
    conversation that the request belongs to (empty: none), so that its state can be hinted at and forgotten as one;
    `hint` is what is known about the state's future when the request ends, within `hint_s` seconds where that matters.
    """

    request_id: RequestId
    scope: PrefixScope
    prompt_ids: list[int]
    sampling: SamplingParams
    work: Work = Work.GENERATE
    output_ids: list[int] = []
    media: tuple[MediaRef, ...] = ()
    priority: int = 0
    deadline_s: float | None = None
    constraint: Constraint | None = None
    session: str = ""
    hint: HintKind | None = None
    hint_s: float = 0.0

    def __post_init__(self) -> None:
        check_request_id(self.request_id)
        if not 1 <= len(self.prompt_ids) <= MAX_PROMPT_TOKENS:
            count = len(self.prompt_ids)
            raise InvalidInput(f"the prompt has {count} tokens, accepted: 1 to {MAX_PROMPT_TOKENS}", "prompt")
        if self.constraint is not None and self.work is not Work.GENERATE:
            raise InvalidInput("only generated output can be constrained", "constraint")
        if self.media:
            raise Unsupported("no served model takes media yet", "media")
        if self.scope.adapter is not None:
            raise Unsupported("no served model has adapters yet", "adapter")
        if len(self.output_ids) >= self.sampling.max_tokens:
            raise InvalidInput("output_ids already holds max_tokens tokens", "output_ids")
        if len(self.session) > MAX_SESSION_CHARS:
            raise InvalidInput(f"a session has at most {MAX_SESSION_CHARS} characters", "session")
        if not 0 <= self.hint_s <= MAX_DEADLINE_S:
            raise InvalidInput(f"hint_s is {self.hint_s}, accepted: 0 to {MAX_DEADLINE_S}", "hint_s")
        if not PRIORITY_RANGE[0] <= self.priority <= PRIORITY_RANGE[1]:
            low, high = PRIORITY_RANGE
            raise InvalidInput(f"priority is {self.priority}, accepted: {low} to {high}", "priority")
        if self.deadline_s is not None and not 0 < self.deadline_s <= MAX_DEADLINE_S:
            raise InvalidInput(f"deadline_s is {self.deadline_s}, accepted: over 0 to {MAX_DEADLINE_S}", "deadline_s")
