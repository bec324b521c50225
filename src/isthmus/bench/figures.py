"""From what was seen of a workload to its figures.

Throughput: all tokens over the time from the first ask to the last token. Time to first token and the gaps between
tokens are taken for each ask from when it was sent. Decode: tokens after the last first token over the time after it,
so no prefill is in it. Tokens that came together have no gap between them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isthmus.bench.client import Trace


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of a workload. Seconds; tokens a second. `decode_per_s` is 0 when nothing came after the last first."""

    seconds: float
    tokens_per_s: float
    ttft_median_s: float
    ttft_last_s: float
    gap_p50_s: float
    gap_p99_s: float
    decode_per_s: float

    def as_dict(self) -> dict[str, float]:
        """Rounded, for JSON."""
        return {name: round(float(value), 5) for name, value in asdict(self).items()}


def figures(traces: Sequence[Trace]) -> Figures:
    """The figures of traces each of which has a token."""
    begin = min(trace.sent_s for trace in traces)
    end = max(trace.arrivals[-1][0] for trace in traces)
    firsts = [trace.arrivals[0][0] - trace.sent_s for trace in traces]
    gaps: list[float] = []
    for trace in traces:
        before = trace.arrivals[0][0]
        gaps += [0.0] * (trace.arrivals[0][1] - 1)
        for when, count in trace.arrivals[1:]:
            gaps += [when - before, *[0.0] * (count - 1)]
            before = when
    last_first = max(trace.arrivals[0][0] for trace in traces)
    after = sum(count for trace in traces for when, count in trace.arrivals if when > last_first)
    return Figures(
        seconds=end - begin,
        tokens_per_s=sum(trace.tokens for trace in traces) / (end - begin),
        ttft_median_s=float(np.median(firsts)),
        ttft_last_s=max(firsts),
        gap_p50_s=float(np.percentile(gaps, 50)) if gaps else 0.0,
        gap_p99_s=float(np.percentile(gaps, 99)) if gaps else 0.0,
        decode_per_s=after / (end - last_first) if end > last_first else 0.0,
    )


def best(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run with the highest throughput: noise only ever takes away."""
    return max(runs, key=lambda run: run["tokens_per_s"])
