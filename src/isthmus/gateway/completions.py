"""POST /v1/completions: the legacy text API. Choice i of prompt p has index p * n + i, as OpenAI numbers them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from isthmus.contracts.events import TokenLogprob
from isthmus.gateway.context import Call
from isthmus.gateway.decode import decode_json
from isthmus.gateway.errors import HttpError
from isthmus.gateway.output_form import OutputForm, response_constraint
from isthmus.gateway.plan import Limits
from isthmus.gateway.render import Tail, TokenBytes, completion_logprobs, encode, event, usage
from isthmus.gateway.schema_requests import CompletionRequest
from isthmus.gateway.schema_responses import Completion, CompletionChoice, CompletionLogprobs, FinishReason, Usage
from isthmus.gateway.sequence import Delta, SequenceState, TextOffsets, run_together
from isthmus.gateway.service import Service
from isthmus.gateway.state_hints import state_hints

API = "completions"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its tokens, and its text where the answer echoes it."""

    token_ids: list[int]
    echo: str = ""


def split_prompts(prompt: str | Sequence[object]) -> list[str] | list[list[int]]:
    """The prompts of a body: all text or all token ids. Raises `HttpError` for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    items = list(prompt)
    if all(isinstance(item, int) for item in items):
        return [[item for item in items if isinstance(item, int)]]
    texts = [item for item in items if isinstance(item, str)]
    lists = [item for item in items if isinstance(item, list)]
    if len(texts) == len(items):
        return texts
    if len(lists) == len(items):
        return lists
    raise HttpError(400, "prompt mixes text and token ids", code="invalid_input", param="prompt")


async def encode_prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """The prompts of `body` as tokens, in order. Raises `HttpError` and the prompting plane's errors."""
    parts = split_prompts(body.prompt)
    service.planner.check_sequences(len(parts), body.n or 1)
    prompts = []
    for part in parts:
        if isinstance(part, str):
            prompts.append(Prompt(await service.prompting.encode(part), part if body.echo else ""))
            continue
        # Before anything waits: ids over the context are let go at once, so that few requests cannot hold much memory.
        service.planner.check_context(len(part), "prompt")
        service.planner.check_tokens(part, "prompt")
        echo = await service.prompting.decode(part, skip_special_tokens=True) if body.echo else ""
        prompts.append(Prompt(part, echo))
    return prompts


async def completions(service: Service, call: Call) -> None:
    """Answer a text completion."""
    body = decode_json(call.exchange.request, CompletionRequest, service.settings)
    service.count_ignored(body)
    service.planner.check_model(body.model)
    if body.echo and body.logprobs is not None:
        message = "logprobs with echo needs prompt logprobs, which are not supported"
        raise HttpError(400, message, code="unsupported", param="echo")
    constraint, field_name = response_constraint(body)
    prompts = await encode_prompts(service, body)
    n = body.n or 1
    plans = service.planner.sequences(
        body,
        [prompt.token_ids for prompt in prompts],
        request_id=call.request_id,
        limits=Limits(body.max_tokens),
        logprobs=body.logprobs,
        deadline_s=call.remaining(service.clock),
        hints=state_hints(call),
        param="prompt",
        form=OutputForm(constraint, field=field_name),
    )
    call.stream, call.sequences = bool(body.stream), len(plans)
    call.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    writer = CompletionWriter(call, service, int(service.clock.wall()), body)
    collected = [CompletionText(service.prompting.token_bytes, prompts[plan.index // n].echo) for plan in plans]
    if body.stream:
        tail = Tail(call.exchange, len(plans))

        async def write(delta: Delta) -> None:
            choice = collected[delta.index].chunk(delta)
            data = b"" if choice is None else event(writer.answer([choice]))
            await tail.put(data, last=delta.finish is not None)

        states = await run_together([service.sequences.run(plan, call, API, write) for plan in plans])
        call.cached_tokens = sum(state.cached_tokens for state in states[::n])
        await tail.end(event(writer.answer([], usage(states, n))) if writer.include_usage else b"")
        return
    states = await run_together([
        service.sequences.run(plan, call, API, collected[plan.index].collect) for plan in plans
    ])  # fmt: skip
    call.cached_tokens = sum(state.cached_tokens for state in states[::n])
    choices = [one.whole(index) for index, one in enumerate(collected)]
    await call.exchange.respond(200, encode(writer.whole(choices, states, n)), "application/json")


@dataclass(slots=True)
class CompletionText:
    """One choice: streamed step by step, or collected."""

    token_bytes: TokenBytes
    echo: str
    offsets: TextOffsets = field(default_factory=TextOffsets)
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish: FinishReason = "stop"
    opened: bool = False

    def chunk(self, delta: Delta) -> CompletionChoice | None:
        """What a step adds to a stream; None when that is nothing. The echoed prompt comes with the first."""
        text = delta.text if self.opened else self.echo + delta.text
        first, self.opened = not self.opened, True
        logprobs = self._shape(delta.token_ids, delta.logprobs)
        if not (text or first or delta.finish or (logprobs and logprobs.tokens)):
            return None
        return CompletionChoice(delta.index, text, logprobs, _reason(delta))

    async def collect(self, delta: Delta) -> None:
        """Take what a step added."""
        self.text.append(delta.text)
        if delta.logprobs is not None:
            self.token_ids += delta.token_ids
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish = _reason(delta) or "stop"

    def whole(self, index: int) -> CompletionChoice:
        """The collected choice."""
        text = self.echo + "".join(self.text)
        return CompletionChoice(index, text, self._shape(self.token_ids, self.logprobs), self.finish)

    def _shape(self, ids: list[int], logprobs: list[TokenLogprob] | None) -> CompletionLogprobs | None:
        return None if logprobs is None else completion_logprobs(ids, logprobs, self.token_bytes, self.offsets)


def _reason(delta: Delta) -> FinishReason | None:
    if delta.finish is None:
        return None
    return "length" if delta.finish == "length" else "stop"


class CompletionWriter:
    """The frame around the choices of an answer or of a chunk."""

    def __init__(self, call: Call, service: Service, created: int, body: CompletionRequest) -> None:
        self._id = call.request_id
        self._service = service
        self._created = created
        options = body.stream_options
        self.include_usage = options is not None and bool(options.include_usage)

    def answer(self, choices: list[CompletionChoice], counts: Usage | None = None) -> Completion:
        """A chunk: `usage` only if it was asked for."""
        return self._frame(choices, counts if self.include_usage else UNSET)

    def whole(self, choices: list[CompletionChoice], states: list[SequenceState], n: int) -> Completion:
        """The whole answer."""
        return self._frame(choices, usage(states, n))

    def _frame(self, choices: list[CompletionChoice], counts: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._service.info.name,
            choices=choices,
            system_fingerprint=self._service.fingerprint,
            usage=counts,
        )
