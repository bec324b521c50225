"""The engine's own process: the far end of the engine port, over an inherited Unix socket pair.

Only the parent holds the other end, so the hop is authenticated by construction. The first frame in is
`EngineSettings`; after `Ready` come commands in and one `Outputs` a step out. End of file means that the parent is
gone: the process ends. Nothing of a request is kept once it ended, and nothing is logged but errors without content.
"""

import select
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from isthmus.contracts.clock import SystemClock
from isthmus.contracts.errors import InvalidInput, IsthmusError
from isthmus.contracts.events import (
    BUILDING,
    Abort,
    Command,
    Drain,
    ErrorInfo,
    Event,
    Failed,
    Outputs,
    Progress,
    Ready,
    RequestOutput,
    SessionHint,
    Shutdown,
    Submit,
)
from isthmus.contracts.wire import FrameReader, encode_frame
from isthmus.execution.inference.bell import Bell
from isthmus.execution.inference.engine import EngineCore
from isthmus.execution.inference.grammar.service import Grammars
from isthmus.execution.inference.heap import keep_freed, one_heap
from isthmus.execution.inference.paging.host import PagerHost
from isthmus.execution.inference.paging.jobs import Pager
from isthmus.execution.inference.settings import EngineSettings

RECEIVE_BYTES = 1 << 18
SEND_TIMEOUT_S = 30.0
BUILD_POLL_S = 1.0
SETTINGS_FRAME_BYTES = 1 << 16


class Hangup(Exception):
    """The parent closed its end, or sent `Shutdown`."""


class Link:
    """The child's end of the socket: whole commands in, whole events out."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.settimeout(SEND_TIMEOUT_S)
        self._commands: FrameReader[Command] = FrameReader(Command)

    def settings(self) -> EngineSettings:
        """The first frame. Raises `WireViolation`, `Hangup`."""
        reader: FrameReader[EngineSettings] = FrameReader(EngineSettings, SETTINGS_FRAME_BYTES)
        while True:
            values = reader.feed(self._receive())
            if values:
                return values[0]

    def send(self, event: Event) -> None:
        """One event out. A parent that takes nothing for 30 s counts as gone."""
        try:
            self._socket.sendall(encode_frame(event))
        except OSError as error:
            raise Hangup from error

    def poll(self, timeout: float | None, readable: Sequence[int] = (), writable: Sequence[int] = ()) -> list[Command]:
        """The commands that arrived; waits at most `timeout` seconds (None: until one comes), or until one of the other
        descriptors is ready.
        """
        own = self._socket.fileno()
        ready, _, _ = select.select([own, *readable], writable, [], timeout)
        return self._commands.feed(self._receive()) if own in ready else []

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except OSError as error:
            raise Hangup from error
        if not data:
            raise Hangup
        return data


class Loop:
    """Drives an `EngineCore` from a `Link`."""

    def __init__(self, core: EngineCore, link: Link, bell: "Bell") -> None:
        self._core = core
        self._link = link
        self._bell = bell
        self._compiled = ""
        self._paging: dict[str, float] = {}

    def run(self) -> None:
        """Until the parent hangs up."""
        wait: float | None = 0.0
        outputs: list[RequestOutput] = []
        while True:
            readable, writable = self._core.watched()
            outputs += self._obey(self._link.poll(wait, [*readable, self._bell.fileno], writable))
            self._bell.hush()
            stepping = self._core.begin_step()
            if not stepping:
                outputs += self._core.collect()
            # What a step gave is sent once the next one runs.
            outputs = self._send(outputs)
            if stepping:
                outputs = self._await_step()
                if self._core.stepping:
                    outputs += self._core.finish_step()
                wait = 0.0 if self._core.stepping else self._core.grace_s()
                if wait:
                    outputs = self._send(outputs)
            else:
                wait = self._idle_s()

    def _idle_s(self) -> float | None:
        """How long to wait without a step. What changes meanwhile is told: a build of compiled pieces
        (it is looked at), and what the store's threads did.
        """
        stats, wait = self._core.stats(), self._core.wait_s()
        if stats.compiled != self._compiled or stats.paging != self._paging:
            self._compiled, self._paging = stats.compiled, stats.paging
            self._link.send(Outputs([], stats))
        return wait if stats.compiled != BUILDING else min(BUILD_POLL_S, BUILD_POLL_S if wait is None else wait)

    def _send(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Send what there is; returns what is left to be sent, nothing."""
        if outputs:
            self._link.send(Outputs(outputs, self._core.stats()))
        return []

    def _await_step(self) -> list[RequestOutput]:
        """Carry out what comes until the step is done, or taken back because of it. Returns the outputs that refuse
        requests.
        """
        refused: list[RequestOutput] = []
        while True:
            self._bell.hush()
            if self._core.ready or not self._core.stepping:
                return refused
            refused += self._obey(self._link.poll(None, [self._bell.fileno]))

    def _obey(self, commands: list[Command]) -> list[RequestOutput]:
        """Carry out commands. Returns the outputs that refuse requests."""
        refused: list[RequestOutput] = []
        for command in commands:
            match command:
                case Submit():
                    output = self._core.submit(command.request)
                    if output is not None:
                        refused.append(output)
                case Abort():
                    self._core.abort(command.request_id)
                case Drain():
                    self._core.drain()
                case SessionHint():
                    self._core.hint(command)
                case Shutdown():
                    raise Hangup
        return refused


def serve(link: Link, host: PagerHost | None) -> None:
    """Load the model, then run until the parent hangs up. State that leaves the device is kept by `host`, if there is
    one, in its store, and loaded from it.
    """
    settings = link.settings()
    link.send(Progress("starting", 0.0))
    kept = one_heap()
    from isthmus.execution.inference.runner import open_runner

    runner = open_runner(settings, lambda stage, fraction: link.send(Progress(stage, fraction)))
    if not (keep_freed() and kept):
        sys.stderr.write("isthmus-engine: this libc cannot be told to keep freed memory; steps will be slower\n")
    clock, bell = SystemClock(), Bell()
    grammars = Grammars(
        runner.info,
        str(Path(settings.model).resolve() / "tokenizer.json"),
        settings.grammar,
        clock,
        most_open=2 * settings.scheduler.max_running,
        draft_tokens=settings.scheduler.draft_tokens,
    )
    pager: Pager | None = None
    try:
        if host is not None:
            link.send(Progress("opening the block store", 0.0))
            pager = host.serve(runner, settings.scheduler.paging, bell.ring)
        profile = runner.profile if settings.profile else None
        told, wake = runner.compiled_state, bell.ring
        core = EngineCore(
            runner, settings.scheduler, clock, grammars, pager=pager, profile=profile, compiled=told, wake=wake
        )
        link.send(Ready(core.info))
        Loop(core, link, bell).run()
    finally:
        grammars.shut()
        if host is not None:
            host.close()
        runner.close()
        bell.close()


def run(link: Link, host: PagerHost | None = None) -> int:
    """Serve the parent at the other end of `link` until it hangs up; the exit status. A start-up error, of the store's,
    too, is sent as `Failed`.
    """
    try:
        serve(link, host)
    except (Hangup, KeyboardInterrupt):
        return 0
    except IsthmusError as error:
        field = error.field if isinstance(error, InvalidInput) else ""
        try:
            link.send(Failed(ErrorInfo(error.code, str(error), field)))
        except Hangup:
            return 0
        return 1
    return 0
