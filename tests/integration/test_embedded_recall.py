"""The embedded model recalls from its context, and only from there: one wrong KV block breaks it sharply.

That is what it is for: tests of state run on behaviour, not on perplexity.
"""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.support.tiny_models import Request, generate, greedy, open_tiny

from isthmus.config import Settings
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.prompting import ChatMessage
from isthmus.execution.inference.batch import Batch
from isthmus.execution.inference.runner import TorchRunner
from isthmus.execution.prompting.service import FolderPrompting, PromptingSettings, open_prompting

TRIES = 12
FILLER = [
    ("What can you do?", "I can hold a short conversation, remember what you tell me, and answer simple questions."),
    ("I am tired today.", "I am sorry to hear that. I hope you feel better soon."),
    ("Thank you!", "You are welcome. Is there anything else?"),
]


@pytest.fixture(scope="module")
def runner() -> Iterator[TorchRunner]:
    made = open_tiny(Settings().model_folder, kv_bytes=1 << 25)
    yield made
    made.close()


@dataclass(frozen=True)
class Told:
    """A conversation that tells a passkey and ends by asking for it, and the one block that holds all its digits."""

    key: str
    prompt: list[int]
    block: int


def conversations(count: int, block_tokens: int) -> list[Told]:
    """Conversations of one shape and different passkeys."""

    async def tell(prompting: FolderPrompting, key: str, opening: str) -> Told | None:
        messages = [
            ChatMessage("user", f"{opening}The pass key is {key}. Remember it."),
            ChatMessage("assistant", "I will remember that."),
        ]
        for question, answer in FILLER:
            messages += [ChatMessage("user", question), ChatMessage("assistant", answer)]
        prompt = await prompting.encode_chat([*messages, ChatMessage("user", "What is the pass key?")])
        first = next(at for at in range(len(prompt)) if text(prompting, prompt[at : at + len(key)]) == key)
        block = first // block_tokens
        return Told(key, prompt, block) if (first + len(key) - 1) // block_tokens == block else None

    async def encode(prompting: FolderPrompting) -> list[Told]:
        await prompting.start()
        rng = random.Random(4)
        openings = ["", "Hello! ", "Please listen to me now. ", "Good morning to you. I have something to tell. "]
        made = []
        for _ in range(count):
            key = str(rng.randint(10_000, 99_999))
            # The digits may lie across two blocks; a longer opening moves them into one.
            tries = [await tell(prompting, key, opening) for opening in openings]
            made.append(next(told for told in tries if told is not None))
        await prompting.close()
        return made

    prompting = open_prompting(Settings().model_folder, PromptingSettings(), SystemClock())
    return asyncio.run(encode(prompting))


def text(prompting: FolderPrompting, tokens: list[int]) -> str:
    return b"".join(prompting.token_bytes(token) for token in tokens).decode(errors="replace")


def answers(runner: TorchRunner, damage: str) -> int:
    """How many of the passkeys are told back, the one block that holds each left alone, zeroed, or swapped.

    Swapped: it holds the state of the same place of the conversation before, which told another passkey.
    """
    prompting = open_prompting(Settings().model_folder, PromptingSettings(), SystemClock())
    right, other = 0, b""
    size = runner.info.block_tokens
    cases = conversations(TRIES + 1, size)
    for number, told in enumerate(cases):
        blocks = list(range(-(-(len(told.prompt) + 24) // size)))
        request = Request("r", told.prompt, blocks, greedy())
        first = request.slice(len(told.prompt) - 8)
        request.take(first, runner.execute(Batch([first])).result().slices[0])
        own = runner.read_block(told.block)
        if damage == "zeroed":
            runner.write_block(told.block, bytes(runner.info.block_bytes))
        elif damage == "swapped" and number:
            runner.write_block(told.block, other)
        other = own
        generate(runner, [request], 16)
        right += number > 0 and told.key in text(prompting, request.output)
    return right


def test_passkeys_are_recalled_and_one_wrong_block_breaks_it(runner: TorchRunner) -> None:
    assert answers(runner, "none") >= TRIES - 1
    assert answers(runner, "zeroed") <= 1
    assert answers(runner, "swapped") <= 1
