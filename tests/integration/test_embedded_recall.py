"""The embedded model recalls from its context, and only from there: one wrong KV block breaks it sharply.

That is what it is for: tests of state run on behaviour, not on perplexity.
"""

from collections.abc import Iterator

import pytest
from tests.support.passkeys import conversations, text
from tests.support.tiny_models import Request, generate, greedy, open_tiny

from isthmus.config import Settings
from isthmus.contracts.clock import SystemClock
from isthmus.execution.inference.batch import Batch
from isthmus.execution.inference.runner import TorchRunner
from isthmus.execution.prompting.service import PromptingSettings, open_prompting

TRIES = 12


@pytest.fixture(scope="module")
def runner() -> Iterator[TorchRunner]:
    made = open_tiny(Settings().model_folder, kv_bytes=1 << 25)
    yield made
    made.close()


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
