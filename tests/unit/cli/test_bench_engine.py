"""The servers that benchmarks start."""

from pathlib import Path

import pytest

from isthmus.cli.bench_engine import own_server


@pytest.mark.parametrize(("flags", "expected"), [([], "bf16"), (["--store", "off"], "bf16"), (["--exact"], None)])
def test_the_dtype_that_was_asked_for_reaches_the_server(
    tmp_path: Path, flags: list[str], expected: str | None
) -> None:
    command = own_server("ours", flags, [str(tmp_path), "2", "bf16"], tmp_path)._command
    found = command[command.index("--dtype") + 1] if "--dtype" in command else None
    assert found == expected
    assert set(flags) <= set(command)
