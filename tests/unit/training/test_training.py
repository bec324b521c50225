"""The training scripts: checkpoints resume exactly, the loss falls, schedules end at zero, exports are whole."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from training.embedded import checkpoint, schedule
from training.embedded.acceptance import accepted, measure
from training.embedded.export import TOKENIZER_FILES, export
from training.embedded.hybrid import HybridConfig
from training.embedded.inherit import inherit
from training.embedded.losses import Objective, choose
from training.embedded.model import ModelConfig
from training.embedded.models import KINDS, Network, build, load_exported, published
from training.embedded.optim import Optimizer
from training.embedded.schedule import hold_and_fall, read_stages, stage_at

TINY = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                   head_dim=8, intermediate_size=48, max_position_embeddings=64)  # fmt: skip
TINY_HYBRID = HybridConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                           intermediate_size=48, linear_num_key_heads=2, linear_num_value_heads=2,
                           linear_key_head_dim=8, linear_value_head_dim=16, max_position_embeddings=64)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [TINY, TINY_HYBRID], ids=["llama", "hybrid"])
FOLDER = Path(schedule.__file__).parent
EVERYWHERE = torch.arange(32), torch.ones(32)


def run(model: Network, optimizer: Optimizer, first: int, last: int) -> None:
    """Steps `first` to `last` on batches that depend on the step alone."""
    objective = Objective(model, compiled=False)
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 64, (2, 17), generator=generator)
        loss = objective(tokens[:, :-1], tokens[:, 1:], *EVERYWHERE)
        model.zero_grad()
        loss.backward()
        optimizer.step(number, 1.0)


def fresh(config: ModelConfig | HybridConfig = TINY) -> tuple[Network, Optimizer]:
    model = build(config)
    model.initialise(1)
    return model, Optimizer(model)


def exported(folder: Path, model: Network) -> Path:
    """A folder with the model's weights and shape, as far as starting from it needs them."""
    folder.mkdir()
    save_file({n: p.detach() for n, p in model.named_parameters()}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(published(model.config)))
    return folder


@CONFIGS
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(config: ModelConfig | HybridConfig, tmp_path: Path) -> None:
    whole, whole_optimizer = fresh(config)
    run(whole, whole_optimizer, 0, 6)
    part, part_optimizer = fresh(config)
    run(part, part_optimizer, 0, 3)
    checkpoint.save(tmp_path, dict(part.named_parameters()), part_optimizer.state(), {"step": 3})
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    weights, state, progress = loaded
    resumed, resumed_optimizer = fresh(config)
    resumed.load_state_dict(weights, strict=False)
    resumed_optimizer.load(state)
    run(resumed, resumed_optimizer, progress["step"], 6)
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, dict(resumed.named_parameters())[name]), name


@CONFIGS
def test_training_lowers_the_loss_of_what_it_sees(config: ModelConfig | HybridConfig) -> None:
    model, optimizer = fresh(config)
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(9))
    objective = Objective(model, compiled=False)

    def loss() -> torch.Tensor:
        return objective(tokens[:, :-1], tokens[:, 1:], *EVERYWHERE)  # type: ignore[no-any-return]

    before = loss().item()
    for number in range(30):
        model.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step(number, 1.0)
    assert loss().item() < 0.5 * before


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    model, optimizer = fresh()
    checkpoint.save(tmp_path, dict(model.named_parameters()), optimizer.state(), {"step": 1})
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert checkpoint.load(tmp_path / "absent") is None


def test_the_rate_warms_up_holds_and_ends_at_zero() -> None:
    assert hold_and_fall(0, 100, 25) < 0.1
    assert hold_and_fall(60, 100, 25) == 1.0
    assert hold_and_fall(60, 0, 25) == 0.0


@pytest.mark.parametrize("name", sorted({kind.recipe for kind in KINDS.values()} | {"recipe-first.toml"}))
def test_every_step_of_a_recipe_has_a_stage(name: str) -> None:
    stages = read_stages(FOLDER / name)
    rng = random.Random(1)
    assert stages[-1].steps == 0
    assert all(stage_at(stages, rng.randrange(10_000)) in stages for _ in range(50))
    assert all(abs(sum(stage.shares.values()) - 1) < 1e-6 for stage in stages)


def test_the_loss_is_taken_where_it_weighs_most_and_keeps_its_sum() -> None:
    rng = np.random.default_rng(3)
    weights = rng.choice(np.float32([0.0, 0.1, 1.0]), (4, 100), p=[0.2, 0.5, 0.3])
    positions, values = choose(weights, 0.5, [1, 2])
    assert len(positions) == len(values) == 200
    flat = weights.ravel()
    assert set(np.flatnonzero(flat == 1.0)) <= set(positions)
    assert np.isclose(values.sum(), flat.sum(), rtol=1e-5)
    assert np.array_equal(choose(weights, 0.5, [1, 2])[0], positions)
    assert not np.array_equal(choose(weights, 0.5, [1, 3])[0], positions)


def test_too_few_targets_are_made_up_without_weight() -> None:
    weights = np.zeros((2, 10), np.float32)
    weights[1, 4] = 2.0
    positions, values = choose(weights, 0.5, [1])
    assert len(positions) == 10
    assert values.sum() == 2.0
    assert positions[values > 0].tolist() == [14]


def test_the_chosen_loss_is_the_whole_one_where_the_rest_weighs_nothing() -> None:
    model, _ = fresh()
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(4))
    weights = np.zeros((2, 16), np.float32)
    weights[:, ::4] = 1.5
    positions, values = (torch.from_numpy(part) for part in choose(weights, 0.5, [0]))
    logits = model(tokens[:, :-1]).flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    expected = (each * torch.from_numpy(weights).flatten()).sum() / weights.sum()
    found = Objective(model, compiled=False)(tokens[:, :-1], tokens[:, 1:], positions, values)
    torch.testing.assert_close(found, expected)


def test_a_run_starts_from_weights_of_the_same_shape_and_the_hybrid_from_what_fits(tmp_path: Path) -> None:
    parent, _ = fresh(ModelConfig(**{**vars(TINY), "num_hidden_layers": 6}))
    folder = exported(tmp_path / "parent", parent)
    child = build(parent.config)
    child.initialise(2)
    assert inherit(child, folder) == len(dict(parent.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(parent.parameters(), child.parameters(), strict=True))
    hybrid, _ = fresh(TINY_HYBRID)
    assert inherit(hybrid, folder) == 2 + 4 * 4
    assert torch.equal(hybrid.model.embed_tokens.weight, parent.model.embed_tokens.weight)
    small, _ = fresh(ModelConfig(**{**vars(TINY), "hidden_size": 16}))
    assert inherit(small, folder) == 1
    gram = parent.model.embed_tokens.weight @ parent.model.embed_tokens.weight.T
    near = small.model.embed_tokens.weight @ small.model.embed_tokens.weight.T
    assert torch.corrcoef(torch.stack((gram.flatten(), near.flatten())))[0, 1] > 0.6


@pytest.mark.parametrize("name", sorted(KINDS))
def test_an_exported_model_is_read_back_with_its_shape(name: str, tmp_path: Path) -> None:
    model = build(KINDS[name].config)
    model.initialise(1)
    checkpoint.save(tmp_path / "run", dict(model.named_parameters()), {}, {"step": 5})
    tokenizer = Tokenizer(models.WordLevel({f"<|{t}|>": n for n, t in enumerate(("bos", "eos", "pad", "end"))}))
    (tmp_path / "tokenizer").mkdir()
    for file in TOKENIZER_FILES:
        (tmp_path / "tokenizer" / file).write_text("{}")
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert export(name, tmp_path / "run", tmp_path / "tokenizer", tmp_path / "out")["step"] == 5
    found = load_exported(tmp_path / "out")
    assert found.config == KINDS[name].config
    for (key, ours), theirs in zip(model.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(ours.bfloat16().float(), theirs), key


def test_guesses_are_accepted_up_to_the_first_that_differs() -> None:
    assert accepted([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert accepted([1, 2, 3, 4], [1, 2]) == 2
    assert accepted([7], [1]) == 0


def test_a_model_accepts_all_that_it_guessed_itself() -> None:
    model, other = fresh()[0], build(TINY)
    run(model, Optimizer(model), 0, 3)
    other.initialise(5)
    itself = measure(model, model, [[1, 2, 3], [4, 5]], 10, 4, set())
    assert itself.rate == 1.0
    assert itself.per_step == 5.0
    assert itself.tokens == 20
    assert measure(model, other, [[1, 2, 3], [4, 5]], 10, 4, set()).rate < 1.0
