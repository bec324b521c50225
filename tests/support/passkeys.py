"""Conversations with the embedded model that tell a passkey and ask for it later."""

import asyncio
import random
from dataclasses import dataclass

from isthmus.config import Settings
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.prompting import ChatMessage
from isthmus.execution.prompting.service import FolderPrompting, PromptingSettings, open_prompting

FILLER = [
    ("What can you do?", "I can hold a short conversation, remember what you tell me, and answer simple questions."),
    ("I am tired today.", "I am sorry to hear that. I hope you feel better soon."),
    ("Thank you!", "You are welcome. Is there anything else?"),
]


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
