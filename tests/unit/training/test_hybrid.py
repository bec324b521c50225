"""The hybrid's training model: the delta rule against its recurrence, and the whole against transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from training.embedded.delta import gated_delta_rule, unit
from training.embedded.hybrid import Hybrid, HybridConfig
from training.embedded.models import load_exported, published

TINY = HybridConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    intermediate_size=48, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                    linear_value_head_dim=16, max_position_embeddings=256)  # fmt: skip
EQUAL_HEADS = replace(TINY, linear_num_key_heads=4)


def disturbed(config: HybridConfig) -> Hybrid:
    """A model in which no weight is nought, so that every part of it shows in the logits."""
    model, generator = Hybrid(config), torch.Generator().manual_seed(3)
    model.initialise(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The delta rule position by position."""
    state, out = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype), []
    for at in range(q.shape[1]):
        state = state * g[:, at, :, None, None].exp()
        read = torch.einsum("bhkv,bhk->bhv", state, k[:, at])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, at], beta[:, at, :, None] * (v[:, at] - read))
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, at] * q.shape[-1] ** -0.5))
    return torch.stack(out, 1)


@pytest.mark.parametrize("length", [16, 37])
def test_the_chunked_delta_rule_is_the_recurrent_one_with_its_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(2, length, *shape, generator=generator, dtype=torch.float64)

    inputs = [unit(drawn(3, 8)), unit(drawn(3, 8)), drawn(3, 4), -drawn(3).square(), drawn(3).sigmoid()]
    here = [x.clone().requires_grad_() for x in inputs]
    there = [x.clone().requires_grad_() for x in inputs]
    chunked, plain = gated_delta_rule(*here, chunk=8), recurrent(*there)
    torch.testing.assert_close(chunked, plain)
    (chunked.square().sum()).backward()  # type: ignore[no-untyped-call]
    (plain.square().sum()).backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("config", [TINY, EQUAL_HEADS], ids=["grouped", "equal"])
def test_an_exported_hybrid_gives_the_logits_of_transformers(config: HybridConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = disturbed(config)
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(published(config)))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 64, (2, 150), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, found, loaded = other(tokens).logits, model(tokens), load_exported(tmp_path)(tokens)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(found, loaded)
    assert expected.abs().max() > 0.5
