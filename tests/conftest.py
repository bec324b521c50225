"""What is built once for all tests."""

import time
from pathlib import Path

import pytest

BUILT_WITHIN_S = 280.0


@pytest.fixture(scope="session")
def compiled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled pieces that holds those of the model of `tests.support.compiled`, in float32.

    Built as a server builds it, once a session: it takes most of a minute.
    """
    from tests.support.compiled import tiny_spec

    from isthmus.contracts.clock import SystemClock
    from isthmus.execution.inference.compiled.service import LOG, Compiled, CompiledState
    from isthmus.execution.inference.models.pieces import eager_pieces
    from isthmus.execution.inference.models.step import rms_norm

    folder = tmp_path_factory.mktemp("state") / "compiled"
    compiled = Compiled(eager_pieces(rms_norm), tiny_spec(tmp_path_factory.mktemp("model")), folder, SystemClock())
    compiled.start()
    deadline = time.monotonic() + BUILT_WITHIN_S
    while compiled.state is CompiledState.BUILDING and time.monotonic() < deadline:
        compiled.poll()
        time.sleep(0.05)
    compiled.close()
    assert compiled.told() == ("ready", "built"), (compiled.told(), (folder / LOG).read_text()[-4000:])
    (folder / LOG).unlink()
    return folder
