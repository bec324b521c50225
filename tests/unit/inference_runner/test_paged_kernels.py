"""The Triton kernels of attention over block tables: right in Triton's interpreter, and compiled for GPUs.

No GPU is needed for either; none of it says how fast they are.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.triton_cases import CASES

CLOSE = {"half": 2e-3}


def cases(what: str, **environment: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.support.triton_cases", what]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    result = subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, float] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    return cases("run", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_every_score_gives(interpreted: dict[str, float], name: str) -> None:
    assert interpreted[name] < CLOSE.get(name, 1e-5)


def test_it_compiles_for_gpus(tmp_path: Path) -> None:
    sizes = cases("build", TRITON_CACHE_DIR=str(tmp_path))
    assert len(sizes) == 4 * 2
    assert all(sizes.values())
