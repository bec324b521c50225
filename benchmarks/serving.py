"""The served engine as clients see it: continuous batching against one at a time, and prefix reuse.

Starts `isthmus serve` with the embedded model on a free port, sends real HTTP requests and reports ratios:
output tokens a second at concurrency 32 over one at a time; time to first token of a long prompt whose prefix is cached
over one never seen. `python -m benchmarks.serving --help`.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Run

WORDS = (
    "state",
    "block",
    "tree",
    "lease",
    "worker",
    "engine",
    "queue",
    "token",
    "prefix",
    "chain",
    "segment",
    "router",
)


@contextmanager
def server(*flags: str) -> Iterator[tuple[int, int]]:
    """A server of the embedded model; its port and process id."""
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "isthmus.cli.main", "serve", "--port", "0", "--state-dir", state]
        # A build beside the server would be measured, too: every one has a new state directory.
        command += ["--no-compile", *flags]
        log = Path(state) / "log"
        with log.open("wb") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT)
        try:
            yield _port(process, log), process.pid
        finally:
            process.terminate()
            process.wait(60)


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """The port, once the server is ready."""
    while process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            return int(found[1])
        time.sleep(0.005)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


async def post(port: int, path: str, body: dict[str, Any]) -> tuple[list[tuple[float, bytes]], float]:
    """One request on a connection of its own. The events with their times (or the one body), and the end."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status!r} {await reader.read()!r}")
    while (await reader.readline()).strip():
        pass
    events: list[tuple[float, bytes]] = []
    while True:
        line = await reader.readline()
        if not line:
            break
        if line.strip():
            events.append((time.perf_counter() - start, line))
    writer.close()
    return events, time.perf_counter() - start


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, user and system."""
    import psutil

    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return sum(each.user + each.system for each in times)


def memory_mib(pid: int) -> float:
    """Proportional set size of a process and its children."""
    import psutil

    parent = psutil.Process(pid)
    return sum(process.memory_full_info().pss for process in [parent, *parent.children(recursive=True)]) / 2**20


def prompt(rng: random.Random, words: int) -> str:
    """Text that no other request has."""
    return " ".join(rng.choice(WORDS) + str(rng.randint(0, 999)) for _ in range(words))


async def throughput(port: int, pid: int, concurrency: int, requests: int, rng: random.Random) -> dict[str, float]:
    """Output tokens a second and CPU-seconds a thousand tokens at a concurrency."""
    gate = asyncio.Semaphore(concurrency)
    tokens = 64

    async def one(text: str) -> None:
        async with gate:
            body = {"prompt": text, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "model": "isthmus"}
            await post(port, "/v1/completions", body)

    texts = [prompt(rng, 24) for _ in range(requests)]
    cpu, start = cpu_seconds(pid), time.perf_counter()
    await asyncio.gather(*(one(text) for text in texts))
    seconds = time.perf_counter() - start
    spent = cpu_seconds(pid) - cpu
    total = requests * tokens
    return {"tokens_per_s": total / seconds, "cpu_s_per_1k_tokens": 1000 * spent / total, "seconds": seconds}


async def first_token(port: int, text: str) -> float:
    """Seconds to the first event of a streamed completion."""
    body = {"prompt": text, "max_tokens": 4, "stream": True, "temperature": 0, "model": "isthmus"}
    events, _ = await post(port, "/v1/completions", body)
    return events[0][0]


async def reuse(port: int, rng: random.Random, rounds: int) -> dict[str, float]:
    """Time to first token of the same long prompt, never seen and then cached."""
    cold, warm = [], []
    for _ in range(rounds):
        text = prompt(rng, 300)
        cold.append(await first_token(port, text))
        warm.append(await first_token(port, text + " and"))
    ratio = statistics.median(c / w for c, w in zip(cold, warm, strict=True))
    return {
        "cold_ttft_s": statistics.median(cold),
        "warm_ttft_s": statistics.median(warm),
        "cold_over_warm": ratio,
        "rounds": rounds,
    }


async def measure(port: int, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the two concurrencies so that drift of the machine hits both."""
    rng = random.Random(options.seed)
    await throughput(port, pid, 32, 32, rng)
    alone, together = [], []
    for _ in range(options.rounds):
        alone.append(await throughput(port, pid, 1, 12, rng))
        together.append(await throughput(port, pid, 32, 96, rng))
    ratios = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(alone, together, strict=True)]
    return {
        "one_at_a_time": alone,
        "concurrency_32": together,
        "throughput_ratio": statistics.median(ratios),
        "prefix_reuse": await reuse(port, rng, 15),
        "memory_mib_all_processes": memory_mib(pid),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run and write benchmarks/results/serving.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    run = Run("serving", options.seed, {"rounds": options.rounds, "output_tokens": 64, "model": "embedded"})
    start = time.perf_counter()
    with server() as (port, pid):
        ready = time.perf_counter() - start
        results = asyncio.run(measure(port, pid, options))
    results["ready_s"] = ready
    print(json.dumps({k: v for k, v in results.items() if not isinstance(v, list)}, indent=1))
    run.write(results)


if __name__ == "__main__":
    main()
