"""Paging on real models: what left the device comes back bit for bit, late, wrong and missing records are recomputed,
layers are used as they arrive, and a scope that was forgotten is gone.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.memory_store import MemoryLease, MemoryStore
from tests.support.requests import SCOPE, make_request
from tests.support.sites import PROMPT, WITHIN_S, Site
from tests.support.tiny_models import make_model, open_tiny

from isthmus.contracts.blocks import NO_SESSION, Erasure, HintKind, Reason, Tier, namespace_id
from isthmus.contracts.events import RequestOutput, Reuse, SessionHint
from isthmus.contracts.requests import EngineRequest
from isthmus.execution.inference.paging import pager as pager_module
from isthmus.execution.inference.runner import TorchRunner

FAMILIES = ("llama-default", "qwen3", "mistral", "qwen3-next-dense-odd-tied")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(path, request.param)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchRunner]:
    path = tmp_path_factory.mktemp("plain")
    make_model(path, "llama-odd-heads")
    runner = open_tiny(path)
    yield runner
    runner.close()


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.NVME])
def test_logits_after_a_restore_are_bitwise_those_of_the_cold_run(folder: Path, tier: Tier) -> None:
    runner = open_tiny(folder, exact=True)
    site = Site(runner, MemoryStore(tier))
    cold = site.run(make_request("a", PROMPT, 12))["a"]
    tokens = site.tokens["a"]
    site.push_out()
    warm = site.run(make_request("b", PROMPT, 12))["b"]
    assert site.tokens["b"] == tokens
    assert warm.logits_digest == cold.logits_digest
    assert warm.reuse is not None
    assert getattr(warm.reuse, tier.value) > 60
    assert warm.reuse.device == 0
    # The next turn goes on from what the first one left.
    site.push_out()
    turn = site.run(make_request("c", [*PROMPT, *tokens, 5, 6, 7], 4))["c"]
    assert turn.reuse is not None
    assert getattr(turn.reuse, tier.value) >= 96
    site.settle()
    site.close()
    runner.close()


def test_restored_blocks_are_the_bytes_that_were_written(plain: TorchRunner) -> None:
    store = MemoryStore()
    site = Site(plain, store)
    site.run(make_request("a", PROMPT, 4))
    tree = site.core._scheduler._tree
    before = {node.key: plain.read_block(node.block) for node in tree._nodes.values()}
    site.push_out()
    for block in range(plain.info.blocks):
        plain.write_block(block, b"\x7f" * plain.info.block_bytes)
    site.run(make_request("b", PROMPT, 4))
    assert {key: plain.read_block(tree._nodes[key].block) for key in before} == before
    assert len(before) >= 6
    site.close()


@pytest.mark.parametrize("reason", [Reason.CORRUPT, Reason.IO_ERROR, Reason.ABSENT, Reason.EXPIRED, Reason.UNAVAILABLE])
def test_what_fails_to_load_is_recomputed_and_says_why(plain: TorchRunner, reason: Reason) -> None:
    store = MemoryStore()
    site = Site(plain, store)
    cold = site.run(make_request("a", PROMPT, 6))["a"]
    assert cold.reuse == Reuse(reason="absent")
    tokens = site.tokens["a"]
    site.push_out()
    third = list(store.records)[3]
    store.fault = lambda key, first: reason if key == third else None
    warm = site.run(make_request("b", PROMPT, 6))["b"]
    assert site.tokens["b"] == tokens
    assert warm.reuse is not None
    assert warm.reuse.reason == reason.value
    counts = site.core.stats().paging
    assert counts["load_nvme_hit"] == 3
    assert sum(value for name, value in counts.items() if name.endswith(reason.value) and name.startswith("load")) == 1
    site.settle()
    site.close()


def test_layers_are_used_as_they_arrive(plain: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager_module, "LAYERED_BYTES", 1)
    store = MemoryStore()
    site = Site(plain, store, early_tokens=1, early_share=1.0)
    prompt = [*PROMPT, *range(30, 90)]
    site.run(make_request("a", prompt, 6))
    tokens = site.tokens["a"]
    site.push_out()
    # Only the first 6 blocks: the rest of the prompt is computed while they arrive.
    store.records = dict(list(store.records.items())[:6])
    rates = site.core._scheduler._paging.rates  # type: ignore[union-attr]
    rates.computed(1, 1e6)
    gate = threading.Event()
    second: list[int] = []

    def hold(key: bytes, first: int) -> None:
        if first:  # layers after the first: not before the step waits for them
            assert gate.wait(WITHIN_S)
            second.append(first)

    store.fault = hold  # type: ignore[assignment]
    executed = plain.execute

    def execute(batch: object) -> object:
        handle = executed(batch)  # type: ignore[arg-type]
        gate.set()
        return handle

    monkeypatch.setattr(plain, "execute", execute)
    warm = site.run(make_request("b", prompt, 6))["b"]
    assert site.tokens["b"] == tokens
    assert second
    assert site.core.stats().paging["early_starts"] == 1
    assert warm.reuse is not None
    assert warm.reuse.nvme == 96
    site.settle()
    site.close()


def test_a_layer_that_fails_while_a_step_waits_for_it_voids_the_step(
    plain: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pager_module, "LAYERED_BYTES", 1)
    store = MemoryStore()
    site = Site(plain, store, early_tokens=1, early_share=1.0)
    prompt = [*PROMPT, *range(40, 90)]
    site.run(make_request("a", prompt, 6))
    tokens = site.tokens["a"]
    site.push_out()
    store.records = dict(list(store.records.items())[:5])
    site.core._scheduler._paging.rates.computed(1, 1e6)  # type: ignore[union-attr]
    store.fault = lambda key, first: Reason.CORRUPT if first and key == list(store.records)[2] else None
    site.run(make_request("b", prompt, 6))
    assert site.tokens["b"] == tokens
    site.settle()
    site.close()


def test_an_abort_while_loading_frees_everything(plain: TorchRunner) -> None:
    store = MemoryStore()
    site = Site(plain, store)
    site.run(make_request("a", PROMPT, 4))
    site.push_out()
    store.gate = threading.Event()
    request = make_request("b", PROMPT, 4)
    assert site.core.submit(request) is None
    while not site.core.stats().paging["loading"]:
        site.core.begin_step()
    site.core.abort(request.request_id)
    site.core.check()
    assert site.core.stats().blocks_leased, "a thread may still write there"
    store.gate.set()
    outputs: list[RequestOutput] = []
    while not outputs:
        assert not site.core.begin_step()
        outputs = site.core.collect()
    assert outputs[0].finish == "abort"
    site.settle()
    site.close()


def test_a_forgotten_tenant_leaves_the_device(plain: TorchRunner) -> None:
    store = MemoryStore()
    site = Site(plain, store)
    site.run(make_request("a", PROMPT, 4))
    site.settle()
    assert site.core.stats().blocks_cached > 0
    store.records.clear()
    store.erasures = (Erasure(1, namespace_id(SCOPE.namespace), NO_SESSION),)
    site.rung.clear()
    while site.core.stats().blocks_cached:
        assert site.rung.wait(WITHIN_S)
        site.rung.clear()
        site.core.begin_step()
    site.core.check()
    site.close()


def test_hints_reach_the_store_with_the_keys_of_the_session(plain: TorchRunner) -> None:
    store = MemoryStore()
    site = Site(plain, store)
    base = make_request("a", PROMPT, 4)
    request = EngineRequest(
        base.request_id, base.scope, PROMPT, base.sampling, session="s1", hint=HintKind.WAITING, hint_s=3.0
    )
    site.run(request)
    site.core.hint(SessionHint(SCOPE.namespace, "s1", HintKind.PREFETCH))
    site.core.hint(SessionHint(SCOPE.namespace, "unknown", HintKind.PREFETCH))
    site.settle()
    assert [(hint.kind, hint.seconds) for hint in store.hints] == [(HintKind.WAITING, 3.0), (HintKind.PREFETCH, 0.0)]
    assert store.hints[0].keys == store.hints[1].keys
    assert set(store.hints[0].keys) <= set(store.records)
    assert site.core.stats().paging["hint_unknown_session"] == 1
    site.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_store_that_raises_is_not_asked_again_and_requests_compute(plain: TorchRunner) -> None:
    class Raising(MemoryStore):
        def lease(self, *_: object) -> MemoryLease:
            raise RuntimeError("nobody foresaw this")

    store = Raising()
    site = Site(plain, store)
    site.run(make_request("a", PROMPT, 6))
    tokens = site.tokens["a"]
    site.push_out()
    records = len(store.records)
    for name in ("b", "c"):
        late = site.run(make_request(name, PROMPT, 6))[name]
        assert site.tokens[name] == tokens
        assert late.reuse is not None
        assert late.reuse.reason == Reason.UNAVAILABLE
        site.push_out()
    assert site.core.stats().paging["pager_lost"] == 1
    assert len(store.records) == records
    site.settle()
    site.close()


def test_more_than_may_be_owed_is_dropped_and_counted(plain: TorchRunner) -> None:
    store = MemoryStore()
    site = Site(plain, store, keep_bytes=0)
    site.run(make_request("a", PROMPT, 4))
    site.settle()
    assert not store.records
    assert site.core.stats().paging["keep_dropped"] >= 6
    site.close()
