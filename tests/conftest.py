"""What is built once for all tests."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled pieces that holds those of `tests.support.tiny_models`' model `qwen3`, in float32.

    Made by the helper as a server runs it, once a session: it takes most of a minute.
    """
    from tests.support.compiled import tiny_spec

    from isthmus.execution.inference.compiled.service import BUILDER, COMPILER, _environment

    folder, work = (tmp_path_factory.mktemp(name) for name in ("compiled", "work"))
    folder.chmod(0o700)
    command = [sys.executable, "-P", "-s", "-B", "-m", BUILDER, str(folder), str(work)]
    environment = _environment(COMPILER, work) | {"PATH": os.environ["PATH"]}
    line = msgspec.json.encode(tiny_spec(tmp_path_factory.mktemp("model"))) + b"\n"
    result = subprocess.run(command, input=line, env=environment, capture_output=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr.decode()[-4000:]
    assert not work.exists(), "the helper leaves nothing but its entry"
    return folder
