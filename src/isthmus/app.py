"""The composition root: the only file that knows every plane. It builds, connects, runs and ends a server.

Order of the start: the engine process is spawned first (importing torch takes longest), prompting helpers and journal
start meanwhile; the port is bound when everything is ready. Order of the end: the edge drains (what was accepted is
answered), then lineage is written, then journal, helpers and engine are closed.
"""

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import uvloop

from isthmus import worker
from isthmus.config import Settings
from isthmus.contracts.clock import Clock, SystemClock, SystemEntropy
from isthmus.contracts.errors import ConfigInvalid, InvalidInput, ModelInvalid
from isthmus.contracts.events import ModelInfo
from isthmus.contracts.journal import LineageFact
from isthmus.contracts.ports import Lineage
from isthmus.contracts.sampling import OPENAI_DEFAULTS, SamplingDefaults
from isthmus.execution.inference.client import EngineProcess
from isthmus.execution.inference.grammar.settings import GrammarSettings
from isthmus.execution.inference.settings import EngineSettings, SchedulerSettings
from isthmus.execution.prompting.folder import read_sampling_defaults
from isthmus.execution.prompting.pool import PoolSettings, PoolStats
from isthmus.execution.prompting.service import FolderPrompting, PromptingSettings, open_prompting
from isthmus.gateway.server import Gateway
from isthmus.gateway.service import GatewayDeps
from isthmus.gateway.settings import GatewaySettings
from isthmus.observability.lineage import LineageRecorder, LineageSettings
from isthmus.observability.logs import JsonRequestLog
from isthmus.observability.metrics import PrometheusMetrics
from isthmus.pager import StoreSpec
from isthmus.state.journal.sqlite import JournalSettings, open_journal
from isthmus.state.kv.address import make_private
from isthmus.state.kv.daemon import run_daemon
from isthmus.state.kv.log.settings import LogSettings
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import open_store
from isthmus.trust.namespace import DEFAULT_TENANT, derive_namespace, load_secret

SMALL_LOG = 8 << 30
SMALL, LARGE = (16 << 20, 2 << 20), (64 << 20, (4 << 20) + (64 << 10))
"""Segments, and single writes, of small logs and of others: a log has at least eight, and room is made one by one."""


class ServeUi(Protocol):
    """What a person who started a server is told."""

    def on_progress(self, stage: str, fraction: float) -> None:
        """Loading: what is being done and how far it is (0 to 1)."""
        ...

    def on_ready(self, url: str, info: ModelInfo) -> None:
        """Requests are taken at `url`."""
        ...

    def on_stopping(self, accepted: int) -> None:
        """The server drains: the `accepted` requests being answered finish, nothing new is taken."""
        ...


class NoLineage:
    """Implements `ports.Lineage` when the journal is switched off by its setting."""

    def record(self, fact: LineageFact) -> None:
        """Keep nothing."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    gateway: Gateway
    engine: EngineProcess
    url: str


def serve(settings: Settings, ui: ServeUi) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Raises what the start raises, and `EngineFailed` when the engine ends by itself.
    """
    uvloop.run(_serve(settings, ui))


def serve_store(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Run the block store of this host until SIGTERM or SIGINT; `on_ready(socket)` when engines may connect.

    Raises `StoreError` and `ConfigInvalid` when it cannot start.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    clock, entropy = SystemClock(), SystemEntropy()
    make_private(settings.store_socket.absolute().parent)
    store = open_store(store_settings(settings), clock, entropy)
    daemon = DaemonSettings(socket=str(settings.store_socket.absolute()))
    run_daemon(store, daemon, clock, entropy, stop=stop, on_ready=on_ready)


class Signals:
    """What the process was told: the first SIGTERM or SIGINT asks for a drain, the second for the end."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.end = asyncio.Event()

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take over both signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.take)

    def take(self) -> None:
        """One more signal."""
        (self.end if self.drain.is_set() else self.drain).set()


async def _serve(settings: Settings, ui: ServeUi) -> None:
    async with open_server(settings, ui) as server:
        signals = Signals()
        signals.listen(asyncio.get_running_loop())
        ui.on_ready(server.url, server.engine.info)
        await _first(signals.drain.wait(), server.engine.failed())
        ui.on_stopping(server.gateway.active)
        await _first(signals.end.wait(), server.gateway.drain(settings.drain_s))
        if server.engine.failure is not None:
            raise server.engine.failure


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait for the first of `waits`; end the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def open_server(settings: Settings, ui: ServeUi) -> AsyncIterator[Server]:
    """A server on the running loop, closed at the end of the context (drain it first to lose nothing)."""
    clock, entropy = SystemClock(), SystemEntropy()
    async with contextlib.AsyncExitStack() as stack:
        engine = EngineProcess.spawn(engine_settings(settings), worker.command(store_spec(settings)))
        stack.push_async_callback(engine.close)
        prompting = open_prompting(settings.model_folder, prompting_settings(settings), clock)
        stack.push_async_callback(prompting.close)
        secret = load_secret(settings.secret_path, entropy)
        metrics = PrometheusMetrics(settings.served_name)
        _watch_helpers(metrics, prompting.stats)
        lineage = await _open_lineage(settings, clock, metrics, stack)
        await _all_ready(engine, prompting, ui)
        if prompting.vocab_size > engine.info.vocab_size:
            ids, rows = prompting.vocab_size, engine.info.vocab_size
            raise ModelInvalid(f"tokenizer.json has {ids} token ids, the model only {rows}")
        log = JsonRequestLog(sys.stderr.buffer, dropped=metrics.log_dropped)
        stack.callback(log.close)
        namespace = derive_namespace(secret, DEFAULT_TENANT)
        defaults = sampling_defaults(settings)
        deps = GatewayDeps(engine, prompting, lineage, metrics, log, clock, entropy, namespace, defaults)
        gateway = Gateway(deps, gateway_settings(settings))
        stack.push_async_callback(gateway.close)
        try:
            host, port = await gateway.start()
        except OSError as error:
            raise ConfigInvalid(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from error
        shown = f"[{host}]" if ":" in host else host
        yield Server(gateway, engine, f"http://{shown}:{port}")


async def _all_ready(engine: EngineProcess, prompting: FolderPrompting, ui: ServeUi) -> None:
    """Wait for both; the first failure ends the start."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(engine.ready(ui.on_progress))
            group.create_task(prompting.start())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _watch_helpers(metrics: PrometheusMetrics, stats: PoolStats) -> None:
    """Publish what befell the prompting helpers."""
    metrics.watch("isthmus_prompt_helpers_killed", "Prompting helpers killed at a deadline.", lambda: stats.killed)
    metrics.watch("isthmus_prompt_helpers_died", "Prompting helpers that ended by themselves.", lambda: stats.died)
    metrics.watch("isthmus_prompts_refused", "Prompts refused by the prompting plane.", lambda: stats.refused)


async def _open_lineage(
    settings: Settings, clock: Clock, metrics: PrometheusMetrics, stack: contextlib.AsyncExitStack
) -> Lineage:
    if not settings.journal:
        return NoLineage()
    journal = await open_journal(settings.journal_path, JournalSettings(max_bytes=settings.journal_max), clock)
    stack.push_async_callback(journal.close)
    recorder = LineageRecorder(journal, LineageSettings(), clock)
    stats = recorder.stats
    metrics.watch("isthmus_lineage_written", "Lineage facts in the journal.", lambda: stats.written)
    metrics.watch("isthmus_lineage_lost", "Lineage facts that could not be kept.", lambda: stats.lost)
    metrics.watch("isthmus_journal_errors", "Appends that the journal refused.", lambda: stats.journal_errors)
    recorder.start()
    stack.push_async_callback(recorder.close)
    return recorder


def engine_settings(settings: Settings) -> EngineSettings:
    """The engine's share of the settings."""
    scheduler = SchedulerSettings(
        max_batch_tokens=settings.max_batch_tokens,
        mixed_prompt_tokens=settings.mixed_prompt_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        ageing_s=settings.ageing_s,
        draft_tokens=settings.speculate,
        overlap=settings.overlap == "on" or (settings.overlap == "auto" and settings.device != "cpu"),
    )
    return EngineSettings(
        model=str(settings.model_folder),
        name=settings.served_name,
        dtype=settings.dtype,
        device=settings.device,
        exact=settings.exact,
        block_tokens=settings.block_tokens,
        kv_bytes=settings.kv_memory,
        state_bytes=settings.state_memory,
        max_model_len=settings.max_model_len,
        threads=settings.threads,
        profile=settings.profile_steps,
        compiled="auto" if settings.compile else "off",
        compiled_dir=str(settings.compiled_path.absolute()),
        scheduler=scheduler,
        grammar=GrammarSettings(
            compile_s=settings.grammar_deadline_s,
            step_s=settings.grammar_step_s,
            memory_bytes=settings.grammar_memory,
        ),
    )


def store_spec(settings: Settings) -> StoreSpec | None:
    """Where the engine keeps state beyond its device."""
    if settings.store == "off":
        return None
    apart = settings.device == "cpu"
    if settings.store != "own":
        return StoreSpec(daemon=str(Path(settings.store).absolute()), apart=apart)
    return StoreSpec(own=store_settings(settings), socket=str(settings.store_socket.absolute()), apart=apart)


def store_settings(settings: Settings) -> StoreSettings:
    """What a store with these settings is made of. Raises `ConfigInvalid` for sizes that cannot work."""
    try:
        log = None
        if settings.store_disk:
            segment, extent = SMALL if settings.store_disk <= SMALL_LOG else LARGE
            log = LogSettings(
                capacity=settings.store_disk,
                segment_bytes=segment,
                extent_bytes=extent,
                wear_bytes_day=settings.store_wear,
            )
        path = str(settings.store_path.absolute()) if log is not None else ""
        return StoreSettings(arena_bytes=settings.store_memory, policy=settings.store_policy, log=log, path=path)
    except InvalidInput as error:
        name = "store_disk" if error.field == "capacity" else "store_memory"
        raise ConfigInvalid(f"{name}: {error}") from error


def sampling_defaults(settings: Settings) -> SamplingDefaults:
    """What requests that say nothing about sampling get. Raises `ModelInvalid`."""
    return read_sampling_defaults(settings.model_folder) if settings.sampling_defaults else OPENAI_DEFAULTS


def prompting_settings(settings: Settings) -> PromptingSettings:
    """The prompting plane's share of the settings."""
    pool = PoolSettings(
        helpers=settings.prompt_helpers,
        max_waiting=settings.prompt_waiting,
        deadline_s=settings.prompt_deadline_s,
        helper_memory_bytes=settings.prompt_memory,
    )
    return PromptingSettings(
        pool, settings.max_prompt, tool_parser=settings.tool_parser, reasoning_parser=settings.reasoning_parser
    )


def gateway_settings(settings: Settings) -> GatewaySettings:
    """The edge's share of the settings."""
    return GatewaySettings(
        host=settings.host,
        port=settings.port,
        allowed_hosts=settings.allowed_hosts,
        max_connections=settings.max_connections,
        max_in_flight=settings.max_in_flight,
        max_body_bytes=settings.max_body,
        max_buffered_bytes=settings.max_buffered,
        header_timeout_s=settings.header_timeout_s,
        body_timeout_s=settings.body_timeout_s,
        idle_timeout_s=settings.idle_timeout_s,
        write_timeout_s=settings.write_timeout_s,
        max_sequences=settings.max_sequences,
        default_max_tokens=settings.default_max_tokens,
        default_deadline_s=settings.default_deadline_s or None,
        max_deadline_s=settings.max_deadline_s,
    )
