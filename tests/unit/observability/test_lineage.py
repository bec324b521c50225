"""Lineage: a request never waits for it, what is lost is counted and shown, and `explain` tells the story."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from isthmus.contracts.clock import ManualClock, SystemClock
from isthmus.contracts.errors import InvalidInput, JournalUnavailable
from isthmus.contracts.events import Reuse
from isthmus.contracts.journal import Append, LineageFact, StoredEvent
from isthmus.observability.explain import explain, to_json, to_text
from isthmus.observability.lineage import (
    GAP_STREAM,
    LineageGap,
    LineageRecorder,
    LineageSettings,
    request_stream,
)
from isthmus.state.journal.reader import JournalReader
from isthmus.state.journal.sqlite import JournalSettings, open_journal


def fact(request_id: str, **fields: object) -> LineageFact:
    values: dict[str, object] = {
        "request_id": request_id,
        "api": "chat.completions",
        "model": "isthmus",
        "namespace_id": "00112233aabbccdd",
        "weights": "ab" * 32,
        "prompt_hash": "cd" * 32,
        "prompt_tokens": 128,
        "cached_tokens": 96,
        "cached_blocks": 6,
        "output_tokens": 41,
        "outcome": "stop",
        "status": 200,
        "received_at": 1_700_000_000.0,
        "queue_s": 0.1,
        "prefill_s": 0.3,
        "decode_s": 2.0,
        "total_s": 2.5,
        "preemptions": 1,
        "seed": 7,
        **fields,
    }
    return LineageFact(**values)  # type: ignore[arg-type]


class FakeJournal:
    """Keeps what it is given; fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.calls = 0
        self.kept: dict[str, list[bytes]] = {}
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def append(self, batch: Sequence[Append]) -> list[int]:
        self.calls += 1
        self.entered.set()
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise JournalUnavailable("no")
        for part in batch:
            self.kept.setdefault(part.stream, []).extend(event.body for event in part.events)
        return [1] * len(batch)

    async def read(self, stream: str, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        return []

    async def close(self) -> None:
        pass

    def gaps(self) -> list[LineageGap]:
        return [msgspec.msgpack.decode(body, type=LineageGap) for body in self.kept.get(GAP_STREAM, [])]


SOON = LineageSettings(flush_s=0.01, retry_s=0.001, max_waiting=8)


def test_facts_reach_the_journal_without_a_close() -> None:
    async def main() -> None:
        journal = FakeJournal()
        recorder = LineageRecorder(journal, SOON, SystemClock())
        recorder.start()
        recorder.record(fact("a"))
        recorder.record(fact("b"))
        await journal.entered.wait()
        assert journal.calls == 1
        assert set(journal.kept) == {"request/a", "request/b"}
        await recorder.close()
        assert recorder.stats.written == 2

    asyncio.run(main())


def test_close_flushes_at_once_and_later_facts_are_counted() -> None:
    async def main() -> None:
        journal = FakeJournal()
        recorder = LineageRecorder(journal, LineageSettings(flush_s=3600), SystemClock())
        recorder.start()
        recorder.record(fact("a"))
        await asyncio.sleep(0)
        await recorder.close()
        assert set(journal.kept) == {"request/a"}
        recorder.record(fact("b"))
        assert (recorder.stats.recorded, recorder.stats.written, recorder.stats.lost) == (2, 1, 1)

    asyncio.run(main())


def test_an_overflow_is_counted_and_written_as_a_gap() -> None:
    async def main() -> None:
        journal = FakeJournal()
        recorder = LineageRecorder(journal, SOON, SystemClock())
        for n in range(12):
            recorder.record(fact(f"r{n}", received_at=float(n)))
        assert recorder.stats.lost == 4
        recorder.start()
        await recorder.close()
        assert recorder.stats.written == 8
        (gap,) = journal.gaps()
        assert (gap.lost, gap.first_at, gap.last_at, gap.reason) == (4, 8.0, 11.0, "queue full")

    asyncio.run(main())


def test_a_journal_that_fails_for_a_while_loses_nothing() -> None:
    async def main() -> None:
        journal = FakeJournal(failures=2)
        recorder = LineageRecorder(journal, SOON, SystemClock())
        recorder.start()
        recorder.record(fact("a"))
        await recorder.close()
        assert set(journal.kept) == {"request/a"}
        assert (recorder.stats.journal_errors, recorder.stats.lost) == (2, 0)

    asyncio.run(main())


def test_a_journal_that_stays_broken_costs_the_fact_and_later_tells_of_it() -> None:
    async def main() -> None:
        journal = FakeJournal(failures=3)
        recorder = LineageRecorder(journal, SOON, SystemClock())
        recorder.start()
        recorder.record(fact("a"))
        while recorder.stats.lost == 0:
            await asyncio.sleep(0.001)
        assert journal.calls == 3  # bounded: a broken journal is not asked in a loop
        recorder.record(fact("b"))
        await recorder.close()
        assert set(journal.kept) == {"request/b", GAP_STREAM}
        assert journal.gaps()[0].reason == "journal unavailable"
        assert journal.gaps()[0].lost == 1

    asyncio.run(main())


def test_a_journal_that_hangs_cannot_hold_up_the_end() -> None:
    async def main() -> None:
        journal = FakeJournal()
        journal.gate.clear()
        recorder = LineageRecorder(journal, LineageSettings(flush_s=0.001, close_s=0.05), SystemClock())
        recorder.start()
        recorder.record(fact("a"))
        await journal.entered.wait()
        recorder.record(fact("b"))
        await recorder.close()
        assert (recorder.stats.written, recorder.stats.lost) == (0, 2)

    asyncio.run(main())


def kept(path: Path, facts: list[LineageFact], lose: int = 0) -> JournalReader:
    """A real journal with these facts, and a gap."""

    async def main() -> None:
        journal = await open_journal(path, JournalSettings(), ManualClock())
        recorder = LineageRecorder(journal, LineageSettings(max_waiting=len(facts)), ManualClock())
        for one in facts + [fact(f"lost{n}") for n in range(lose)]:
            recorder.record(one)
        recorder.start()
        await recorder.close()
        await journal.close()

    asyncio.run(main())
    return JournalReader(path)


def test_explain_tells_the_story(tmp_path: Path) -> None:
    reader = kept(tmp_path / "j.db", [fact("req-1", error="engine_failed", traceparent="00-aa-bb-01")])
    text = to_text(explain(reader, "req-1"))
    reader.close()
    for words in (
        "request req-1",
        "chat.completions -> stop, HTTP 200",
        "2023-11-14 22:13:20 UTC",
        "tenant 00112233aabbccdd",
        "isthmus  weights abababababababab",
        "128 tokens  hash cdcdcdcdcdcdcdcd",
        "96 of 128 prompt tokens (75%) in 6 blocks",
        "41 tokens  seed 7  20.0 tokens/s",
        "2.50 s in all, preempted 1 times",
        ". queue 100.0 ms  = prefill 300.0 ms  # decode 2.00 s  - other 100.0 ms",
        "engine_failed",
        "00-aa-bb-01",
    ):
        assert words in text
    assert "Gap" not in text


def test_explain_tells_from_which_tier_state_came_and_why_not_more(tmp_path: Path) -> None:
    facts = [
        fact("a", reuse=Reuse(16, 32, 48, load_s=0.0123, reason="corrupt")),
        fact("a-1", reuse=Reuse()),
        fact("a-2"),
    ]
    reader = kept(tmp_path / "j.db", facts)
    text = to_text(explain(reader, "a"))
    reader.close()
    assert "from    device 16, dram 32, nvme 48; loaded in 12.3 ms; not more: corrupt" in text
    assert "from    nothing\n" in text
    assert text.count("  from ") == 2


def test_explain_shows_every_choice_in_order_and_no_other_request(tmp_path: Path) -> None:
    reader = kept(tmp_path / "j.db", [fact(name) for name in ("a-10", "a-2", "a", "a-1", "ab", "b-1", "a-x", "a.3")])
    ids = [f["request_id"] for f in json.loads(to_json(explain(reader, "a")))["facts"]]
    reader.close()
    assert ids == ["a", "a-1", "a-2", "a.3", "a-10"]


def test_two_requests_with_one_id_are_both_kept(tmp_path: Path) -> None:
    reader = kept(tmp_path / "j.db", [fact("a", seed=1), fact("a", seed=2), fact("a", seed=2)])
    assert [f.seed for f in explain(reader, "a").facts] == [1, 2]
    reader.close()


def test_explain_shows_gaps(tmp_path: Path) -> None:
    reader = kept(tmp_path / "j.db", [fact("a")], lose=3)
    found, missing = to_text(explain(reader, "a")), to_text(explain(reader, "lost1"))
    reader.close()
    assert "Gap: 3 facts" in found
    assert "Nothing is recorded about lost1" in missing
    assert "Gap: 3 facts" in missing


def test_explain_refuses_what_is_no_request_id(tmp_path: Path) -> None:
    reader = kept(tmp_path / "j.db", [fact("a")])
    with pytest.raises(InvalidInput):
        explain(reader, "a b%")
    reader.close()
    assert request_stream("a") == "request/a"
