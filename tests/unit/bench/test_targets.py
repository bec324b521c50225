"""What a benchmark has started ends with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import pathlib, sys, threading
from isthmus.bench.targets import TreeTarget, end_when_told
from isthmus.bench import targets

class Sleeper(TreeTarget):
    def start(self):
        self._process = targets.subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        return 0.0

end_when_told()
target = Sleeper("sleeper", [], {}, pathlib.Path(sys.argv[1]))
try:
    target.start()
    target.pause()
    print(target.child.pid, flush=True)
    threading.Event().wait(60)
finally:
    target.stop()
"""


def test_a_paused_target_ends_when_the_benchmark_is_told_to(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "log")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        target = int(bench.stdout.readline())
        bench.send_signal(signal.SIGTERM)
        _, told = bench.communicate(timeout=60)
    assert "KeyboardInterrupt" in told
    assert not Path(f"/proc/{target}").exists()
