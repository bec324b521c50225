"""The training scripts: checkpoints resume exactly, the loss falls, schedules end at zero."""

import random
from pathlib import Path

import torch
from training.embedded import checkpoint
from training.embedded.model import Llama, ModelConfig
from training.embedded.optim import Optimizer
from training.embedded.schedule import hold_and_fall, read_stages, stage_at

TINY = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                   head_dim=8, intermediate_size=48, max_position_embeddings=64)  # fmt: skip
RECIPE = Path(__file__).resolve().parents[3] / "training" / "embedded" / "recipe.toml"


def run(model: Llama, optimizer: Optimizer, first: int, last: int) -> None:
    """Steps `first` to `last` on batches that depend on the step alone."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 64, (2, 17), generator=generator)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16))
        model.zero_grad()
        loss.backward()
        optimizer.step(number, 1.0)


def fresh() -> tuple[Llama, Optimizer]:
    model = Llama(TINY)
    model.initialise(1)
    return model, Optimizer(model)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, whole_optimizer = fresh()
    run(whole, whole_optimizer, 0, 6)
    part, part_optimizer = fresh()
    run(part, part_optimizer, 0, 3)
    checkpoint.save(tmp_path, dict(part.named_parameters()), part_optimizer.state(), {"step": 3})
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    weights, state, progress = loaded
    resumed, resumed_optimizer = fresh()
    resumed.load_state_dict(weights, strict=False)
    resumed_optimizer.load(state)
    run(resumed, resumed_optimizer, progress["step"], 6)
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, dict(resumed.named_parameters())[name]), name


def test_training_lowers_the_loss_of_what_it_sees() -> None:
    model, optimizer = fresh()
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(9))

    def loss() -> torch.Tensor:
        return model.loss(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16))

    before = loss().item()
    for number in range(30):
        model.zero_grad()
        loss().backward()
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


def test_every_step_of_the_recipe_has_a_stage() -> None:
    stages = read_stages(RECIPE)
    rng = random.Random(1)
    assert all(stage_at(stages, rng.randrange(10_000)) in stages for _ in range(50))
