"""The wheel holds everything: it builds, installs and serves the embedded model without the source tree."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that no build leftovers get in."""
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_code_model_and_licence_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "isthmus/data/embedded/model.safetensors" in names
    assert "isthmus/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    outside = [name for name in names if not name.startswith(("isthmus/", "isthmus-"))]
    assert outside == []


def test_it_installs_and_serves_apart_from_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    """Into a folder of its own; the dependencies come from this environment's packages."""
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    paths = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": paths}
    code = """
import subprocess, sys, pathlib, isthmus, urllib.request, json
assert pathlib.Path(isthmus.__file__).is_relative_to(sys.argv[1]), isthmus.__file__
command = [sys.executable, "-m", "isthmus", "serve", "--port", "0", "--no-compile", "--store-disk", "160MiB"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
url = next(word for line in server.stderr for word in line.split() if word.startswith("http://"))
body = json.dumps({"model": "isthmus", "prompt": "Hello", "max_tokens": 3}).encode()
ask = urllib.request.Request(url + "/v1/completions", body, {"content-type": "application/json"})
print(json.load(urllib.request.urlopen(ask, timeout=60))["usage"]["completion_tokens"])
server.terminate()
server.wait(60)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(site)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert 1 <= int(result.stdout) <= 3
