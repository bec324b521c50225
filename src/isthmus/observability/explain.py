"""What happened to a request, told from the journal: as text for people, or as JSON."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from isthmus.contracts.ids import request_id as check_request_id
from isthmus.contracts.journal import LineageFact, StoredEvent
from isthmus.observability.lineage import GAP_KIND, GAP_STREAM, LINEAGE_KIND, LineageGap, request_stream

MAX_CHOICES = 256
BAR_CHARS = 48
_EVENTS = 1000
_CHOICE = re.compile(r"[-.]\d{1,4}")


class LineageSource(Protocol):
    """A journal as `explain` reads it (blocking)."""

    def read(self, stream: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """Events of `stream` with a version over `after`, in order, at most `limit`."""
        ...

    def streams(self, prefix: str, limit: int = 1000) -> list[str]:
        """Names of streams that begin with `prefix`, in order, at most `limit`."""
        ...


class Explanation(msgspec.Struct, frozen=True):
    """The facts of a request (one for each of its choices), and the gaps of the journal that could hide more."""

    request_id: str
    facts: list[LineageFact]
    gaps: list[LineageGap]


def explain(source: LineageSource, request_id: str) -> Explanation:
    """Collect what is known of `request_id`, its choices `<id>-1`, `<id>-2` ... (or `.1`) included, at most 256.

    Raises `InvalidInput` for what is no request id, `JournalUnavailable`.
    """
    check_request_id(request_id)
    stream = request_stream(request_id)
    found = [name for mark in "-." for name in source.streams(stream + mark, MAX_CHOICES)]
    streams = [stream, *(name for name in found if _CHOICE.fullmatch(name[len(stream) :]))]
    facts = [
        msgspec.msgpack.decode(event.body, type=LineageFact)
        for name in streams
        for event in source.read(name, limit=_EVENTS)
        if event.kind == LINEAGE_KIND
    ]
    gaps = [
        msgspec.msgpack.decode(event.body, type=LineageGap)
        for event in source.read(GAP_STREAM, limit=_EVENTS)
        if event.kind == GAP_KIND
    ]
    return Explanation(request_id, sorted(facts, key=_order), gaps)


def _order(fact: LineageFact) -> tuple[int, str, float]:
    """Choices by number, then by name."""
    return (len(fact.request_id), fact.request_id, fact.received_at)


def to_json(explanation: Explanation) -> str:
    """Indented JSON."""
    return msgspec.json.format(msgspec.json.encode(explanation), indent=2).decode()


def to_text(explanation: Explanation) -> str:
    """A page for people."""
    parts = [_fact_text(fact) for fact in explanation.facts]
    if not parts:
        parts.append(f"Nothing is recorded about {explanation.request_id}.")
    relevant = _relevant_gaps(explanation)
    if relevant:
        lost = sum(gap.lost for gap in relevant)
        first, last = min(gap.first_at for gap in relevant), max(gap.last_at for gap in relevant)
        parts.append(f"Gap: {lost} facts of requests received {_when(first)} to {_when(last)} were lost.")
    return "\n\n".join(parts)


def _relevant_gaps(explanation: Explanation) -> Sequence[LineageGap]:
    """Those around the request; all of them when nothing was found."""
    if not explanation.facts:
        return explanation.gaps
    first = min(fact.received_at for fact in explanation.facts)
    last = max(fact.received_at + fact.total_s for fact in explanation.facts)
    return [gap for gap in explanation.gaps if gap.first_at <= last and gap.last_at >= first]


def _fact_text(fact: LineageFact) -> str:
    reused = f"{fact.cached_tokens} of {fact.prompt_tokens} prompt tokens"
    if fact.prompt_tokens:
        reused += f" ({100 * fact.cached_tokens / fact.prompt_tokens:.0f}%)"
    rows = [
        ("what", f"{fact.api} -> {fact.outcome}, HTTP {fact.status}"),
        ("when", _when(fact.received_at)),
        ("who", f"tenant {fact.namespace_id or 'unknown'}"),
        ("model", f"{fact.model}  weights {fact.weights[:16] or 'unknown'}"),
        ("prompt", f"{fact.prompt_tokens} tokens  hash {fact.prompt_hash[:16] or 'none'}"),
        ("reused", f"{reused} in {fact.cached_blocks} {'block' if fact.cached_blocks == 1 else 'blocks'}"),
        *_tiers(fact),
        ("output", f"{fact.output_tokens} tokens  seed {fact.seed}{_rate(fact)}"),
        ("time", f"{_seconds(fact.total_s)} in all, preempted {fact.preemptions} times"),
        ("", _bar(fact)),
    ]
    optional = (("trace", fact.traceparent), ("logits", fact.logits_digest), ("error", fact.error))
    rows += [(name, value) for name, value in optional if value]
    return "\n".join([f"request {fact.request_id}", *(f"  {name:<8}{value}" for name, value in rows)])


def _tiers(fact: LineageFact) -> list[tuple[str, str]]:
    """Where the reused state came from, and why not more did."""
    reuse = fact.reuse
    if reuse is None:
        return []
    parts = [f"{name} {getattr(reuse, name)}" for name in ("device", "dram", "nvme", "remote") if getattr(reuse, name)]
    text = ", ".join(parts) or "nothing"
    if reuse.load_s:
        text += f"; loaded in {_seconds(reuse.load_s)}"
    if reuse.reason:
        text += f"; not more: {reuse.reason}"
    return [("from", text)]


def _rate(fact: LineageFact) -> str:
    """Tokens a second after the first."""
    if fact.output_tokens < 2 or fact.decode_s <= 0:
        return ""
    return f"  {(fact.output_tokens - 1) / fact.decode_s:.1f} tokens/s"


def _bar(fact: LineageFact) -> str:
    """Queue, prefill, decode and the rest of the total, to scale; no part that took time is without a mark."""
    rest = max(0.0, fact.total_s - fact.queue_s - fact.prefill_s - fact.decode_s)
    parts = [("queue", ".", fact.queue_s), ("prefill", "=", fact.prefill_s), ("decode", "#", fact.decode_s)]
    parts.append(("other", "-", rest))
    total = sum(seconds for _, _, seconds in parts)
    if total <= 0:
        return "no time was measured"
    marks = "".join(mark * max(1, round(BAR_CHARS * seconds / total)) for _, mark, seconds in parts if seconds > 0)
    legend = "  ".join(f"{mark} {name} {_seconds(seconds)}" for name, mark, seconds in parts if seconds > 0)
    return f"[{marks}]  {legend}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _when(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
