"""Compiled pieces of a running engine: loaded from the cache, or built beside the server and taken up when ready.

States: `building`, then `ready` or `failed`. Whatever goes wrong, the eager pieces go on and `reason` says why. Never
waits but in `close`: a build is looked at between two steps.
"""

import enum
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from isthmus.contracts.clock import Clock
from isthmus.contracts.events import BUILDING
from isthmus.execution.inference.compiled.cache import Refused, load_entry, open_cache
from isthmus.execution.inference.compiled.spec import PieceSpec, cache_key, describe, this_machine
from isthmus.execution.inference.heap import available_bytes
from isthmus.execution.inference.models.decoder import Decoder
from isthmus.execution.inference.models.pieces import Pieces
from isthmus.execution.inference.settings import EngineSettings

BUILDER = "isthmus.execution.inference.compiled.build"
COMPILER = "g++"
DEADLINE_S = 1800.0
"""For a build. It takes about 40 s of one core, and gets only what the server leaves."""
MEMORY_BYTES = 1 << 30
"""What the helper and its compiler take at their peak; without it free there is no build."""
WORK = "building-"
LOG = "build.log"


class CompiledState(enum.StrEnum):
    """Where the pieces come from."""

    OFF = "off"
    BUILDING = BUILDING
    READY = "ready"
    FAILED = "failed"


class Compiled:
    """The compiled pieces of one model. `state`, `reason` and `refused` (entries not trusted) may be read any time.

    `start` is called once, before steps run; `poll` by the thread that runs them; `close` after the last one.
    """

    def __init__(self, pieces: Pieces, spec: PieceSpec | None, folder: Path, clock: Clock) -> None:
        self._pieces = pieces
        self._spec = spec
        self._folder = folder
        self._clock = clock
        self._helper: subprocess.Popen[bytes] | None = None
        self._work: Path | None = None
        self._lock = -1
        self._deadline = 0.0
        self.state = CompiledState.OFF
        self.reason = ""
        self.refused = 0

    def start(self) -> None:
        """Take up what the cache has, else begin a build."""
        if self._spec is None:
            self._fail("no form of this model is compiled")
            return
        try:
            open_cache(self._folder)
            if not self._take("from the cache"):
                self._spawn(self._spec)
        except OSError as error:
            self._end_build()
            self._fail(f"the cache folder cannot be used: {error.strerror}")
        except Refused as error:
            self.refused += 1
            self._fail(str(error))

    def poll(self) -> None:
        """Take up a build that has ended. Between two steps."""
        if self._helper is None:
            return
        status = self._helper.poll()
        if status is None:
            if self._clock.monotonic() > self._deadline:
                self._end_build()
                self._fail(f"the build took over {DEADLINE_S:.0f} s")
            return
        self._end_build()
        if status != 0:
            self._fail(f"the build ended with status {status}")
            return
        try:
            if not self._take("built"):
                self._fail("the build left nothing")
        except Refused as error:
            self.refused += 1
            self._fail(str(error))

    def close(self) -> None:
        """End a build that is under way, with every process of it."""
        self._end_build()

    def told(self) -> tuple[str, str]:
        """State and reason, for `EngineStats`."""
        return self.state.value, self.reason

    @property
    def pid(self) -> int | None:
        """The process id of the build under way."""
        return None if self._helper is None else self._helper.pid

    def _take(self, origin: str) -> bool:
        """Compute with the entry of the cache from now on; False when there is none. Raises `Refused`."""
        if self._spec is None:
            return False
        entry = self._folder / cache_key(self._spec, this_machine())
        try:
            found = load_entry(entry, self._spec)
        except Refused as error:
            if not error.damaged or self.state is CompiledState.BUILDING:
                raise
            self.refused += 1
            shutil.rmtree(entry, ignore_errors=True)
            return False
        if found is None:
            return False
        self._pieces.use(*found)
        self.state, self.reason = CompiledState.READY, origin
        return True

    def _fail(self, reason: str) -> None:
        self.state, self.reason = CompiledState.FAILED, reason

    def _spawn(self, spec: PieceSpec) -> None:
        """Start the helper. Raises `OSError`."""
        compiler = shutil.which(COMPILER)
        if compiler is None:
            self._fail(f"there is no {COMPILER} on this machine")
            return
        available = available_bytes()
        if available is not None and available < MEMORY_BYTES:
            self._fail(f"{available // 2**20} MiB of memory are available, a build takes {MEMORY_BYTES // 2**20}")
            return
        self._sweep()
        self._work = Path(tempfile.mkdtemp(prefix=WORK, dir=self._folder))
        self._lock = os.open(self._work, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with (self._folder / LOG).open("wb") as log:
            self._helper = subprocess.Popen(
                # -P, -s: neither the working directory nor the user's is searched for modules; -B: writes no bytecode.
                [sys.executable, "-P", "-s", "-B", "-m", BUILDER, str(self._folder), str(self._work), "--until-eof"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(compiler, self._work),
                cwd=self._work,
                start_new_session=True,
            )
        self.state = CompiledState.BUILDING
        self._deadline = self._clock.monotonic() + DEADLINE_S
        if self._helper.stdin is not None:
            # One line, far under what a pipe holds. It stays open: its end tells the helper that we are gone.
            with suppress(BrokenPipeError):  # a helper that has ended already is seen by `poll`
                self._helper.stdin.write(msgspec.json.encode(spec) + b"\n")
                self._helper.stdin.flush()

    def _sweep(self) -> None:
        """Remove what builds of servers that were killed left behind: their locks are gone with them."""
        for path in self._folder.glob(f"{WORK}*"):
            with suppress(FileNotFoundError):  # another server removed it
                lock = os.open(path, os.O_RDONLY)
                try:
                    with suppress(BlockingIOError):  # another server builds there
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(lock)

    def _end_build(self) -> None:
        """No process and no file of the build is left after it."""
        if self._helper is not None:
            if self._helper.returncode != 0:  # still running, or gone before its compiler
                with suppress(ProcessLookupError):
                    os.killpg(self._helper.pid, signal.SIGKILL)
            self._helper.wait()
            if self._helper.stdin is not None:
                with suppress(BrokenPipeError):
                    self._helper.stdin.close()
            self._helper = None
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            os.close(self._lock)
            self._work = None


def open_compiled(settings: EngineSettings, decoder: Decoder, clock: Clock) -> Compiled | None:
    """Compiled pieces of a decoder on a CPU, from the cache or under way; None where the settings want none.

    Never in exact mode: the compiler chooses the order of sums.
    """
    if settings.compiled == "off" or settings.exact:
        return None
    compiled = Compiled(decoder.kernels.pieces, describe(decoder), Path(settings.compiled_dir), clock)
    compiled.start()
    return compiled


def _environment(compiler: str, work: Path) -> dict[str, str]:
    """The whole environment of the helper and of its compiler."""
    package = sys.modules["isthmus"].__file__ or ""
    return {
        "PYTHONPATH": str(Path(package).resolve().parent.parent),
        "PYTHONUTF8": "1",
        "PATH": os.pathsep.join((str(Path(compiler).parent), os.defpath)),
        "CXX": compiler,
        "HOME": str(work),
        "TMPDIR": str(work),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
