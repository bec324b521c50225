"""Write requirements/serve.txt and requirements/dev.txt: every dependency but torch, pinned with hashes.

torch is left out because the hash of its wheel differs between the CPU and the CUDA builds; requirements/torch.txt
pins its version. The hashes of what it needs besides are here.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Written by `make lock`. Every package with its hashes; torch is pinned in torch.txt.\n"


def compile_lock(name: str, *extra: str) -> None:
    """Resolve pyproject.toml with `extra` arguments into requirements/`name`.txt."""
    output = ROOT / "requirements" / f"{name}.txt"
    options = ["--quiet", "--generate-hashes", "--strip-extras", "--no-header", "--no-annotate", "--allow-unsafe"]
    quiet = ["--no-emit-index-url", "--no-emit-trusted-host", "--no-emit-find-links", "--unsafe-package", "torch"]
    command = [sys.executable, "-m", "piptools", "compile", *options, *quiet, *extra]
    subprocess.run([*command, "--output-file", str(output), str(ROOT / "pyproject.toml")], check=True, cwd=ROOT)
    lines = output.read_text().splitlines()
    kept: list[str] = []
    skipping = False
    for line in lines:
        if line.startswith("torch=="):
            skipping = True
        elif skipping and not line.startswith((" ", "\t")):
            skipping = False
        if not skipping and not line.startswith("#"):
            kept.append(line)
    output.write_text(HEADER + "\n".join(kept) + "\n")


def main() -> None:
    """Write both files; dev builds on serve's versions."""
    compile_lock("serve", "--all-build-deps")
    compile_lock("dev", "--extra", "dev", "--constraint", "requirements/serve.txt", "--all-build-deps")


if __name__ == "__main__":
    main()
