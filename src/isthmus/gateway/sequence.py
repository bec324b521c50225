"""Runs one engine request for a client: tokens in, text out, and an end that is always accounted for.

Promises kept here: whatever ends the wait (a finish, a stop string, an error, a deadline, a client that went away, also
before the first token) the engine request ends with it, by the end of the running step; and exactly one lineage fact is
recorded for it.
"""

import asyncio
import codecs
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from isthmus.contracts.blocks import namespace_id
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import DeadlineExceeded, EngineFailed, InvalidInput, IsthmusError
from isthmus.contracts.events import Finish, ModelInfo, RequestOutput, TokenLogprob
from isthmus.contracts.ids import Namespace
from isthmus.contracts.journal import LineageFact
from isthmus.contracts.ports import Engine, Lineage, Prompting
from isthmus.contracts.prompting import Piece
from isthmus.contracts.telemetry import Count, Metrics
from isthmus.gateway.context import Call
from isthmus.gateway.errors import CLIENT_CLOSED_STATUS, from_wire, to_http
from isthmus.gateway.outgoing import Disconnected
from isthmus.gateway.parts import parts_of
from isthmus.gateway.plan import SequencePlan


@dataclass(slots=True)
class Delta:
    """What one step added to a sequence. The last has OpenAI's reason as `finish`; `stopped`: a stop string was met,
    which is `stop`.

    `parts` are what was added in order, where it is more than text: each part is reasoning, text or one call's next
    part. `text` is all of the text, with or without parts.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish: str | None = None
    stopped: bool = False
    parts: tuple[Piece, ...] = ()
    stop: str = ""


Sink = Callable[[Delta], Awaitable[None]]


@dataclass(slots=True)
class SequenceState:
    """What is known of a sequence so far; read for usage when it ended."""

    prompt_tokens: int
    cached_tokens: int = 0
    output_tokens: int = 0
    last: RequestOutput | None = None
    first_at: float | None = None
    last_at: float | None = None
    finish: str = ""
    outcome: str = ""
    status: int = 200
    error: str = ""
    ended: bool = False
    """Whether the engine itself said that the request is over."""


@dataclass(frozen=True, slots=True)
class SequenceRunner:
    """Runs sequences against one engine. `api` names the route in lineage."""

    engine: Engine
    info: ModelInfo
    prompting: Prompting
    lineage: Lineage
    metrics: Metrics
    clock: Clock

    async def run(self, plan: SequencePlan, call: Call, api: str, sink: Sink) -> SequenceState:
        """Run `plan`, giving `sink` what each step added. Raises the tree's errors and what `sink` raises."""
        state = SequenceState(len(plan.request.prompt_ids))
        outputs = self.engine.submit(plan.request)
        try:
            await self._consume(outputs, plan, call, state, sink)
        except IsthmusError as error:
            http = to_http(error)
            state.status, state.error = http.status, http.code
            state.outcome = state.outcome or _outcome(error)
            if isinstance(error, InvalidInput) and error.field == "constraint" and plan.form.field:
                # The client demanded a form in a field of its own dialect and knows no constraint.
                raise type(error)(str(error), plan.form.field) from None
            raise
        except Disconnected:
            state.outcome, state.status = "disconnected", CLIENT_CLOSED_STATUS
            raise
        except asyncio.CancelledError:
            self._cut_off(call, state)
            raise
        finally:
            self._end(plan, state)
            call.output_tokens += state.output_tokens
            call.finishes.add(state.outcome or "error")
            self._record(plan, call, api, state)
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()
        return state

    def _cut_off(self, call: Call, state: SequenceState) -> None:
        """The wait for this sequence was ended from outside: by its client, its deadline, or a sibling's failure."""
        if call.exchange.disconnected:
            state.outcome, state.status = "disconnected", CLIENT_CLOSED_STATUS
        elif call.expired(self.clock):
            state.outcome, state.status = "deadline", 504
        else:
            state.outcome, state.status = "cancelled", 503

    def _end(self, plan: SequencePlan, state: SequenceState) -> None:
        """End the engine request, unless the engine has ended it itself. Safe to call twice."""
        if not state.ended:
            state.ended = True
            self.engine.abort(plan.request.request_id)
            self.metrics.count(_abort_cause(state))

    async def _consume(
        self, outputs: AsyncIterator[RequestOutput], plan: SequencePlan, call: Call, state: SequenceState, sink: Sink
    ) -> None:
        assembler = self.prompting.assembler(plan.text, plan.form.parse)
        async for output in outputs:
            self._observe(output, call, state)
            if output.finish is not None:
                state.ended = True
                state.outcome = output.finish.value
                _raise_failure(output)
            ids, logprobs = _text_tokens(output)
            pieces, used, stopped = [], 0, False
            for token in ids:
                piece = assembler.feed((token,))
                used += 1
                pieces.append(piece)
                if piece.stopped:
                    stopped = True
                    break
            state.output_tokens += used + (1 if output.stop_token and not stopped else 0)
            delta = Delta(plan.index, "", list(ids[:used]), None if logprobs is None else logprobs[:used])
            if output.finish is not None and not stopped:
                piece = assembler.finish()
                pieces.append(piece)
                stopped = piece.stopped
            delta.text, delta.parts = "".join(piece.text for piece in pieces), parts_of(pieces)
            if stopped:
                delta.finish = state.outcome = Finish.STOP.value
                delta.stopped, delta.stop = True, piece.stop
            elif output.finish is not None:
                delta.finish = "length" if output.finish is Finish.LENGTH else "stop"
            if delta.finish is not None:
                state.finish = delta.finish
                # After a stop string the engine is told before the client, so that no step is wasted.
                self._end(plan, state)
            await sink(delta)
            if delta.finish is not None:
                return
        raise EngineFailed("the engine ended a request without a finish")

    def _observe(self, output: RequestOutput, call: Call, state: SequenceState) -> None:
        """Times and counts of one output."""
        state.last = output
        if output.cached_tokens is not None:
            state.cached_tokens = output.cached_tokens
        if not output.token_ids:
            return
        now = self.clock.monotonic()
        if state.last_at is None:
            state.first_at = now
            seconds = now - call.received_at
            if call.first_token_s is None:
                call.first_token_s = seconds
            self.metrics.first_token(seconds)
        else:
            self.metrics.inter_token(now - state.last_at, len(output.token_ids))
        state.last_at = now

    def _record(self, plan: SequencePlan, call: Call, api: str, state: SequenceState) -> None:
        """Hand over the lineage fact of this sequence."""
        request, info = plan.request, self.info
        timing = state.last.timing if state.last is not None else None
        digest = state.last.logits_digest if state.last is not None else None
        total = self.clock.monotonic() - call.received_at
        fact = LineageFact(
            request_id=request.request_id,
            api=api,
            model=info.name,
            namespace_id=namespace_id(request.scope.namespace).hex()[:16],
            weights=info.weights.hex(),
            prompt_hash=prompt_hash(request.scope.namespace, request.prompt_ids),
            prompt_tokens=state.prompt_tokens,
            cached_tokens=state.cached_tokens,
            cached_blocks=state.cached_tokens // info.block_tokens,
            output_tokens=state.output_tokens,
            outcome=state.outcome or "error",
            status=state.status,
            received_at=call.exchange.request.received_wall,
            queue_s=timing.queue_s if timing else 0.0,
            prefill_s=timing.prefill_s if timing else (state.first_at or call.received_at) - call.received_at,
            decode_s=timing.decode_s if timing else (state.last_at or 0.0) - (state.first_at or 0.0),
            total_s=total,
            preemptions=timing.preemptions if timing else 0,
            seed=request.sampling.seed,
            traceparent=call.traceparent,
            logits_digest=digest.hex() if digest else "",
            error=state.error,
            reuse=state.last.reuse if state.last is not None else None,
        )
        self.lineage.record(fact)
        self.metrics.sequence_ended(fact)


def _text_tokens(output: RequestOutput) -> tuple[Sequence[int], list[TokenLogprob] | None]:
    """The tokens of `output` that are part of the text, with their log probabilities."""
    if output.stop_token and output.token_ids:
        logprobs = None if output.logprobs is None else output.logprobs[: len(output.token_ids) - 1]
        return output.token_ids[:-1], logprobs
    return output.token_ids, output.logprobs


def _raise_failure(output: RequestOutput) -> None:
    """Raise what `output` says went wrong, if it does."""
    if output.finish in {Finish.REJECTED, Finish.ERROR}:
        raise from_wire(output.error) if output.error is not None else EngineFailed("the engine gave no reason")
    if output.finish is Finish.DEADLINE:
        raise DeadlineExceeded("the deadline of this request passed")
    if output.finish is Finish.ABORT:
        raise EngineFailed("the engine aborted this request")


def _outcome(error: IsthmusError) -> str:
    """The outcome of a sequence that `error` ended before the engine said more."""
    if isinstance(error, DeadlineExceeded):
        return Finish.DEADLINE.value
    return Finish.ERROR.value if isinstance(error, EngineFailed) else Finish.REJECTED.value


def _abort_cause(state: SequenceState) -> Count:
    """Why a sequence was aborted, for the count."""
    causes = {
        "stop": Count.ABORT_STOP_STRING,
        "deadline": Count.ABORT_DEADLINE,
        "disconnected": Count.ABORT_DISCONNECT,
    }
    return causes.get(state.outcome, Count.ABORT_ERROR)


async def run_together(jobs: Sequence[Awaitable[SequenceState]]) -> list[SequenceState]:
    """Run the sequences of one request side by side. The first failure ends the others and is raised."""
    if len(jobs) == 1:
        return [await jobs[0]]
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def prompt_hash(namespace: Namespace, token_ids: Sequence[int]) -> str:
    """BLAKE3 over the token ids as unsigned 32-bit little-endian integers, keyed by the namespace; hex."""
    return blake3(array("I", token_ids).tobytes(), key=namespace).hexdigest()


@dataclass(slots=True)
class TextOffsets:
    """Character offsets of tokens in a text (the legacy completions shape), also where characters span tokens."""

    position: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def next(self, token_bytes: bytes) -> int:
        """The offset at which the next token starts."""
        start = self.position
        self.position += len(self._decoder.decode(token_bytes))
        return start
