"""The engine's memory: a pool that cannot fit is refused, it becomes resident as it fills, freed memory is kept."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.tiny_models import make_model

from isthmus.contracts.errors import ConfigInvalid
from isthmus.execution.inference import runner
from isthmus.execution.inference.heap import available_bytes
from isthmus.execution.inference.settings import EngineSettings


def machine(root: Path, meminfo: str, cgroup: str = "", limit: str = "") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "sys/fs/cgroup/a/b").mkdir(parents=True)
    (root / "sys/fs/cgroup/a/b/memory.max").write_text(limit)
    return root


@pytest.mark.parametrize(
    ("cgroup", "limit", "expected"),
    [
        ("", "", 2048_000),
        ("0::/a/b\n", "max\n", 2048_000),
        ("0::/a/b\n", "4096\n", 4096),
        ("0::/gone\n", "1", 2048_000),
    ],
)
def test_the_lower_of_free_memory_and_the_cgroup_s_limit(
    tmp_path: Path, cgroup: str, limit: str, expected: int
) -> None:
    root = machine(tmp_path, "MemTotal: 9 kB\nMemAvailable:    2000 kB\n", cgroup, limit)
    assert available_bytes(root) == expected


def test_where_nothing_is_told_nothing_is_refused(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_a_pool_that_cannot_fit_is_refused_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, "qwen3")
    monkeypatch.setattr(runner, "available_bytes", lambda: 1 << 20)
    with pytest.raises(ConfigInvalid, match="the machine has 1048576 bytes"):
        runner.open_runner(
            EngineSettings(model=str(tmp_path), name="m", kv_bytes=1 << 24), lambda stage, fraction: None
        )


def test_the_pool_becomes_resident_as_it_fills_and_freed_memory_is_kept() -> None:
    code = """
import resource, torch
from isthmus.execution.inference.heap import keep_freed, one_heap
from isthmus.execution.inference.kv_memory import KvMemory
kept = one_heap()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pool = KvMemory(blocks=4096, layers=4, block_tokens=16, kv_heads=4, head_dim=64, dtype=torch.float32,
                device=torch.device("cpu"))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert not pool.rows[:64].any() and pool.rows.data_ptr() % 64 == 0
kept = keep_freed() and kept
faults = []
for _ in range(40):
    torch.ones(12 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(grown * 1024 < pool.rows.numel() * 4 // 8, kept, faults[-1] - faults[-6] < 1000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True", "True", "True"]
