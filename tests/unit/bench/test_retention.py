"""`isthmus bench retention`: reading traces, cutting them into records, replaying them, the command; and, where the
real traces are at hand, the figures known of them.
"""

import heapq
import json
import os
import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.bench import traces
from isthmus.bench.retention import BELADY, POLICIES, measure, next_uses, replay, unbounded
from isthmus.bench.traces import Trace, Workload, cut, synthetic
from isthmus.cli import bench
from isthmus.cli.main import main
from isthmus.contracts.errors import InvalidInput, TooLarge
from isthmus.state.kv.retention.policies import NAMES

REAL = Path(os.environ.get("ISTHMUS_TRACES", Path(__file__).resolve().parents[4] / "shared" / "traces"))

CONVERSATION = [
    {"timestamp": 0, "input_length": 1500, "output_length": 3, "hash_ids": [0, 1, 2]},
    {"timestamp": 1000, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 3]},
    {"timestamp": 2500, "input_length": 1600, "output_length": 3, "hash_ids": [0, 1, 2, 4]},
]
AGENTIC = [
    {"id": "a", "block_size": 64, "requests": [
        {"t": 0.0, "type": "n", "in": 130, "out": 1, "hash_ids": [1, 2]},
        {"t": 5.0, "type": "subagent", "agent_id": "x", "requests": [
            {"t": 1.0, "type": "n", "in": 64, "out": 1, "hash_ids": [7]}]},
        {"t": 9.0, "type": "s", "in": 192, "out": 1, "hash_ids": [1, 2, 3]}]},
    {"id": "b", "block_size": 64, "requests": [{"t": 2.0, "type": "n", "in": 64, "out": 1, "hash_ids": [1]}]},
]  # fmt: skip


def write(folder: Path, name: str, lines: list[Any]) -> Path:
    path = folder / traces.FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_conversation_trace_is_read(tmp_path: Path) -> None:
    write(tmp_path, "conversation", CONVERSATION)
    trace = traces.read("conversation", tmp_path)
    assert (trace.block_tokens, trace.distinct, trace.sessions, len(trace.requests)) == (512, 5, 1, 3)
    assert trace.arrivals(1) == trace.arrivals(2) == [(0.0, 0), (1.0, 1), (2.5, 2)]
    assert trace.requests[2].blocks.tolist() == [0, 1, 2, 4]


def test_an_agentic_trace_is_read_with_sub_agents_and_ids_of_its_sessions(tmp_path: Path) -> None:
    write(tmp_path, "agentic", AGENTIC)
    trace = traces.read("agentic", tmp_path)
    assert (trace.block_tokens, trace.distinct, trace.sessions) == (64, 5, 2)
    assert [(r.session, r.at_s, r.tokens) for r in trace.requests] == [(0, 0, 130), (0, 6, 64), (0, 9, 192), (1, 2, 64)]
    own = [set(r.blocks.tolist()) for r in trace.requests]
    assert not (own[0] | own[1] | own[2]) & own[3], "ids are local to a session"
    starts = {at: when for when, at in trace.arrivals(1)}
    assert starts[2] - starts[0] == pytest.approx(9.0)
    assert 0 <= starts[0] <= 4 * 3600
    assert trace.arrivals(1) == trace.arrivals(1) != trace.arrivals(2)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="there is no program zstd here")
def test_compressed_traces_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "conversation", CONVERSATION * 50)
    packed = path.with_name(path.name + ".zst")
    subprocess.run(["zstd", "-q", "--rm", str(path)], check=True)
    assert len(traces.read("conversation", tmp_path).requests) == 150
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(InvalidInput, match="could not be decompressed"):
        traces.read("conversation", tmp_path)


def test_without_zstd_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "conversation", CONVERSATION)
    path.rename(path.with_name(path.name + ".zst"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidInput, match="no program zstd"):
        traces.read("conversation", tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("conversation", "{", "line 2"),
        ("conversation", {"timestamp": 0, "input_length": 5}, "hash_ids"),
        ("conversation", {"timestamp": -1, "input_length": 5, "hash_ids": [9]}, "timestamp"),
        ("conversation", {"timestamp": 0, "input_length": 5, "hash_ids": [-9]}, "hash_ids"),
        ("conversation", {"timestamp": 0, "input_length": 5, "hash_ids": [traces.MAX_ID]}, "hash_ids"),
        ("conversation", {"timestamp": 0, "input_length": 5, "hash_ids": [8, 9]}, "5 tokens has 2 blocks"),
        ("conversation", {"timestamp": 0, "input_length": 600, "hash_ids": [1, 0]}, "after two different ones"),
        ("agentic", {"block_size": 32, "requests": []}, "different block sizes"),
        ("agentic", '{"block_size": 64, "requests": ' + '[{"t": 0, "requests": ' * 3000, "line 3"),
    ],
)
def test_what_is_not_a_trace_is_refused(tmp_path: Path, name: str, line: Any, message: str) -> None:
    good = CONVERSATION[:1] if name == "conversation" else AGENTIC
    write(tmp_path, name, [*good, line])
    with pytest.raises(InvalidInput, match=message):
        traces.read(name, tmp_path)


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "conversation", CONVERSATION)
    for limit, least in (("MAX_REQUESTS", 2), ("MAX_LINE_BYTES", 80), ("MAX_FILE_BYTES", 150)):
        with monkeypatch.context() as patch:
            patch.setattr(traces, limit, least)
            with pytest.raises(TooLarge):
                traces.read("conversation", tmp_path)
    with pytest.raises(InvalidInput, match="there is no"):
        traces.read("agentic", tmp_path)
    with pytest.raises(InvalidInput, match="no trace"):
        traces.read("other", tmp_path)
    write(tmp_path, "agentic", [{"block_size": 64, "requests": []}])
    with pytest.raises(InvalidInput, match="no requests"):
        traces.read("agentic", tmp_path)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_records_are_blocks_that_always_come_together(most: int) -> None:
    trace = synthetic(1)
    workload = cut(trace, most)
    assert int(workload.blocks.sum()) == trace.distinct
    assert int(workload.blocks.max()) <= most
    for request, path in zip(trace.requests, workload.paths, strict=True):
        assert int(workload.blocks[path].sum()) == len(request.blocks)
    arrivals = trace.arrivals(0)
    assert unbounded(workload, arrivals) == unbounded(cut(trace, 1), arrivals)
    if most == 1:
        assert all(np.array_equal(r.blocks, p) for r, p in zip(trace.requests, workload.paths, strict=True))


def hit_tokens(trace: Trace, path: list[int], here: Any, tokens: int) -> int:
    blocks = 0
    while blocks < len(path) and path[blocks] in here:
        blocks += 1
    return min(blocks * trace.block_tokens, tokens)


def plain_lru(trace: Trace, capacity: int) -> float:
    """Without a tree: a path's deepest block is its oldest, so leaves go first by themselves."""
    cache: OrderedDict[int, None] = OrderedDict()
    hit = tokens = 0
    for _, at in trace.arrivals(0):
        request = trace.requests[at]
        path = request.blocks.tolist()
        hit += hit_tokens(trace, path, cache, request.tokens)
        tokens += request.tokens
        for block in reversed(path):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hit / tokens


def plain_belady(trace: Trace, capacity: int) -> float:
    """The farthest next use goes, of equal ones the deepest."""
    arrivals = trace.arrivals(0)
    paths = [request.blocks for request in trace.requests]
    ahead = next_uses(paths, arrivals, trace.distinct)
    cache: dict[int, tuple[int, int]] = {}
    heap: list[tuple[int, int, int]] = []
    hit = tokens = 0
    for (_, at), uses in zip(arrivals, ahead, strict=True):
        request = trace.requests[at]
        path = request.blocks.tolist()
        hit += hit_tokens(trace, path, cache, request.tokens)
        tokens += request.tokens
        for depth, (block, use) in enumerate(zip(path, uses.tolist(), strict=True)):
            cache[block] = (-use, -depth)
            heapq.heappush(heap, (-use, -depth, block))
        while len(cache) > capacity:
            use, depth, block = heapq.heappop(heap)
            if cache.get(block) == (use, depth):
                del cache[block]
    return hit / tokens


@pytest.mark.parametrize("capacity", [3, 20, 100, 400])
@pytest.mark.parametrize("seed", [1, 2])
def test_lru_and_belady_are_what_plain_models_say(seed: int, capacity: int) -> None:
    trace = synthetic(seed)
    workload, arrivals = cut(trace, 1), trace.arrivals(0)
    assert replay("lru", workload, arrivals, capacity).ratio == plain_lru(trace, capacity)
    assert replay(BELADY, workload, arrivals, capacity).ratio == pytest.approx(plain_belady(trace, capacity), abs=0.005)


def test_nobody_beats_belady_nor_what_is_possible() -> None:
    trace = synthetic(3, sessions=60)
    workload, arrivals = cut(trace, 1), trace.arrivals(0)
    most = unbounded(workload, arrivals)
    for capacity in (10, 60, 200, trace.distinct):
        ratios = {policy: replay(policy, workload, arrivals, capacity).ratio for policy in POLICIES}
        assert all(ratio <= ratios[BELADY] + 1e-9 for ratio in ratios.values())
        assert ratios[BELADY] <= most
    assert set(ratios.values()) == {most}, "a cache for everything"


def test_the_result_names_all_it_needs() -> None:
    said: list[str] = []
    figures = measure(cut(synthetic(1), 4), ["lru", BELADY], [5.0, 50.0], 3, said.append)
    assert figures["arrival_orders"] == 1
    assert figures["record_blocks"] == 4
    assert set(figures["policies"]["lru"]) == {"5", "50"}
    assert len(figures["policies"][BELADY]["50"]["hits"]) == 1
    assert figures["policies"]["lru"]["5"]["cpu_us"] > 0
    assert len(said) == 4


def test_the_command_writes_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "conversation", CONVERSATION)
    write(tmp_path, "agentic", AGENTIC)
    monkeypatch.chdir(tmp_path)
    base = ["bench", "retention", "--traces", str(tmp_path)]
    assert main([*base, "--size", "40", "--size", "100", "--seeds", "2", "--json", "r.json"]) == 0
    shown = capsys.readouterr()
    assert "conversation: 3 requests, 5 blocks of 512 tokens; everything kept: 0.610" in shown.out
    assert "agentic 100%: belady" in shown.err
    result = json.loads(Path("r.json").read_text())
    assert result["benchmark"] == "retention"
    assert result["settings"]["hints"] == "off"
    assert result["results"]["traces"]["agentic"]["arrival_orders"] == 2
    assert result["results"]["traces"]["conversation"]["policies"]["arc"]["100"]["hit"] == 0.6095
    assert main([*base, "--size", "0"]) == 2
    assert main([*base, "--seeds", "0"]) == 2
    assert main(["bench", "retention", "--traces", str(tmp_path / "none")]) == 2


def test_the_command_line_knows_every_name() -> None:
    """It names them without importing what measures."""
    assert bench.TRACES == traces.NAMES
    assert bench.POLICIES == POLICIES
    assert (*NAMES, BELADY) == POLICIES


def real(name: str, most: int) -> Workload:
    if not REAL.is_dir():
        pytest.skip(f"NOT TESTED: no real traces in {REAL}; name their folder by ISTHMUS_TRACES")
    return cut(traces.read(name, REAL), most)


@pytest.fixture(scope="module")
def conversation() -> Workload:
    return real("conversation", 1)


@pytest.mark.parametrize(("size", "lru", "belady"), [(1, 0.054, 0.251), (5, 0.200, 0.374)])
def test_the_conversation_trace_gives_the_figures_known_of_it(
    conversation: Workload, size: int, lru: float, belady: float
) -> None:
    workload = conversation
    arrivals, capacity = workload.trace.arrivals(0), round(workload.trace.distinct * size / 100)
    assert unbounded(workload, arrivals) == pytest.approx(0.374, abs=0.001)
    assert replay("lru", workload, arrivals, capacity).ratio == pytest.approx(lru, abs=0.001)
    assert replay(BELADY, workload, arrivals, capacity).ratio == pytest.approx(belady, abs=0.001)


@pytest.mark.chaos
def test_the_agentic_trace_gives_the_figures_known_of_it() -> None:
    """Those are of 710 sessions; the trace has half of them, drawn at random. Drawing as many again from it, with
    others left out, moves LRU at 1% by .025 and Belady by .015 (standard deviations), and arrival orders by .01 (at 2%
    LRU by .02). So over five orders at most two of those apart, all in one direction, since one draw of sessions moves
    every size: LRU .339 at 1%, .595 at 2% (.653), .887 at 5%; Belady .630, .798 (.834), .935. Our reading of the
    times is the only one that fits them: those of sub-agents begin at 0, after their parents'.
    """
    workload = real("agentic", 64)
    arrivals, distinct = workload.trace.arrivals(1), workload.trace.distinct
    assert unbounded(workload, arrivals) == pytest.approx(0.961, abs=0.005)
    for percent, lru, belady in ((1, 0.366, 0.675), (5, 0.904, 0.943)):
        capacity = round(distinct * percent / 100)
        assert replay("lru", workload, arrivals, capacity).ratio == pytest.approx(lru, abs=0.05)
        assert replay(BELADY, workload, arrivals, capacity).ratio == pytest.approx(belady, abs=0.06)
