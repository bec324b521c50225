"""`make chaos`: the long and destructive tests at release scale. Can be stopped and resumed; its counts accumulate.

Each round runs one suite with a fresh seed and adds its passed and failed tests, and what they say they tried (kills,
flips, ...), to benchmarks/results/chaos.json. A zero in N bounds the rate of failures by 3/N at 95%, so the counts are
what is published, with that bound (`at_most`) where nothing failed. A suite with goals is left out once it has reached
them, unless it is asked for by name. `--rounds N` stops after N rounds, `--minutes M` begins none after M minutes.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine

from isthmus.bench.report import commit

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "chaos.json"
SUITES = {
    "stateful": ["tests/stateful"],
    "chaos": ["tests", "-m", "chaos", "--ignore=tests/chaos"],
    "conformance": ["tests/conformance"],
    "gateway": ["tests/integration", "-k", "gateway or openai or bad_input"],
    "store-kills": ["tests/chaos/test_store_deaths.py", "-m", "chaos", "-k", "kill"],
    "store-power": ["tests/chaos/test_store_deaths.py", "-m", "chaos", "-k", "power"],
    "store-command": ["tests/chaos/test_store_binary.py", "-m", "chaos"],
    "store-faults": ["tests/chaos/test_store_faults.py", "-m", "chaos"],
    "store-stalls": ["tests/chaos/test_store_stalls.py", "-m", "chaos"],
    "store-bitrot": ["tests/chaos/test_store_bitrot.py", "-m", "chaos"],
}
GOALS = {
    "store-kills": {"kills": 100_000, "durable_acknowledgements": 1_000_000},
    "store-power": {"power_cuts": 5_000},
    "store-command": {"binary_kills": 500},
    "store-faults": {"failed_calls": 20_000, "strace_runs": 1_000},
    "store-stalls": {"stalls": 5_000},
    "store-bitrot": {"flips": 100_000},
}
"""What each is to try before it is done."""


def load() -> dict[str, Any]:
    """What earlier runs counted."""
    if RESULT.exists():
        loaded: dict[str, Any] = json.loads(RESULT.read_text())
        return loaded
    return {"suites": {}}


@dataclass
class Round:
    """What one round of a suite came to. `tried`: what its tests say, by name."""

    passed: int
    failed: int
    seconds: float
    tried: Counter[str]


def run_suite(name: str, arguments: list[str], seed: int) -> Round:
    """One round."""
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as report:
        environment = {
            **os.environ,
            "TEST_SCALE": "release",
            "CHAOS_SEED": str(seed),
            "CHAOS_REPORT": report.name,
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--hypothesis-seed={seed}", *arguments]
        start = time.monotonic()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        passed, failed = (_count(result.stdout, word) for word in ("passed", "(?:failed|error)"))
        if failed:
            print(f"{name}, seed {seed}:\n{result.stdout[-8000:]}")
        tried: Counter[str] = Counter()
        for line in report:
            tried.update(json.loads(line))
        return Round(passed, failed, time.monotonic() - start, tried)


def add(entry: dict[str, Any], done: Round, seed: int) -> None:
    """Add a round to what was counted."""
    entry["rounds"] += 1
    entry["passed"] += done.passed
    entry["failed"] += done.failed
    entry["seconds"] = round(entry["seconds"] + done.seconds, 1)
    if done.failed:
        entry["failed_seeds"].append(seed)
    if done.tried:
        entry["tried"] = dict(Counter(entry.get("tried", {})) + done.tried)
        entry.pop("at_most", None)
        if not entry["failed"]:
            entry["at_most"] = {what: float(f"{3 / count:.2g}") for what, count in entry["tried"].items()}


def reached(name: str, entry: dict[str, Any] | None) -> bool:
    """Whether a suite has tried all that it is to try."""
    tried = (entry or {}).get("tried", {})
    return name in GOALS and all(tried.get(what, 0) >= goal for what, goal in GOALS[name].items())


def _count(text: str, word: str) -> int:
    return sum(int(found) for found in re.findall(rf"(\d+) {word}", text.splitlines()[-1] if text else ""))


def main() -> int:
    """Run rounds until told to stop; 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=0, help="stop after this many rounds (default: until interrupted)"
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no round after so long")
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="only this suite (may be repeated)")
    options = parser.parse_args()
    state = load()
    failures, done, start = 0, 0, time.monotonic()
    try:
        while options.rounds == 0 or done < options.rounds:
            for name in options.suite or [one for one in SUITES if not reached(one, state["suites"].get(one))]:
                if options.minutes and time.monotonic() - start > options.minutes * 60:
                    return 1 if failures else 0
                seed = secrets.randbelow(2**31)
                this = run_suite(name, SUITES[name], seed)
                empty = {"rounds": 0, "passed": 0, "failed": 0, "seconds": 0.0, "failed_seeds": []}
                add(state["suites"].setdefault(name, empty), this, seed)
                failures += this.failed
                state["last"] = {"commit": commit(), "machine": machine()}
                RESULT.write_text(json.dumps(state, indent=1) + "\n")
                tried = "".join(f", {count} {what}" for what, count in this.tried.items())
                print(
                    f"{name}: {this.passed} passed, {this.failed} failed{tried} in {this.seconds:.0f} s (seed {seed})"
                )
            done += 1
    except KeyboardInterrupt:
        print("stopped; the counts are kept")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
