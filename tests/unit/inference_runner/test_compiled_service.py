"""Compiled pieces beside a running engine: built, kept, trusted or refused, taken up between steps, ended with it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import msgspec
import psutil
import pytest
import torch
from tests.support.compiled import MODEL, tiny_spec
from tests.support.tiny_models import Request, generate, greedy, make_model, open_tiny

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.errors import InvalidInput
from isthmus.execution.inference.compiled import cache, service
from isthmus.execution.inference.compiled.cache import LIBRARIES, MANIFEST, Refused, load_entry, open_cache
from isthmus.execution.inference.compiled.check import differs
from isthmus.execution.inference.compiled.service import DEADLINE_S, Compiled, CompiledState
from isthmus.execution.inference.compiled.spec import PieceSpec, cache_key, this_machine
from isthmus.execution.inference.models.pieces import Pieces, eager_pieces
from isthmus.execution.inference.models.step import rms_norm
from isthmus.execution.inference.settings import EngineSettings

ENDS_WITHIN_S = 20.0


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PieceSpec:
    return tiny_spec(tmp_path_factory.mktemp("spec"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "compiled"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def filled(compiled_cache: Path, folder: Path) -> Path:
    """A cache of this test's own that has the entry."""
    copytree(compiled_cache, folder, dirs_exist_ok=True)
    folder.chmod(0o700)
    return folder


def entry_of(folder: Path, spec: PieceSpec) -> Path:
    return folder / cache_key(spec, this_machine())


class Rig:
    """A service with pieces of its own."""

    def __init__(self, spec: PieceSpec | None, folder: Path) -> None:
        self.clock = ManualClock()
        self.pieces: Pieces = eager_pieces(rms_norm)
        self.before = self.pieces.add_norm
        self.compiled = Compiled(self.pieces, spec, folder, self.clock)

    @property
    def eager(self) -> bool:
        return self.pieces.add_norm is self.before

    @property
    def told(self) -> tuple[CompiledState, str, int]:
        return self.compiled.state, self.compiled.reason, self.compiled.refused

    def poll_to_end(self) -> None:
        until(lambda: self.compiled.poll() or self.compiled.state is not CompiledState.BUILDING)


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + ENDS_WITHIN_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a shell script the helper; its arguments 6 and 7 are the cache and the work folder."""

    def become(script: str) -> None:
        path = tmp_path / "helper"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))
        monkeypatch.setattr(service, "COMPILER", "sh")

    return become


@pytest.mark.parametrize("rows", [1, 2, 33, 300])
def test_a_build_computes_what_the_eager_pieces_do(compiled_cache: Path, spec: PieceSpec, rows: int) -> None:
    loaded = load_entry(entry_of(compiled_cache, spec), spec)
    assert loaded is not None
    assert differs(*loaded, spec, rows) == ""


def test_loading_needs_neither_torchs_compiler_nor_long(compiled_cache: Path, spec: PieceSpec) -> None:
    code = (
        "import sys, pathlib, msgspec\n"
        "from isthmus.execution.inference.compiled.cache import load_entry\n"
        "from isthmus.execution.inference.compiled.spec import PieceSpec\n"
        "spec = msgspec.json.decode(sys.argv[2], type=PieceSpec)\n"
        "assert load_entry(pathlib.Path(sys.argv[1]), spec)\n"
        "assert not [name for name in sys.modules if name.startswith(('torch._dynamo', 'torch._inductor'))]\n"
    )
    command = [sys.executable, "-c", code, str(entry_of(compiled_cache, spec)), msgspec.json.encode(spec).decode()]
    subprocess.run(command, check=True, timeout=120)


def test_an_entry_is_readable_by_its_owner_only_and_names_what_it_holds(compiled_cache: Path, spec: PieceSpec) -> None:
    entry = entry_of(compiled_cache, spec)
    assert sorted(path.name for path in entry.iterdir()) == sorted([*LIBRARIES, MANIFEST])
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o600}
    assert (entry.stat().st_mode & 0o777, [path.name for path in compiled_cache.iterdir()]) == (0o700, [entry.name])
    assert json.loads((entry / MANIFEST).read_bytes())["spec"]["head_norm"] == "f32"


@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_tokens_are_those_of_the_eager_pieces(
    filled: Path, tmp_path: Path, compiled: bool, spec: PieceSpec
) -> None:
    make_model(tmp_path / "model", MODEL)
    prompts = [list(range(5, 70)), [9, 10, 11]]

    def tokens(**options: object) -> list[list[int]]:
        runner = open_tiny(tmp_path / "model", **options)
        requests = [Request(str(i), p, range(8 * i, 8 * i + 8), greedy()) for i, p in enumerate(prompts)]
        generate(runner, requests, 24, (40, 1 << 20))
        if options:
            assert runner.compiled is not None
            assert (runner.compiled.state, runner.compiled.reason) == (CompiledState.READY, "from the cache")
        else:
            assert runner.compiled is None
        runner.close()
        return [request.output for request in requests]

    options = {"compiled": "auto", "compiled_dir": str(filled)} if compiled else {}
    assert tokens(**options) == tokens()


def test_exact_mode_is_never_compiled(filled: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", MODEL)
    runner = open_tiny(tmp_path / "model", exact=True, compiled="auto", compiled_dir=str(filled))
    assert runner.compiled is None
    runner.close()


@pytest.mark.parametrize("name", [*LIBRARIES, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_entry_is_refused_and_built_anew(
    filled: Path, spec: PieceSpec, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entry_of(filled, spec) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-9])
    if damage == "gone":
        path.unlink()
    with pytest.raises(Refused) as caught:
        load_entry(path.parent, spec)
    assert caught.value.damaged
    monkeypatch.setattr(service, "COMPILER", "no-such-compiler")
    rig = Rig(spec, filled)
    rig.compiled.start()
    assert rig.told == (CompiledState.FAILED, "there is no no-such-compiler on this machine", 1)
    assert rig.eager
    assert not path.parent.exists()


def test_what_others_may_write_is_refused_and_stays(
    filled: Path, spec: PieceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(filled, spec)
    for path in (filled, entry, entry / LIBRARIES[0], entry / LIBRARIES[1], entry / MANIFEST):
        mode = path.stat().st_mode
        for bit in (0o020, 0o002):
            path.chmod(mode | bit)
            rig = Rig(spec, filled)
            rig.compiled.start()
            assert rig.told == (CompiledState.FAILED, f"{path.name} may be written by others", 1)
            assert rig.eager
            path.chmod(mode)
    monkeypatch.setattr(cache.os, "geteuid", lambda: os.getuid() + 1)
    rig = Rig(spec, filled)
    rig.compiled.start()
    assert rig.told == (CompiledState.FAILED, "compiled belongs to another user", 1)
    monkeypatch.undo()
    assert load_entry(entry, spec) is not None


def test_a_link_in_place_of_a_folder_or_file_is_refused(filled: Path, spec: PieceSpec, tmp_path: Path) -> None:
    entry = entry_of(filled, spec)
    real = (entry / LIBRARIES[1]).rename(tmp_path / "elsewhere.so")
    (entry / LIBRARIES[1]).symlink_to(real)
    with pytest.raises(Refused, match="link"):
        load_entry(entry, spec)
    (tmp_path / "linked").symlink_to(filled)
    with pytest.raises(Refused, match="link"):
        open_cache(tmp_path / "linked")


def test_an_entry_of_another_model_is_refused(filled: Path, spec: PieceSpec) -> None:
    other = msgspec.structs.replace(spec, eps=1e-3)
    entry_of(filled, spec).rename(entry_of(filled, other))
    with pytest.raises(Refused, match="another model"):
        load_entry(entry_of(filled, other), other)


def test_libraries_that_compute_something_else_are_refused(
    filled: Path, spec: PieceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "differs", lambda add_norm, rotate_write, spec, rows: "add_norm" if rows == 33 else "")
    rig = Rig(spec, filled)
    rig.compiled.start()
    assert rig.told == (CompiledState.FAILED, "add_norm computes something else on 33 rows", 1)
    assert rig.eager
    assert entry_of(filled, spec).exists()


def test_a_build_is_taken_up_between_steps(
    compiled_cache: Path, folder: Path, spec: PieceSpec, helper: Callable[[str], None]
) -> None:
    helper(f'read spec; echo "$spec" > {folder}/spec; cp -r {compiled_cache}/* "$6/"')
    rig = Rig(spec, folder)
    rig.compiled.start()
    assert rig.told == (CompiledState.BUILDING, "", 0)
    assert rig.eager
    assert len(list(folder.glob("building-*"))) == 1
    rig.poll_to_end()
    assert rig.told == (CompiledState.READY, "built", 0)
    assert not rig.eager
    assert msgspec.json.decode((folder / "spec").read_bytes(), type=PieceSpec) == spec
    assert (list(folder.glob("building-*")), rig.compiled.pid) == ([], None)
    again = Rig(spec, folder)
    again.compiled.start()
    assert again.told == (CompiledState.READY, "from the cache", 0)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "the build ended with status 3"),
        ("kill -9 $$", "the build ended with status -9"),
        ("exit 0", "the build left nothing"),
    ],
)
def test_a_build_that_fails_leaves_the_eager_pieces(
    folder: Path, spec: PieceSpec, helper: Callable[[str], None], script: str, reason: str
) -> None:
    helper(script)
    rig = Rig(spec, folder)
    rig.compiled.start()
    rig.poll_to_end()
    assert rig.told == (CompiledState.FAILED, reason, 0)
    assert rig.eager
    assert list(folder.glob("building-*")) == []


def test_a_build_over_its_deadline_is_ended_with_all_its_processes(
    folder: Path, spec: PieceSpec, helper: Callable[[str], None]
) -> None:
    helper(f"sleep 600 & echo $! > {folder}/child; wait")
    rig = Rig(spec, folder)
    rig.compiled.start()
    until(lambda: (folder / "child").exists() and (folder / "child").read_text().strip())
    rig.compiled.poll()
    assert rig.compiled.state is CompiledState.BUILDING
    rig.clock.advance(DEADLINE_S + 1)
    rig.compiled.poll()
    assert rig.told == (CompiledState.FAILED, f"the build took over {DEADLINE_S:.0f} s", 0)
    until(lambda: not psutil.pid_exists(int((folder / "child").read_text())))


def test_close_ends_a_build_that_is_under_way(folder: Path, tmp_path: Path) -> None:
    """With the real helper, from a runner: no process and no file of it is left."""
    make_model(tmp_path / "model", MODEL)
    runner = open_tiny(tmp_path / "model", compiled="auto", compiled_dir=str(folder))
    assert runner.compiled is not None
    pid = runner.compiled.pid
    assert runner.compiled.state is CompiledState.BUILDING
    assert pid is not None
    until(lambda: psutil.Process(pid).nice() == 19)
    sequence = Request("a", [5, 6, 7], [0], greedy())
    generate(runner, [sequence], 2)
    assert len(sequence.output) == 2
    runner.close()
    assert not psutil.pid_exists(pid)
    assert [path.name for path in folder.iterdir()] == ["build.log"]


def test_the_helper_ends_when_its_server_is_gone(folder: Path, spec: PieceSpec, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", service.BUILDER, str(folder), str(tmp_path / "work"), "--until-eof"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(spec) + b"\n")
    process.stdin.flush()
    until((tmp_path / "work" / "entry").exists)
    process.stdin.close()
    assert process.wait(ENDS_WITHIN_S) == -9


def test_what_killed_servers_left_is_removed_and_what_others_build_is_not(
    folder: Path, spec: PieceSpec, helper: Callable[[str], None]
) -> None:
    (folder / "building-old").mkdir()
    helper("read spec; read rest")
    one, two = Rig(spec, folder), Rig(spec, folder)
    one.compiled.start()
    mine = {path.name for path in folder.glob("building-*")}
    assert "building-old" not in mine
    two.compiled.start()
    assert {path.name for path in folder.glob("building-*")} > mine
    one.compiled.close()
    two.compiled.close()
    assert list(folder.glob("building-*")) == []


def test_a_folder_that_cannot_be_made_and_a_model_that_is_not_compiled_say_so(tmp_path: Path, spec: PieceSpec) -> None:
    (tmp_path / "file").write_text("")
    rig = Rig(spec, tmp_path / "file" / "compiled")
    rig.compiled.start()
    assert rig.told == (CompiledState.FAILED, "the cache folder cannot be used: Not a directory", 0)
    rig = Rig(None, tmp_path)
    rig.compiled.start()
    rig.compiled.poll()
    rig.compiled.close()
    assert rig.told == (CompiledState.FAILED, "no form of this model is compiled", 0)


def test_a_machine_without_the_memory_does_not_build(
    folder: Path, spec: PieceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "available_bytes", lambda: 512 << 20)
    rig = Rig(spec, folder)
    rig.compiled.start()
    assert rig.told == (CompiledState.FAILED, "512 MiB of memory are available, a build takes 1024", 0)
    assert list(folder.iterdir()) == []


def test_the_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    open_cache(tmp_path / "state" / "compiled")
    assert (tmp_path / "state" / "compiled").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("options", "field"), [({"compiled": "on"}, "compiled"), ({"compiled": "auto"}, "compiled_dir")]
)
def test_settings_are_checked(options: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        EngineSettings(model="m", name="m", **options)
    assert caught.value.field == field


def test_padded_rows_never_reach_a_library(compiled_cache: Path, spec: PieceSpec) -> None:
    loaded = load_entry(entry_of(compiled_cache, spec), spec)
    assert loaded is not None
    rows = torch.zeros(4, spec.columns)
    with pytest.raises(Exception, match="padded"):
        loaded[1](rows, None, (rows, rows), rows, torch.zeros(6, dtype=torch.int64))
