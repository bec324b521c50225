"""What comes back from each tier of a real store is what left the device, for every family and dtype.

- bytes: every block's record is the same bit for bit;
- exact mode: tokens and logits are those of the run that never lost its state, and of the cold run, bit for bit;
- default mode, in both dtypes: a conversation's tokens are those of the run that never lost its state;
- the embedded model recalls what it was told before its state went to disk.
"""

from pathlib import Path

import pytest
from tests.support.passkeys import Told, conversations, text
from tests.support.requests import make_request
from tests.support.sites import PROMPT, RemoteSite
from tests.support.tiny_models import make_model, open_tiny

from isthmus.config import Settings
from isthmus.contracts.blocks import Tier
from isthmus.contracts.clock import SystemClock
from isthmus.execution.prompting.service import PromptingSettings, open_prompting

FAMILIES = ("llama-odd-heads", "qwen2", "qwen3", "mistral", "qwen3-moe", "qwen3-next")
MODES = {"f32": {"dtype": "f32"}, "bf16": {"dtype": "bf16"}, "exact": {"exact": True}}
TURNS = ([7, 8, 9, 10, 11], [12, 13])


def push_out(site: RemoteSite, tier: Tier) -> None:
    """Nothing is left in the tiers above `tier`."""
    if tier is Tier.NVME:
        site.only_on_disk()
    else:
        site.push_out()


def talk(site: RemoteSite, name: str, away: Tier | None) -> tuple[list[int], list[bytes | None]]:
    """The tokens and digests of a conversation of three turns, whose state goes `away` between them."""
    text, tokens, digests = list(PROMPT), [], []
    for turn, more in enumerate(([], *TURNS)):
        text += more
        if turn and away is not None:
            push_out(site, away)
        last = site.run(make_request(f"{name}{turn}", text, 8))[f"{name}{turn}"]
        if turn:
            assert last.reuse is not None
            assert getattr(last.reuse, (away or Tier.DEVICE).value) >= 96
        tokens += site.tokens[f"{name}{turn}"]
        digests.append(last.logits_digest)
        text += site.tokens[f"{name}{turn}"]
    return tokens, digests


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_as_if_nothing_had_left(tmp_path: Path, family: str, mode: str) -> None:
    make_model(tmp_path / "model", family)
    runner = open_tiny(tmp_path / "model", **MODES[mode])
    site = RemoteSite(runner, tmp_path)
    cold = talk(site, "cold", None)
    # All that the next one reuses is on the device: what is computed is cut as when it comes from a tier.
    stayed = talk(site, "stayed", None)
    assert mode != "exact" or stayed == cold
    for tier in (Tier.DRAM, Tier.NVME):
        push_out(site, tier)
        tree = site.core._scheduler._tree
        assert talk(site, tier.value, tier) == stayed
        assert (mode == "exact") == all(stayed[1])
        before = {node.key: runner.read_block(node.block) for node in tree._nodes.values()}
        push_out(site, tier)
        for block in range(runner.info.blocks):
            runner.write_block(block, b"\x7f" * runner.info.block_bytes)
        site.run(make_request(f"again-{tier.value}", [*PROMPT, *stayed[0][:8], *TURNS[0]], 2))
        after = {node.key: runner.read_block(node.block) for node in tree._nodes.values()}
        shared = before.keys() & after.keys()
        assert len(shared) >= 6
        assert all(before[key] == after[key] for key in shared)
    site.settle()
    site.close()
    runner.close()


def told(prompt: Told, output: list[int]) -> bool:
    prompting = open_prompting(Settings().model_folder, PromptingSettings(), SystemClock())
    return prompt.key in text(prompting, output)


def test_the_embedded_model_recalls_what_went_to_disk(tmp_path: Path) -> None:
    runner = open_tiny(Settings().model_folder, kv_bytes=1 << 25)
    site = RemoteSite(runner, tmp_path)
    recalled = 0
    cases = conversations(6, runner.info.block_tokens)
    for number, one in enumerate(cases):
        kept = site.run(make_request(f"kept{number}", one.prompt, 16))
        assert kept
        site.only_on_disk()
        back = site.run(make_request(f"back{number}", one.prompt, 16))[f"back{number}"]
        assert back.reuse is not None
        assert back.reuse.nvme > 16 * one.block
        assert site.tokens[f"back{number}"]
        recalled += told(one, site.tokens[f"back{number}"])
    assert recalled >= len(cases) - 1
    site.close()
    runner.close()
