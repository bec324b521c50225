"""The far end of `isthmus.bench.targets.ScriptTarget`, with nothing but the standard library: it runs anywhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Ask = dict[str, Any]
Trace = dict[str, Any]


def serve(answer: Callable[[list[Ask]], list[Trace]]) -> None:
    """Say that the engine is ready; then answer each line of asks with a line of traces."""
    # What a library prints must not be taken for an answer: it goes to the log.
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps({"traces": answer(json.loads(line))}), file=out, flush=True)


class Arrivals:
    """Notes when the tokens of each ask came."""

    def __init__(self, asks: list[Ask]) -> None:
        self._start = time.perf_counter()
        self._asks = asks
        self.traces: list[Trace] = [{"sent_s": ask["at_s"], "arrivals": []} for ask in asks]

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def came(self, index: int, count: int) -> None:
        """So many tokens of an ask came, no more than were asked for counted."""
        arrivals = self.traces[index]["arrivals"]
        left = self._asks[index]["output"] - sum(had for _, had in arrivals)
        if min(count, left) > 0:
            arrivals.append((self.now, min(count, left)))
