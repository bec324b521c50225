"""The grammar process: compiles constraints and computes masks, under limits of its own.

Started by the engine as `python -m isthmus.execution.inference.grammar.worker FD MEMORY_BYTES`, FD being an inherited
socket. Two threads: one compiles (`Open`), one follows (`Advance`, `Close`), so that a slow compilation does not hold
up running outputs; llguidance releases the interpreter for the work that is long. Promise: masks are a function of the
constraint and the tokens alone; whatever a constraint does, this process keeps its limits of memory and CPU time,
writes no file and leaves no core dump; it ends when its socket does.
"""

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from llguidance import LLMatcher

from isthmus.contracts.clock import SystemClock
from isthmus.contracts.constraints import Constraint
from isthmus.contracts.errors import InvalidInput, IsthmusError, Unsupported
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.confined import allow_cpu, confine, error_info, questions, serve_helper
from isthmus.execution.inference.grammar.compiler import FIELD, check, compile_constraint
from isthmus.execution.inference.grammar.messages import (
    Advance,
    Answer,
    Close,
    Loaded,
    Masks,
    Open,
    Question,
    Refused,
    Setup,
    Step,
    Stepped,
)
from isthmus.execution.inference.grammar.tokens import load_tokenizer

MAX_TOKENIZER_BYTES = 48 * 1024 * 1024
COMPILE_STACK_BYTES = 64 * 1024 * 1024
FLUSH_S = 0.02
"""An `Advance` that has run for so long sends what it has."""
FLUSH_BYTES = 8 * 1024 * 1024


class Grammars:
    """The sessions of the process. `open` runs on one thread, everything else on another."""

    def __init__(self, setup: Setup) -> None:
        self._tokenizer = load_tokenizer(_read(Path(setup.tokenizer)), setup.vocab_size, setup.eos_token_ids)
        self._ends = frozenset(setup.eos_token_ids)
        self._mask_bytes = -(-setup.vocab_size // 32) * 4
        self._matchers: dict[int, LLMatcher] = {}

    def open(self, question: Open) -> Masks:
        """Raises `InvalidInput` and its kinds."""
        matcher = compile_constraint(self._tokenizer, Constraint(question.kind, question.text))
        if question.output_ids and not matcher.consume_tokens(question.output_ids):
            raise InvalidInput("the output so far does not fit the constraint", FIELD)
        masks = self._look(question.session, matcher, question.guesses, question.limit)
        if not masks.lost:
            self._matchers[question.session] = matcher
        return masks

    def step(self, step: Step) -> Masks:
        """Raises `InvalidInput` and its kinds; the session is then forgotten."""
        matcher = self._matchers.pop(step.session, None)
        if matcher is None:
            raise InvalidInput("the grammar process has no such session", FIELD)
        if not matcher.consume_tokens(step.token_ids):
            check(matcher)
            raise InvalidInput("the output left the constraint", FIELD)
        masks = self._look(step.session, matcher, step.guesses, step.limit)
        if not masks.lost:
            self._matchers[step.session] = matcher
        return masks

    def close(self, session: int) -> None:
        """Forget a session."""
        self._matchers.pop(session, None)

    def _look(self, session: int, matcher: LLMatcher, guesses: list[int], limit: int) -> Masks:
        """The next mask; and drafts, what the grammar forces before what was guessed, each with the mask after it."""
        masks = [self._mask(matcher)]
        if limit == 0 or matcher.is_stopped():
            return Masks(session, [], masks)
        wanted = (matcher.compute_ff_tokens() or guesses)[:limit]
        ends = [place for place, token in enumerate(wanted) if token in self._ends]
        wanted = wanted[: ends[0]] if ends else wanted
        drafts = wanted[: matcher.validate_tokens(wanted)] if wanted else []
        for place, token in enumerate(drafts):
            try:
                if not matcher.consume_token(token):
                    check(matcher)
                masks.append(self._mask(matcher))
            except InvalidInput:
                # A limit was met on a path that the output may never take: the path counts, not the look ahead.
                return Masks(session, drafts[:place], masks, lost=True)
        if drafts and not matcher.rollback(len(drafts)):
            return Masks(session, drafts, masks, lost=True)
        return Masks(session, drafts, masks)

    def _mask(self, matcher: LLMatcher) -> bytes:
        mask = matcher.compute_bitmask()
        check(matcher)
        if not any(mask):
            raise InvalidInput("no token continues the output within the constraint", FIELD)
        return mask[: self._mask_bytes]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise Unsupported(f"{path.name} of this model cannot be read: {error.strerror}", FIELD) from error
    if len(data) > MAX_TOKENIZER_BYTES:
        raise Unsupported(f"{path.name} of this model is over {MAX_TOKENIZER_BYTES} bytes", FIELD)
    return data


class Server:
    """Answers the questions of one connection."""

    def __init__(self, connection: socket.socket, grammars: Grammars, bound: Callable[[], None]) -> None:
        self._connection = connection
        self._grammars = grammars
        self._bound = bound
        self._sending = threading.Lock()
        self._clock = SystemClock()
        self._opens: queue.Queue[Open] = queue.Queue(1)  # one is unanswered at a time

    def run(self, questions: Iterator[Question]) -> None:
        """Until the questions end."""
        threading.stack_size(COMPILE_STACK_BYTES)
        threading.Thread(target=self._compile, daemon=True).start()
        for question in questions:
            self._bound()
            match question:
                case Open():
                    self._opens.put(question)
                case Advance():
                    self._advance(question)
                case Close():
                    for session in question.sessions:
                        self._grammars.close(session)
                case Setup():
                    return

    def _compile(self) -> None:
        finished = False
        try:
            while True:
                question = self._opens.get()
                try:
                    self._send(Stepped([self._grammars.open(question)]))
                except IsthmusError as error:
                    self._send(refused(question.session, error))
                except OSError:
                    finished = True
                    return
        finally:
            if not finished:
                # A panic of the library or no memory: nothing can be trusted any more. The engine starts anew.
                os._exit(70)

    def _advance(self, question: Advance) -> None:
        parts: list[Masks] = []
        size, since = 0, self._clock.monotonic()
        for step in question.steps:
            try:
                part = self._grammars.step(step)
            except IsthmusError as error:
                self._send(refused(step.session, error))
                continue
            parts.append(part)
            size += sum(map(len, part.masks))
            if size >= FLUSH_BYTES or self._clock.monotonic() - since >= FLUSH_S:
                self._send(Stepped(parts))
                parts, size, since = [], 0, self._clock.monotonic()
        if parts:
            self._send(Stepped(parts))

    def _send(self, answer: Answer) -> None:
        with self._sending:
            self._connection.sendall(encode_frame(answer))


def refused(session: int, error: IsthmusError) -> Refused:
    """`error` in wire form."""
    return Refused(session, error_info(error))


def run(connection: socket.socket, memory_bytes: int) -> None:
    """Serve `connection` until it ends."""
    confine(memory_bytes + COMPILE_STACK_BYTES)
    asked = questions(connection, FrameReader[Question](Question))
    setup = next(asked, None)
    if not isinstance(setup, Setup):
        return
    # A panic of the library could print parts of a constraint or an output: nobody must read it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        grammars = Grammars(setup)
    except IsthmusError as error:
        connection.sendall(encode_frame(refused(0, error)))
        return
    connection.sendall(encode_frame(Loaded()))
    Server(connection, grammars, lambda: allow_cpu(setup.cpu_s)).run(asked)


if __name__ == "__main__":
    serve_helper(run)
