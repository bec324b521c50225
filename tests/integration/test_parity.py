"""Greedy tokens equal transformers' (fp32): every family, head layout and rope scaling that is served."""

from pathlib import Path

import pytest
import torch
from tests.support.tiny_models import MODELS, Request, generate, greedy, make_model, open_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

EPSILON = 1e-4
EMBEDDED = Path(__file__).parents[2] / "src/isthmus/data/embedded"


@torch.inference_mode()
def agreed(model: PreTrainedModel, prompt: list[int], output: list[int]) -> int:
    """How many of `output` agree before a tie; fails on a difference that is none.

    One forward over prompt and output gives transformers' choice at every position.
    """
    logits = model(torch.tensor([prompt + output])).logits[0].float()
    for index, token in enumerate(output):
        row = logits[len(prompt) + index - 1]
        best = row.topk(2)
        if int(best.indices[0]) != token:
            assert float(best.values[0] - best.values[1]) <= EPSILON, f"differs at output {index}"
            return index
    return len(output)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, name)
    runner = open_tiny(tmp_path)
    generator = torch.Generator().manual_seed(1)
    requests = []
    for index, length in enumerate((1, 5, 17, 40)):
        prompt = torch.randint(0, 131, (length,), generator=generator).tolist()
        requests.append(Request(str(index), prompt, range(index * 8, index * 8 + 8), greedy()))
    generate(runner, requests, 48, chunks=[1 << 30, 2, 7, 24])
    runner.close()
    assert sum(agreed(model, request.prompt, request.output) for request in requests) >= 150


def test_parity_notices_a_wrong_model(tmp_path: Path) -> None:
    """The comparison can fail: another rope base gives other tokens."""
    make_model(tmp_path / "a", "llama-default")
    other = make_model(tmp_path / "b", "llama-linear")
    runner = open_tiny(tmp_path / "a")
    request = Request("r", list(range(40)), range(8), greedy())
    generate(runner, [request], 40)
    runner.close()
    with pytest.raises(AssertionError, match="differs at output"):
        agreed(other, request.prompt, request.output)


def test_dynamic_ntk_matches_token_by_token_decoding_beyond_the_original_length(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama-dynamic")
    runner = open_tiny(tmp_path)
    prompt = torch.randint(0, 131, (250,), generator=torch.Generator().manual_seed(2)).tolist()
    request = Request("r", prompt, range(20), greedy())
    generate(runner, [request], 24)
    runner.close()
    cache, tokens, theirs = None, torch.tensor([request.prompt]), []
    with torch.inference_mode():
        for _ in range(24):
            step = model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = step.past_key_values, step.logits[:, -1:].argmax(-1)
            theirs.append(int(tokens))
    assert theirs == request.output


def test_embedded_model_equals_transformers() -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    runner = open_tiny(EMBEDDED, kv_bytes=1 << 26)
    generator = torch.Generator().manual_seed(3)
    requests = [
        Request(
            str(i),
            torch.randint(0, 8192, (8 + 9 * i,), generator=generator).tolist(),
            range(9 * i, 9 * i + 9),
            greedy(),
        )
        for i in range(4)
    ]
    generate(runner, requests, 48)
    runner.close()
    assert sum(agreed(model, request.prompt, request.output) for request in requests) >= 48
