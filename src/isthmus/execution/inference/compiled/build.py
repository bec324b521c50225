"""The helper process that compiles a model's pieces: `python -m isthmus.execution.inference.compiled.build`.

Arguments FOLDER and WORK. Reads a `PieceSpec` as one line of JSON from stdin and leaves FOLDER/<key> with one library a
piece and a manifest, put in place by one rename. Everything on the way is in WORK, which is removed at the end; the
caller names it in TMPDIR and TORCHINDUCTOR_CACHE_DIR, too. With --until-eof the process ends, and its compiler with it,
when stdin is closed: when the server is gone. It takes what processor time nobody else wants, `CPU_SECONDS` of it at
most a process.
"""

import argparse
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from blake3 import blake3

from isthmus.execution.inference.compiled.cache import LIBRARIES, MANIFEST, Manifest
from isthmus.execution.inference.compiled.pieces import AddNormModule, RotateWriteModule, example
from isthmus.execution.inference.compiled.spec import PieceSpec, cache_key, this_machine

CPU_SECONDS = 300
SERIAL_ELEMENTS = 32_768
"""Elements of a step's rows under which one thread computes a piece, as in torch's own operators: when others use the
cores, a team waits a slice of the scheduler for its last thread (measured: 8 ms for a piece of 6 us)."""
ROWS, POOL = 48, 512
"""Of the example inputs. Any number of rows can be computed by what is built from them."""
MOST_ENTRIES = 16
"""Entries that are kept; the oldest go first."""


def build(spec: PieceSpec, folder: Path, work: Path) -> Path:
    """Compile both pieces; the entry. Raises what torch raises when the compiler fails."""
    key = cache_key(spec, this_machine())
    made = work / "entry"
    made.mkdir(mode=0o700)
    added, turned = example(spec, ROWS, POOL)
    rows = torch.export.Dim("rows", min=2, max=1 << 20)
    pool = torch.export.Dim("pool", min=2, max=1 << 40)
    fixed = [None] * (len(turned) - 5)
    _serial_when_small(max(2, SERIAL_ELEMENTS // max(spec.hidden, spec.columns)))
    _compile(AddNormModule(spec), added, [{0: rows}, {0: rows}, None], made / LIBRARIES[0])
    shapes = [{0: rows}, {0: rows}, {0: rows}, {0: pool}, {0: 2 * rows}, *fixed]
    _compile(RotateWriteModule(spec), turned, shapes, made / LIBRARIES[1])
    for path in made.iterdir():
        if path.name not in LIBRARIES:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    digests = {name: blake3((made / name).read_bytes()).hexdigest() for name in LIBRARIES}
    (made / MANIFEST).write_bytes(msgspec.json.encode(Manifest(digests, spec)))
    for name in (*LIBRARIES, MANIFEST):
        (made / name).chmod(0o600)
    entry = folder / key
    if not entry.exists():  # else another server was faster, with the same
        made.rename(entry)
    _prune(folder, entry)
    return entry


def _serial_when_small(rows: int) -> None:
    """What is generated from now on runs in one thread under so many rows. torch generates teams of all threads only.

    Internal names: the exact pin of torch keeps them. `ks0` is the first size that a kernel takes, the number of rows;
    were it another, only the number of threads would be another.
    """
    from torch._inductor.codegen.cpp import WorkSharing

    plain = WorkSharing.parallel

    def parallel(sharing: Any, threads: int) -> None:
        plain(sharing, threads)  # type: ignore[no-untyped-call]
        lines = sharing.code._lines  # noqa: SLF001
        for index, line in enumerate(lines):
            if isinstance(line, str) and line.strip() == "#pragma omp parallel":
                lines[index] = f"{line} if (ks0 >= {rows})"

    WorkSharing.parallel = parallel  # type: ignore[method-assign]


def _compile(module: torch.nn.Module, inputs: list[torch.Tensor], shapes: Sequence[object], target: Path) -> None:
    """One library. Threads are those of the step that runs it, not those of this process."""
    from torch._inductor import aot_compile

    program = torch.export.export(module, tuple(inputs), dynamic_shapes=tuple(shapes))
    options = {
        "aot_inductor.output_path": str(target),
        "aot_inductor.package": False,
        "aot_inductor.enable_line_tables": False,
        "cpp.dynamic_threads": True,
        "aot_inductor.precompile_headers": False,  # they take longer to make than they save for two libraries
        "compile_threads": 1,
    }
    aot_compile(program.module(), tuple(inputs), options=options)


def _prune(folder: Path, kept: Path) -> None:
    entries = [path for path in folder.iterdir() if len(path.name) == len(kept.name) and path != kept]
    entries.sort(key=lambda path: path.stat().st_mtime)
    for path in entries[: max(0, len(entries) + 1 - MOST_ENTRIES)]:
        shutil.rmtree(path, ignore_errors=True)


def _end_with_stdin() -> None:
    """Wait for the end of stdin, then end this process and every one that it started."""
    # Not the buffered reader: its lock, held by this thread, would abort the interpreter at its end.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.killpg(os.getpid(), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    """Entry point. The exit status is 0 when the entry is there."""
    parser = argparse.ArgumentParser(prog="isthmus-build", description="Compile the pieces of a model.")
    parser.add_argument("folder", type=Path, help="the cache")
    parser.add_argument("work", type=Path, help="an empty folder on the same file system; it is removed")
    parser.add_argument("--until-eof", action="store_true", help="end the process group when stdin is closed")
    chosen = parser.parse_args(arguments)
    folder, work = chosen.folder.resolve(), chosen.work.resolve()
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with suppress(OSError):  # where the kernel has it: if memory runs out, this ends and not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=PieceSpec)
    if chosen.until_eof:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    torch.set_num_threads(1)
    try:
        build(spec, folder, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
