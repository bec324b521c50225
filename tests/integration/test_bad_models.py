"""Model folders that cannot or should not be trusted: a clear start-up error naming the file, or a request refused.

Nothing from a folder is ever executed, and a hostile chat template costs its own request only.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from tests.support.server import serve

from isthmus.config import Settings

MODEL_STATUS = 3
HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "memory": "{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "raise": "{{ raise_exception('no') }}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Settings().model_folder, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def corrupt_header(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[20:40] = b"\xff" * 20
    (folder / "model.safetensors").write_bytes(weights)


def huge_header(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[:8] = (1 << 60).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(weights)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "model.safetensors"),
        (corrupt_header, "model.safetensors"),
        (huge_header, "model.safetensors"),
        (pickle_only, "safetensors"),
        (remote_code, "auto_map"),
        (lambda folder: edit(folder / "config.json", model_type="mamba"), "mamba"),
        (lambda folder: edit(folder / "config.json", num_attention_heads=7), "config.json"),
        (lambda folder: edit(folder / "config.json", hidden_size=1 << 40), "hidden_size"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
)
def test_a_bad_folder_is_a_clear_error_at_start_up(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(folder)
    command = [sys.executable, "-m", "isthmus", "serve", str(folder), "--port", "0", "--state-dir", str(tmp_path / "s")]
    command.extend(["--no-compile", "--store", "off"])
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert result.returncode == MODEL_STATUS
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_a_hostile_template_costs_its_own_request_only(folder: Path, tmp_path: Path, kind: str) -> None:
    trigger = "{% if messages[0]['content'] == 'boom' %}" + HOSTILE[kind] + "{% endif %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    edit(folder / "tokenizer_config.json", chat_template=trigger + config["chat_template"])
    with serve(tmp_path / "state", "--model", str(folder), "--prompt-deadline-s", "1") as server:

        def ask(text: str) -> httpx.Response:
            body = {"model": "model", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

        assert ask("Hello").status_code == 200
        answer = ask("boom")
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]["param"]
        assert ask("Hello").status_code == 200
        parent = psutil.Process(server.process.pid)
        sizes = [process.memory_info().rss for process in [parent, *parent.children(recursive=True)]]
        assert max(sizes) < 1 << 30
