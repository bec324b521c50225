"""The one model whose pieces the tests compile."""

from pathlib import Path

from tests.support.tiny_models import make_model, open_tiny

from isthmus.execution.inference.compiled.spec import PieceSpec, describe

MODEL = "qwen3"
"""It has norms by head: the larger of the two forms of the rotation."""


def tiny_spec(folder: Path) -> PieceSpec:
    """What is compiled for `MODEL`, made in `folder`."""
    make_model(folder, MODEL)
    runner = open_tiny(folder)
    spec = describe(runner._decoder)
    runner.close()
    assert spec is not None
    return spec
