"""OpenVINO GenAI's continuous batching pipeline as a peer: `openvino_peer.py FOLDER THREADS DTYPE`, driven over
lines.py.

The model is converted once, into a folder beside it. Prefix caching is on, as in its own server.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from lines import Arrivals, Ask, Trace, serve

KV_GIB = 1
BATCH_TOKENS = 512


def converted(folder: Path) -> Path:
    """The model in OpenVINO's format, bfloat16 kept as float16 weights."""
    target = folder.with_name(folder.name + "-openvino")
    if not (target / "openvino_model.xml").exists():
        command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "-m", folder]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp16", target]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    return target


def pipeline(folder: Path, threads: int, dtype: str) -> Any:
    """The pipeline on this machine's processor; `dtype` is bf16 or f32."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = KV_GIB
    scheduler.max_num_batched_tokens = BATCH_TOKENS
    scheduler.enable_prefix_caching = True
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": dtype}
    try:
        return genai.ContinuousBatchingPipeline(str(converted(folder)), scheduler, "CPU", settings)
    except RuntimeError:
        # With AVX-512 alone it takes a bfloat16 cache by itself and then refuses it.
        settings["KV_CACHE_PRECISION"] = "f32"
        return genai.ContinuousBatchingPipeline(str(converted(folder)), scheduler, "CPU", settings)


def run(pipe: Any, asks: list[Ask], number: int) -> list[Trace]:
    """Every ask at its time, one step after another."""
    arrivals, waiting, running = Arrivals(asks), list(enumerate(asks)), {}
    while waiting or running:
        while waiting and waiting[0][1]["at_s"] <= arrivals.now:
            index, ask = waiting.pop(0)
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = ask["output"], True, False
            ids = ov.Tensor(np.array([ask["prompt"]], np.int64))
            running[index] = pipe.add_request(number * 10_000 + index, ids, config)
        if not running:
            time.sleep(max(0.0, waiting[0][1]["at_s"] - arrivals.now))
            continue
        pipe.step()
        for index, handle in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    arrivals.came(index, len(output.generated_ids))
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del running[index]
    return arrivals.traces


def main() -> None:
    """Load, then answer."""
    pipe, runs = pipeline(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]), 0

    def answer(asks: list[Ask]) -> list[Trace]:
        nonlocal runs
        runs += 1
        return run(pipe, asks, runs)

    serve(answer)


if __name__ == "__main__":
    main()
