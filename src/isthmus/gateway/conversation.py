"""From a conversation, in whatever dialect it came, to sequences that run. What each dialect's edge shares.

    body --(dialect)--> Ask --prepare--> Prepared --converse--> Delta after Delta --(dialect)--> answer or events

An edge decodes its own body into an `Ask`, and renders each `Delta` (its `parts`, or its `text` when it has none), or
the `CollectedAnswer`. Everything in between is here: prompt, constraint, what to look for in the output, engine
requests, limits, accounting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.contracts.constraints import Constraint
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.prompting import (
    PROMPT_TAIL_TOKENS,
    ChatMessage,
    ChatOptions,
    OutputParse,
    ToolMode,
)
from isthmus.gateway.context import Call
from isthmus.gateway.output_form import OutputForm
from isthmus.gateway.plan import Limits, SequencePlan
from isthmus.gateway.schema_requests import SamplingFields
from isthmus.gateway.sequence import SequenceState, Sink, run_together
from isthmus.gateway.service import Service
from isthmus.gateway.state_hints import state_hints

NO_TOOLS = ChatOptions()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for an answer to a conversation.

    `sampling` carries what was said of sampling, stop strings, n, seed and priority (a dialect with other names fills
    one in). `response` is the form demanded of the answer and `response_field` the field that demanded it;
    `tool_fields` name the schema of each tool of `options`, `messages_field` the conversation: for refusals.
    """

    messages: Sequence[ChatMessage]
    sampling: SamplingFields
    limits: Limits
    options: ChatOptions = NO_TOOLS
    response: Constraint | None = None
    response_field: str = ""
    tool_fields: tuple[str, ...] = ()
    messages_field: str = "messages"
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What will run: one plan a choice."""

    plans: list[SequencePlan]
    prompt_tokens: int


async def prepare(service: Service, call: Call, ask: Ask) -> Prepared:
    """Encode the conversation and plan its sequences. Raises `HttpError` and the tree's errors, naming the field."""
    n = ask.sampling.n or 1
    service.planner.check_sequences(1, n)
    prompt = await service.prompting.encode_chat(ask.messages, ask.options)
    plans = service.planner.sequences(
        ask.sampling,
        [prompt],
        request_id=call.request_id,
        limits=ask.limits,
        logprobs=ask.logprobs,
        deadline_s=call.remaining(service.clock),
        hints=state_hints(call),
        param=ask.messages_field,
        form=output_form(service, ask, prompt),
    )
    call.sequences, call.prompt_tokens = n, len(prompt)
    return Prepared(plans, len(prompt))


def output_form(service: Service, ask: Ask, prompt: Sequence[int]) -> OutputForm:
    """What the answer must look like, and what is looked for in it. Raises `InvalidInput` naming the field."""
    options, tail = ask.options, tuple(prompt[-PROMPT_TAIL_TOKENS:])
    field = ask.response_field or _tools_field(ask)
    try:
        constraint = service.prompting.constraint(options, ask.response, tail)
    except InvalidInput as error:
        # What was put together from several fields is called a constraint there; its client knows no such field.
        raise type(error)(str(error), field if error.field in {"constraint", ""} else error.field) from None
    called = options.choice.mode is not ToolMode.NONE and bool(options.tools)
    names = tuple(tool.name for tool in options.tools) if called else ()
    return OutputForm(constraint, OutputParse(called, True, tail, names), field)


def _tools_field(ask: Ask) -> str:
    """The field of the only tool that can be meant, or of all of them."""
    options = ask.options
    if options.choice.mode is ToolMode.NAMED:
        places = [place for place, tool in enumerate(options.tools) if tool.name == options.choice.name]
    else:
        places = list(range(len(options.tools)))
    if len(places) == 1 and places[0] < len(ask.tool_fields):
        return ask.tool_fields[places[0]]
    return "tools"


async def converse(
    service: Service, call: Call, prepared: Prepared, api: str, sink_of: Callable[[int], Sink]
) -> list[SequenceState]:
    """Run everything prepared, giving each choice's steps to `sink_of(its index)`. `api` names the route in lineage.

    Raises the tree's errors and what a sink raises; the other sequences then end too.
    """
    runs = [service.sequences.run(plan, call, api, sink_of(plan.index)) for plan in prepared.plans]
    states = await run_together(runs)
    call.cached_tokens = states[0].cached_tokens
    return states
