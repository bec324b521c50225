"""Compiled pieces on disk: which are trusted, and how they are loaded.

A library is code: it is loaded from a folder and files of this user that nobody else may write, when its bytes are
those that the manifest names, and used when it computes what the eager pieces compute.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
from blake3 import blake3

from isthmus.execution.inference.compiled.check import ROWS, differs
from isthmus.execution.inference.compiled.pieces import Run, compiled_add_norm, compiled_rotate_write
from isthmus.execution.inference.compiled.spec import PieceSpec
from isthmus.execution.inference.models.pieces import AddNorm, RotateWrite

LIBRARIES = ("add_norm.so", "rotate_write.so")
MANIFEST = "manifest.json"
MAX_LIBRARY_BYTES = 1 << 26


class Manifest(msgspec.Struct, frozen=True):
    """What an entry holds: the BLAKE3 of each library by name, in hexadecimal, and what they were built for."""

    libraries: dict[str, str]
    spec: PieceSpec


class Refused(Exception):
    """An entry is not used; the text says why. `damaged`: building it anew may help."""

    def __init__(self, reason: str, damaged: bool = False) -> None:
        super().__init__(reason)
        self.damaged = damaged


def open_cache(folder: Path) -> None:
    """Make the folder if it is not there. Raises `OSError`, and `Refused` for one that others may write."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder, stat.S_ISDIR)


def load_entry(entry: Path, spec: PieceSpec) -> tuple[AddNorm, RotateWrite] | None:
    """The pieces of an entry, checked; None when there is none. Raises `Refused`."""
    if not entry.is_dir():
        return None
    try:
        _check_owner(entry, stat.S_ISDIR)
        manifest = msgspec.json.decode(_read(entry / MANIFEST), type=Manifest)
        for name in LIBRARIES:
            if blake3(_read(entry / name)).hexdigest() != manifest.libraries.get(name):
                raise Refused(f"{name} is not what was built", damaged=True)
    except (OSError, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise Refused(f"the entry cannot be read: {type(error).__name__}", damaged=True) from error
    if manifest.spec != spec:
        raise Refused("the entry was built for another model", damaged=True)
    try:
        add_norm = compiled_add_norm(_load(entry / LIBRARIES[0]))
        rotate_write = compiled_rotate_write(_load(entry / LIBRARIES[1]))
        for rows in ROWS:
            wrong = differs(add_norm, rotate_write, spec, rows)
            if wrong:
                raise Refused(f"{wrong} computes something else on {rows} rows")
    except RuntimeError as error:
        raise Refused(f"the libraries do not run: {type(error).__name__}") from error
    return add_norm, rotate_write


def _load(path: Path) -> Run:
    # The runner of a plain shared object: no archive is unpacked and torch's compiler is not imported.
    from torch._C._aoti import AOTIModelContainerRunnerCpu

    run: Run = AOTIModelContainerRunnerCpu(str(path), 1).run
    return run


def _read(path: Path) -> bytes:
    """The bytes of a file of ours. Raises `Refused`, `OSError`."""
    _check_owner(path, stat.S_ISREG)
    if path.stat().st_size > MAX_LIBRARY_BYTES:
        raise Refused(f"{path.name} is too large", damaged=True)
    return path.read_bytes()


def _check_owner(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raise `Refused` unless `path` is of this kind (no link), of this user, and writable by this user alone."""
    found = path.lstat()
    if not is_kind(found.st_mode):
        raise Refused(f"{path.name} is not what it should be: a link, a file or a folder in its place")
    if found.st_uid != os.geteuid():
        raise Refused(f"{path.name} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Refused(f"{path.name} may be written by others")
