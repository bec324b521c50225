"""From a request body to engine requests: defaults, limits and seeds. Pure; no I/O.

A request of several prompts or n > 1 is as many engine requests. Choice 0 of a prompt draws from the request's seed,
choice i from BLAKE3(seed, i): so n = 1 is a prefix of n = 2, and a prompt in a list is answered as it would be alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from blake3 import blake3

from isthmus.contracts.clock import Entropy
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.events import ModelInfo
from isthmus.contracts.framing import frame
from isthmus.contracts.ids import Namespace, RequestId
from isthmus.contracts.ids import request_id as check_request_id
from isthmus.contracts.keys import PrefixScope
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.sampling import OPENAI_DEFAULTS, SEED_LIMIT, SamplingDefaults, SamplingParams, TextParams
from isthmus.gateway.errors import HttpError, context_length_exceeded
from isthmus.gateway.output_form import FREE, OutputForm
from isthmus.gateway.schema_requests import SamplingFields
from isthmus.gateway.settings import GatewaySettings
from isthmus.gateway.state_hints import NO_HINTS, StateHints

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One engine request and how its tokens become text. `index` is the choice's place in the answer."""

    index: int
    request: EngineRequest
    text: TextParams
    form: OutputForm = FREE


@dataclass(frozen=True, slots=True)
class Limits:
    """What the body says about length: its output limit and the name of the field that said it.

    A limit over what the context leaves is refused, or with `cut_to_context` cut to it.
    """

    max_tokens: int | None
    field: str = "max_tokens"
    cut_to_context: bool = False


@dataclass(frozen=True, slots=True)
class Planner:
    """Builds engine requests for one served model and tenant."""

    info: ModelInfo
    namespace: Namespace
    settings: GatewaySettings
    entropy: Entropy
    defaults: SamplingDefaults = OPENAI_DEFAULTS

    def check_model(self, name: str | None) -> None:
        """Refuse any model but the one served. Raises `HttpError` 404."""
        if name is not None and name != self.info.name:
            message = "this model is not served here; GET /v1/models lists what is"
            raise HttpError(404, message, code="model_not_found", param="model")

    def check_sequences(self, prompts: int, n: int) -> None:
        """Refuse more sequences than one request may have. Raises `HttpError` 400."""
        limit = self.settings.max_sequences
        if prompts * n > limit:
            message = f"a request has at most {limit} sequences (prompts times n), not {prompts * n}"
            raise HttpError(400, message, code="too_large", param="n")

    def check_tokens(self, token_ids: Sequence[int], param: str) -> None:
        """Refuse ids outside the vocabulary. Raises `HttpError` 400."""
        if token_ids and max(token_ids) >= self.info.vocab_size:
            message = f"{param} has a token id that is not below the vocabulary size {self.info.vocab_size}"
            raise HttpError(400, message, code="invalid_input", param=param)

    def sequences(
        self,
        body: SamplingFields,
        prompts: Sequence[list[int]],
        *,
        request_id: RequestId,
        limits: Limits,
        logprobs: int | None,
        deadline_s: float | None,
        param: str,
        form: OutputForm = FREE,
        hints: StateHints = NO_HINTS,
    ) -> list[SequencePlan]:
        """The engine requests of `body` for `prompts`. Raises `HttpError` and `InvalidInput` naming the field.

        `form` is of every output. Of what `body` says nothing about, the model's own sampling defaults hold.
        """
        n = body.n or 1
        seed = draw_seed(self.entropy) if body.seed is None else body.seed % SEED_LIMIT
        scope = PrefixScope(self.namespace, self.info.name)
        text = text_params(body)
        plans = []
        for place, prompt in enumerate(prompts):
            max_tokens = self._max_tokens(limits, len(prompt), param)
            for choice in range(n):
                index = place * n + choice
                sampling = self._sampling(body, max_tokens, child_seed(seed, choice), logprobs)
                request = EngineRequest(
                    request_id=request_id if index == 0 else check_request_id(f"{request_id}-{index}"),
                    scope=scope,
                    prompt_ids=prompt,
                    sampling=sampling,
                    priority=body.priority or 0,
                    deadline_s=deadline_s,
                    constraint=form.constraint,
                    session=hints.session,
                    hint=hints.hint,
                    hint_s=hints.seconds,
                )
                plans.append(SequencePlan(index, request, text, form))
        return plans

    def check_context(self, prompt_tokens: int, param: str) -> None:
        """Refuse a prompt that is empty or leaves no room for output. Raises `InvalidInput` and `HttpError` 400."""
        context = self.info.max_model_len
        if prompt_tokens == 0:
            raise InvalidInput("the prompt has no tokens, accepted: at least 1", param)
        if prompt_tokens >= context:
            message = f"the prompt has {prompt_tokens} tokens; the context is {context} with at least 1 of output"
            raise context_length_exceeded(message, param)

    def _max_tokens(self, limits: Limits, prompt_tokens: int, param: str) -> int:
        self.check_context(prompt_tokens, param)
        context = self.info.max_model_len
        left = context - prompt_tokens
        if limits.max_tokens is None:
            return min(left, self.settings.default_max_tokens)
        if limits.max_tokens > left and limits.cut_to_context:
            return left
        if limits.max_tokens > left:
            asked = f"{prompt_tokens} tokens of prompt and {limits.max_tokens} of output"
            raise context_length_exceeded(f"{asked} are over the context of {context}", limits.field)
        return limits.max_tokens

    def _sampling(self, body: SamplingFields, max_tokens: int, seed: int, logprobs: int | None) -> SamplingParams:
        defaults = self.defaults
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        self.check_tokens(list(bias), "logit_bias")
        stop_ids = tuple(body.stop_token_ids or ())
        self.check_tokens(stop_ids, "stop_token_ids")
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            temperature=_or(body.temperature, defaults.temperature),
            top_k=max(0, _or(body.top_k, defaults.top_k)),
            top_p=_or(body.top_p, defaults.top_p),
            min_p=_or(body.min_p, defaults.min_p),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
            logit_bias=bias,
            logprobs=logprobs,
            stop_token_ids=stop_ids,
            min_tokens=_or(body.min_tokens, 0),
            ignore_eos=bool(body.ignore_eos),
        )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def text_params(body: SamplingFields) -> TextParams:
    """How the output of `body` becomes text."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return TextParams(
        stop=stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
    )


def draw_seed(entropy: Entropy) -> int:
    """A seed for a request that names none; lineage records it, so the answer can be drawn again."""
    return int.from_bytes(entropy.token_bytes(8), "little")


def child_seed(seed: int, choice: int) -> int:
    """The seed of the `choice`-th answer of one prompt: the request's own for the first, BLAKE3(seed, choice) after."""
    if choice == 0:
        return seed
    fields = frame(b"isthmus/child-seed/v1", seed.to_bytes(8, "little"), choice.to_bytes(8, "little"))
    return int.from_bytes(blake3(fields).digest(8), "little")
