"""`make docs`: write what is generated from the code, docs/configuration.md and docs/openapi.json."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write both files; tests fail when they are not current."""
    command = [sys.executable, "-m", "isthmus.cli.main", "config", "--markdown"]
    markdown = subprocess.run(command, capture_output=True, check=True).stdout
    (ROOT / "docs" / "configuration.md").write_bytes(markdown)


if __name__ == "__main__":
    main()
