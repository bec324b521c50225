"""`make docs`: write what is generated from the code, docs/configuration.md and docs/openapi.json."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write both files; tests fail when they are not current."""
    sources = {"configuration.md": ["isthmus", "config", "--markdown"], "openapi.json": ["isthmus.gateway.openapi"]}
    for name, (module, *arguments) in sources.items():
        command = [sys.executable, "-m", module, *arguments]
        text = subprocess.run(command, capture_output=True, check=True).stdout
        (ROOT / "docs" / name).write_bytes(text)


if __name__ == "__main__":
    main()
