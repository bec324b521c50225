"""Trains one of the embedded models; stop it at any time and start it again with the same command.

The rate warms up, holds, and falls to nothing either by a number of steps
(``--steps``: the run can be repeated exactly) or by a time of day (``--until``:
as many steps as the machine can do). A batch is a function of the seed and the
step alone, so a resumed run sees exactly what it would have seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from training.embedded import checkpoint, probes
from training.embedded.inherit import inherit
from training.embedded.losses import Objective, choose
from training.embedded.models import KINDS, build
from training.embedded.optim import Optimizer
from training.embedded.pools import DOCS, Packer, read_pool
from training.embedded.schedule import Stage, hold_and_fall, read_stages, seconds_until, stage_at
from training.embedded.world import World, load_world


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="folder with tokenizer and pools")
    parser.add_argument("--model", choices=sorted(KINDS), default="main", help="which model")
    parser.add_argument("--run", help="name of the run, a folder below the work folder (default: by model)")
    parser.add_argument("--pools", default="pools", help="folder of the pools, below the work folder")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="exported model to start from (see inherit.py)")
    parser.add_argument("--steps", type=int, default=2131, help="length of the run; ignored with --until")
    parser.add_argument("--until", metavar="HH:MM", help="end the run at this time of day (UTC)")
    parser.add_argument("--fall", type=float, default=0.25, help="last part of the run in which the rate falls")
    parser.add_argument("--fall-minutes", type=float, default=25.0, help="the same with --until")
    parser.add_argument("--recipe", type=Path, help="stages and shares of the mixture (default: by model)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens in a step")
    parser.add_argument("--focus", type=float, default=0.5, help="part of a batch's positions whose loss is computed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and batches")
    parser.add_argument("--threads", type=int, default=2, help="threads of computation")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--probe-every", type=int, default=300, help="steps between held-out probes")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    options = parser.parse_args()
    kind = KINDS[options.model]
    options.run = options.run or kind.run
    options.recipe = options.recipe or Path(__file__).with_name(kind.recipe)
    return options


class Trainer:
    """A run: the model, its optimiser, and where it stands."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.work / options.run
        self.model = build(KINDS[options.model].config).to(options.device)
        self.optimizer = Optimizer(self.model)
        self.progress: dict[str, Any] = {"step": 0, "tokens": 0, "cpu_seconds": 0.0}
        self.tokenizer = Tokenizer.from_file(str(options.work / "tokenizer" / "tokenizer.json"))
        self.stages = read_stages(options.recipe)
        self.stopping = False
        self._objective = Objective(self.model, compiled=not options.no_compile)
        self._packers: dict[Stage, Packer] = {}
        self._world: World | None = None

    def resume(self) -> None:
        """Takes up the latest checkpoint, or starts anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.load(self.folder)
        if found is None:
            self.model.cpu().initialise(self.options.seed)
            if self.options.init is not None:
                taken = inherit(self.model, self.options.init)
                self.progress["init"] = {"from": self.options.init.name, "tensors": taken}
            self.model.to(self.options.device)
            return
        weights, state, self.progress = found
        self.model.load_state_dict(weights)
        self.optimizer.load(state)

    def save(self) -> None:
        """Writes a checkpoint."""
        checkpoint.save(self.folder, self.model.state_dict(), self.optimizer.state(), self.progress)

    def factor(self) -> float:
        """The schedule's factor for the next step; 0 ends the run."""
        step = self.progress["step"]
        if self.options.until:
            left = seconds_until(self.options.until, dt.datetime.now(dt.UTC))
            return hold_and_fall(step, left, self.options.fall_minutes * 60)
        return hold_and_fall(step, self.options.steps - step, self.options.fall * self.options.steps)

    def packer(self, stage: Stage) -> Packer:
        """The source of batches for a stage."""
        if stage not in self._packers:
            folder = self.options.work / self.options.pools
            pools = {k: [read_pool(folder, f"{k}-{s}") for s in stage.sizes] for k in stage.shares if k != DOCS}
            pools[DOCS] = [read_pool(folder, DOCS)]
            bos = self.tokenizer.encode("<|bos|>").ids[0]
            self._packers[stage] = Packer(pools, stage.shares, bos, self.options.seed)
        return self._packers[stage]

    def step(self, factor: float) -> float:
        """One step; returns the loss."""
        number, stage = self.progress["step"], stage_at(self.stages, self.progress["step"])
        rows = max(1, (stage.tokens or self.options.batch_tokens) // stage.length)
        inputs, targets, weights = self.packer(stage).batch(number, rows, stage.length)
        positions, chosen = choose(weights, stage.focus or self.options.focus, [self.options.seed, number, 1])
        batch = (torch.from_numpy(a).to(self.options.device) for a in (inputs, targets, positions, chosen))
        with torch.autocast(self.options.device, torch.bfloat16):
            loss: Tensor = self._objective(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(number, factor)
        self.model.zero_grad(set_to_none=True)
        self.progress["step"] += 1
        self.progress["tokens"] += inputs.size
        return float(loss.detach())

    def probe(self) -> dict[str, float]:
        """Held-out recall and bits per byte, quickly."""
        self._world = self._world or load_world(self.options.work, held_out=True)

        def logits(tokens: Tensor) -> Tensor:
            with torch.autocast(self.options.device, torch.bfloat16):
                out: Tensor = self.model(tokens.to(self.options.device))
            return out.cpu()

        pool = read_pool(self.options.work / self.options.pools, f"{DOCS}-held-out")
        found = {"bits_per_byte": probes.bits_per_byte(pool, self.tokenizer, logits, 1024, 12)}
        found |= probes.quick(self._world, self.tokenizer, logits)
        return {k: round(v, 3) for k, v in found.items()}


def _stop_on_signal(trainer: Trainer) -> None:
    def stop(*_: object) -> None:
        trainer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _report(trainer: Trainer, losses: list[float], tokens: int, seconds: float, factor: float) -> None:
    options, done = trainer.options, trainer.progress["step"]
    if options.until:
        left = seconds_until(options.until, dt.datetime.now(dt.UTC))
    else:
        left = (options.steps - done) * seconds / len(losses)
    speed = tokens / seconds
    length = stage_at(trainer.stages, done).length
    mean = sum(losses) / len(losses)
    print(
        f"step {done}  context {length}  loss {mean:.3f}  rate {factor:.2f}  {speed:.0f} tokens/s"
        f"  {trainer.progress['tokens'] / 1e6:.1f}M tokens  left {left / 60:.0f} min",
        flush=True,
    )


def train(trainer: Trainer) -> None:
    """Runs to the end of the schedule or to a signal, saving as it goes."""
    options, losses, since, before = trainer.options, [], time.monotonic(), trainer.progress["tokens"]
    cpu_before = time.process_time() - trainer.progress["cpu_seconds"]
    while not trainer.stopping and (factor := trainer.factor()) > 0:
        losses.append(trainer.step(factor))
        step = trainer.progress["step"]
        trainer.progress["cpu_seconds"] = round(time.process_time() - cpu_before, 1)
        if step % 20 == 0:
            _report(trainer, losses, trainer.progress["tokens"] - before, time.monotonic() - since, factor)
            losses, since, before = [], time.monotonic(), trainer.progress["tokens"]
        if step % options.save_every == 0:
            trainer.save()
        if step % options.probe_every == 0:
            line = {**trainer.progress, **trainer.probe()}
            with (trainer.folder / "probes.jsonl").open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            losses, since, before = [], time.monotonic(), trainer.progress["tokens"]
    trainer.save()


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    trainer = Trainer(options)
    trainer.resume()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    shape = dataclasses.asdict(trainer.model.config)
    (trainer.folder / "settings.json").write_text(json.dumps({**settings, "model": shape}, indent=2) + "\n")
    _stop_on_signal(trainer)
    train(trainer)


if __name__ == "__main__":
    main()
