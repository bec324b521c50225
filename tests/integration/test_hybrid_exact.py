"""Promise 1 for a hybrid model: in exact mode what starts from a state snapshot is bitwise what was never interrupted.

A tiny random Qwen3-Next (gated delta net, attention, mixture of experts) under the real scheduler. Digests are of the
float32 logits of each sampled position.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmarks.exactness import POOL_BLOCKS, compare_exact, make_folder
from benchmarks.mixes import SCOPE, library

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.ids import RequestId
from isthmus.contracts.requests import EngineRequest
from isthmus.contracts.sampling import SamplingParams
from isthmus.execution.inference.batch import Batch, StepHandle, StepResult
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.runner import TorchRunner, open_runner
from isthmus.execution.inference.settings import EngineSettings, SchedulerSettings

MODEL = "qwen3-next"
SLOTS = 12


class Recorder:
    """A runner that notes the digest of every sampled position, by request and output index."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        self.info = runner.info
        self.digests: dict[tuple[str, int], bytes] = {}
        self.starts: dict[str, list[int]] = {}

    def execute(self, batch: Batch) -> "Noted":
        for part in batch.slices:
            self.starts.setdefault(part.request_id, []).append(part.start)
        return Noted(self, batch, self.runner.execute(batch))

    def close(self) -> None:
        pass


class Noted:
    """A step whose digests are noted when it is done."""

    def __init__(self, recorder: Recorder, batch: Batch, handle: StepHandle) -> None:
        self._recorder, self._batch, self._handle = recorder, batch, handle

    def done(self) -> bool:
        return self._handle.done()

    def when_done(self, call: Callable[[], None]) -> None:
        self._handle.when_done(call)

    def cancel(self) -> bool:
        return self._handle.cancel()

    def result(self) -> StepResult:
        result = self._handle.result()
        for part, got in zip(self._batch.slices, result.slices, strict=True):
            if part.sample is not None:
                for place, digest in enumerate(got.digests or []):
                    self._recorder.digests[part.request_id, part.sample.index + place] = digest
        return result


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchRunner]:
    """Few blocks and few slots, so that both are fought for."""
    folder: Path = make_folder(MODEL, tmp_path_factory.mktemp("models"))
    probe = open_runner(EngineSettings(model=str(folder), name="h", dtype="f32", threads=1), lambda stage, part: None)
    info = probe.info
    probe.close()
    assert info.states is not None
    opened = open_runner(
        EngineSettings(
            model=str(folder),
            name="h",
            dtype="f32",
            exact=True,
            threads=1,
            kv_bytes=max(info.block_bytes * POOL_BLOCKS, 1 << 16),
            state_bytes=info.states.state_bytes * SLOTS,
        ),
        lambda stage, part: None,
    )
    yield opened
    opened.close()


class Engine:
    """An engine of its own over the shared runner."""

    def __init__(self, runner: TorchRunner, **settings: object) -> None:
        self.recorder = Recorder(runner)
        self.core = EngineCore(self.recorder, SchedulerSettings(**settings), ManualClock())  # type: ignore[arg-type]
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}

    def submit(self, name: str, prompt: list[int], count: int, output: list[int] | None = None) -> None:
        params = SamplingParams(max_tokens=count, seed=3, temperature=0.9, ignore_eos=True)
        self.tokens[name] = list(output or [])
        assert self.core.submit(EngineRequest(RequestId(name), SCOPE, prompt, params, output_ids=output or [])) is None

    def run(self, steps: int = 400) -> None:
        for _ in range(steps):
            if self.core.idle:
                break
            for result in self.core.step():
                self.tokens[result.request_id] += result.token_ids
                if result.cached_tokens is not None:
                    self.cached[result.request_id] = result.cached_tokens
        self.core.check()

    def digests(self, name: str) -> dict[int, bytes]:
        return {index: digest for (owner, index), digest in self.recorder.digests.items() if owner == name}


def words(rng: random.Random, count: int, vocab: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(count)]


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_resume_from_a_snapshot_is_bitwise_the_uninterrupted_run(runner: TorchRunner, drafts: int) -> None:
    rng = random.Random(1)
    prompt = words(rng, 70, 2 if drafts else runner.info.vocab_size)
    whole = Engine(runner)
    whole.submit("whole", prompt, 40)
    whole.run()
    engine = Engine(runner, max_batch_tokens=64, draft_tokens=drafts)
    engine.submit("cut", prompt, 40)
    engine.run(steps=24)
    engine.core.abort(RequestId("cut"))
    engine.run()
    so_far = engine.tokens["cut"]
    engine.submit("again", prompt, 40, so_far)
    engine.run()
    assert engine.recorder.starts["again"][0] >= 80, "it starts from a snapshot taken while decoding"
    assert engine.tokens["again"] == whole.tokens["whole"]
    expected = whole.digests("whole")
    assert engine.digests("cut").items() <= expected.items()
    resumed = engine.digests("again")
    assert len(resumed) == 40 - len(so_far)
    assert resumed.items() <= expected.items()


def test_turns_forks_and_branch_points_are_bitwise_what_each_is_alone(runner: TorchRunner) -> None:
    rng = random.Random(2)
    vocab = runner.info.vocab_size
    system = words(rng, 50, vocab)
    engine = Engine(runner, max_batch_tokens=100)
    prompts = {"a": [*system, *words(rng, 9, vocab)], "b": [*system, *words(rng, 12, vocab)]}
    prompts["c"] = [*system, *words(rng, 5, vocab)]
    for name, prompt in prompts.items():
        engine.submit(name, prompt, 20)
        engine.run()
    prompts["next"] = [*prompts["a"], *engine.tokens["a"], *words(rng, 7, vocab)]
    prompts["edited"] = [*prompts["a"], *engine.tokens["a"][:6], *words(rng, 7, vocab)]
    for name in ("next", "edited"):
        engine.submit(name, prompts[name], 12)
    engine.run()
    assert (engine.cached["a"], engine.cached["b"], engine.cached["c"]) == (0, 0, 48)
    assert engine.cached["next"] >= 64
    for name, prompt in prompts.items():
        alone = Engine(runner)
        alone.submit(name, prompt, len(engine.tokens[name]))
        alone.run()
        assert engine.tokens[name] == alone.tokens[name]
        assert engine.digests(name) == alone.digests(name), name


def test_a_wrong_snapshot_is_noticed(runner: TorchRunner) -> None:
    """The comparison can fail: one slot with another state gives other logits."""
    rng = random.Random(3)
    prompt = words(rng, 40, runner.info.vocab_size)
    engine = Engine(runner)
    engine.submit("a", prompt, 10)
    engine.run()
    states = engine.core._scheduler._states
    assert states is not None
    size = len(runner.read_state(0))
    for snapshot in states.index._by_key.values():
        assert snapshot.slot is not None
        runner.write_state(snapshot.slot, bytes(size))
    follow = [*prompt, *engine.tokens["a"], 5]
    engine.submit("b", follow, 8)
    engine.run()
    assert engine.cached["b"] == 48
    alone = Engine(runner)
    alone.submit("b", follow, 8)
    alone.run()
    assert engine.digests("b") != alone.digests("b")


def test_a_mix_is_bitwise_those_of_each_request_alone(runner: TorchRunner) -> None:
    rng = random.Random(MODEL)
    counts = compare_exact(runner, library(rng, runner.info.vocab_size, 24, 90), 1, rng)
    assert counts["different"] == 0
    assert counts["requests"] == 32
