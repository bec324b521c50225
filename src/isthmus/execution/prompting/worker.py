"""The helper process: renders chat templates and tokenises, one request at a time, under limits of its own.

Started by the pool as `python -m isthmus.execution.prompting.worker FD MEMORY_BYTES`, FD being an inherited socket.
It answers every frame with one frame and ends when the socket does. Promise: whatever a template or a text does, this
process uses at most the CPU time and memory that its limits name, writes no file and leaves no core dump; its parent
survives it.
"""

import os
import socket
from array import array
from collections.abc import Callable

from tokenizers import Tokenizer, normalizers

from isthmus.contracts.errors import InvalidInput, IsthmusError, ModelInvalid, TooLarge, Unsupported
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.confined import allow_cpu, confine, error_info, questions, serve_helper
from isthmus.execution.prompting.conversation import GUARD
from isthmus.execution.prompting.messages import (
    Answer,
    Encode,
    Loaded,
    Question,
    Refused,
    Render,
    Setup,
    TokenIds,
)
from isthmus.execution.prompting.template import ChatTemplate


class _LibraryErrors:
    """A context that translates what the tokenizers library raises: `ValueError`, or `Exception` itself."""

    def __init__(self, translate: Callable[[BaseException], IsthmusError]) -> None:
        self._translate = translate

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and (kind is Exception or isinstance(error, ValueError)):
            raise self._translate(error) from error


class Helper:
    """What a helper does, apart from its socket. Raises `ModelInvalid` when the set-up cannot be loaded."""

    def __init__(self, setup: Setup) -> None:
        self._limits = setup.limits
        with _LibraryErrors(lambda error: ModelInvalid(f"tokenizer.json is not accepted by tokenizers: {error}")):
            tokenizer = Tokenizer.from_buffer(setup.tokenizer)
        # Both are settings of training that some folders still carry; serving must see every token.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = None
        if setup.template is not None:
            added = tokenizer.get_added_tokens_decoder().values()
            special = [token.content for token in added if token.special]
            self._template = ChatTemplate(setup.template, setup.specials, setup.limits.output_chars, special)

    def answer(self, question: Render | Encode) -> TokenIds:
        """The token ids asked for. Raises errors of the tree."""
        if isinstance(question, Render):
            if self._template is None:
                raise Unsupported("the model has no chat template: use /v1/completions", "messages")
            text = self._template.render(question.messages, question.options, now=question.now)
            if GUARD in text:
                return self._encode_guarded(text)
            return self._encode(text, add_special_tokens=False)
        return self._encode(question.text, add_special_tokens=question.add_special_tokens)

    def _encode_guarded(self, text: str) -> TokenIds:
        """Tokenise with the guards in `text` dropped after special tokens were looked for: normalisers run then."""
        usual = self._tokenizer.normalizer
        drop = normalizers.Replace(GUARD, "")
        self._tokenizer.normalizer = drop if usual is None else normalizers.Sequence([drop, usual])
        try:
            return self._encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.normalizer = usual

    def _encode(self, text: str, *, add_special_tokens: bool) -> TokenIds:
        try:
            with _LibraryErrors(lambda _: InvalidInput("the text cannot be tokenised", "prompt")):
                ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except MemoryError as error:
            raise TooLarge("the text needs too much memory to tokenise", "prompt") from error
        if len(ids) > self._limits.tokens:
            raise TooLarge(f"the prompt has {len(ids)} tokens, limit {self._limits.tokens}", "prompt")
        return TokenIds(array("I", ids).tobytes())


def run(connection: socket.socket, memory_bytes: int) -> None:
    """Serve `connection` until it ends."""
    confine(memory_bytes)
    asked = questions(connection, FrameReader[Question](Question))
    setup = next(asked, None)
    if not isinstance(setup, Setup):
        return
    try:
        helper = Helper(setup)
    except IsthmusError as error:
        connection.sendall(encode_frame(Refused(error_info(error))))
        return
    # From here on a panic of the tokenizer could print prompt text: nobody must read it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    connection.sendall(encode_frame(Loaded()))
    for question in asked:
        if isinstance(question, Setup):
            return
        allow_cpu(setup.limits.cpu_s)
        answer: Answer
        try:
            answer = helper.answer(question)
        except IsthmusError as error:
            answer = Refused(error_info(error))
        connection.sendall(encode_frame(answer))


if __name__ == "__main__":
    serve_helper(run)
