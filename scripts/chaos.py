"""`make chaos`: the long and destructive tests at release scale. Can be stopped and resumed; its counts accumulate.

Each round runs one suite with a fresh seed and adds its passed and failed tests to benchmarks/results/chaos.json. A
zero in N bounds the rate of failures by 3/N at 95%, so the counts are what is published. `--rounds N` stops after N
rounds.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import commit, machine

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "chaos.json"
SUITES = {
    "stateful": ["tests/stateful"],
    "chaos": ["tests", "-m", "chaos"],
    "conformance": ["tests/conformance"],
    "gateway": ["tests/integration", "-k", "gateway or openai or bad_input"],
}


def load() -> dict[str, Any]:
    """What earlier runs counted."""
    if RESULT.exists():
        loaded: dict[str, Any] = json.loads(RESULT.read_text())
        return loaded
    return {"suites": {}}


def run_suite(name: str, arguments: list[str], seed: int) -> tuple[int, int, float]:
    """Passed, failed and seconds of one round."""
    environment = {**os.environ, "TEST_SCALE": "release"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", *arguments]
    start = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    passed, failed = (_count(result.stdout, word) for word in ("passed", "(?:failed|error)"))
    if failed:
        print(f"{name}, seed {seed}:\n{result.stdout[-4000:]}")
    return passed, failed, time.monotonic() - start


def _count(text: str, word: str) -> int:
    return sum(int(found) for found in re.findall(rf"(\d+) {word}", text.splitlines()[-1] if text else ""))


def main() -> int:
    """Run rounds until told to stop; 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=0, help="stop after this many rounds (default: until interrupted)"
    )
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="only this suite (may be repeated)")
    options = parser.parse_args()
    state = load()
    failures, done = 0, 0
    try:
        while options.rounds == 0 or done < options.rounds:
            for name in options.suite or SUITES:
                seed = secrets.randbelow(2**31)
                passed, failed, seconds = run_suite(name, SUITES[name], seed)
                entry = state["suites"].setdefault(
                    name, {"rounds": 0, "passed": 0, "failed": 0, "seconds": 0.0, "failed_seeds": []}
                )
                entry["rounds"] += 1
                entry["passed"] += passed
                entry["failed"] += failed
                entry["seconds"] = round(entry["seconds"] + seconds, 1)
                if failed:
                    entry["failed_seeds"].append(seed)
                failures += failed
                state["last"] = {"commit": commit(), "machine": machine()}
                RESULT.write_text(json.dumps(state, indent=1) + "\n")
                print(f"{name}: {passed} passed, {failed} failed in {seconds:.0f} s (seed {seed})")
            done += 1
    except KeyboardInterrupt:
        print("stopped; the counts are kept")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
