"""How much a property test tries: little in `make test`, the release figure in `make chaos`."""

import os


def examples(quick: int, release: int) -> int:
    """`release` when the chaos run asks for it (TEST_SCALE=release), else `quick`."""
    return release if os.environ.get("TEST_SCALE") == "release" else quick
