"""The embedded model recalls from its context, and only from there: one wrong KV block breaks it sharply.

That is what it is for: tests of state run on behaviour, not on perplexity.
"""

import asyncio
import random
from collections.abc import Iterator

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


def conversations(count: int) -> list[tuple[str, list[int], list[int]]]:
    """Passkeys, the conversation that ends by asking for each, and the tokens up to where it was told."""

    async def encode(prompting: FolderPrompting) -> list[tuple[str, list[int], list[int]]]:
        await prompting.start()
        found = []
        rng = random.Random(4)
        for _ in range(count):
            key = str(rng.randint(10_000, 99_999))
            told = [ChatMessage("user", f"The pass key is {key}. Remember it.")]
            messages = [*told, ChatMessage("assistant", f"I will remember that the pass key is {key}.")]
            start = await prompting.encode_chat(messages, add_generation_prompt=False)
            for question, answer in FILLER:
                messages += [ChatMessage("user", question), ChatMessage("assistant", answer)]
            messages.append(ChatMessage("user", "What is the pass key?"))
            found.append((key, await prompting.encode_chat(messages), start))
        await prompting.close()
        return found

    prompting = open_prompting(Settings().model_folder, PromptingSettings(), SystemClock())
    return asyncio.run(encode(prompting))


def answers(runner: TorchRunner, *, damage: bool) -> int:
    """How many of the passkeys are told back, with the blocks that hold the key zeroed or not."""
    prompting = open_prompting(Settings().model_folder, PromptingSettings(), SystemClock())
    right = 0
    for key, prompt, told in conversations(TRIES):
        size = runner.info.block_tokens
        blocks = list(range(-(-(len(prompt) + 24) // size)))
        request = Request("r", prompt, blocks, greedy())
        first = request.slice(len(prompt) - 8)
        request.take(first, runner.execute(Batch([first])).result().slices[0])
        if damage:
            for block in blocks[: -(-len(told) // size)]:
                runner.write_block(block, bytes(runner.info.block_bytes))
        generate(runner, [request], 16)
        text = b"".join(prompting.token_bytes(token) for token in request.output).decode(errors="replace")
        right += key in text
    return right


def test_passkeys_are_recalled_and_one_wiped_passage_breaks_it(runner: TorchRunner) -> None:
    assert answers(runner, damage=False) >= TRIES - 1
    assert answers(runner, damage=True) <= 1
